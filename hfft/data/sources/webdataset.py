"""Shards of images in tar files, as WebDataset writes them, as tables: images stay in the shards, read where they lie.

Files of a sample follow each other and share their name up to its first dot; what comes after the dot says what each
of them holds (https://github.com/webdataset/webdataset#the-webdataset-format).
"""

import json
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from datasets import Dataset, Value

from hfft.data.images.decoding import part_of
from hfft.data.sources.advice import refuse_unused
from hfft.data.sources.folders import CLASS_FOLDER, divide, endings
from hfft.data.sources.table import RawRows, Table, make_table
from hfft.data.sources.table_files import dataset_of
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec
from hfft.system.progress import SOON, bar
from hfft.system.text import printable_path

_TEXTS = ("cls", "txt", "label")  # endings of files whose text is a value


def read_shards(files: Mapping[str, Sequence[Path]], root: Path, spec: DataSpec) -> Table:
    """Images in tar files, not compressed, by split; they are named below `root`."""
    refuse_unused(spec, ("config", "revision", "image_column", "image_folder"), f"{spec.source} holds tar files")
    splits = {split: RawRows(_labelled(named, root, spec), root, names="file") for split, named in files.items()}
    table = make_table(splits, replace(spec, image_column="image"), root=root)
    return replace(table, shards=sum(map(len, files.values())))


def _labelled(files: Sequence[Path], root: Path, spec: DataSpec) -> Dataset:
    """One row per sample; without labels, the tar files' names are the classes where that is asked for."""
    rows = _read_tars(files, root)
    if not set(rows.column_names) <= {"image", "file", CLASS_FOLDER} or any(rows[CLASS_FOLDER][:]):
        return rows
    if spec.label_column != CLASS_FOLDER:
        raise DataError(
            f"{spec.source}: the tar files hold images without labels; allowed: 1.cls, 1.txt or 1.json with "
            "1.jpg, class folders, or data.label_column=class_folder, which takes the tar files' names as classes"
        )
    names = [file.rpartition(".tar/")[0].rpartition("/")[2] for file in rows["file"][:]]
    return rows.remove_columns(CLASS_FOLDER).add_column(CLASS_FOLDER, names, feature=Value("string"))


def _read_tars(files: Sequence[Path], root: Path) -> Dataset:
    """One row per sample: `image` with the place of its bytes, `file`, and a column per further member.

    Where members lie in folders, `class_folder` is the first that tells something, and `split` that of a split.
    """
    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1)) as pool:
        found = pool.map(lambda file: list(_samples(file, printable_path(file.relative_to(root).as_posix()))), files)
        shards = bar("reading shards", len(files), found, unit="shards", delay=SOON)
        rows = [row for shard in shards for row in shard]
    if not rows:
        raise DataError(f"{root}: the tar files hold no images")
    _add_folders(rows)
    return dataset_of(rows, str(root))


def _add_folders(rows: list[dict[str, Any]]) -> None:
    """What the folders within tar files tell: without those that hold everything, splits and then classes."""
    parts = [row.pop("folders") for row in rows]
    divided = divide(parts)
    while divided is None and len({tuple(part[:1]) for part in parts}) == 1 and any(len(part) > 1 for part in parts):
        parts = [part[1:] for part in parts]  # a folder that holds everything
        divided = divide(parts)
    if divided is not None:
        splits, parts = divided
        for row, split in zip(rows, splits, strict=True):
            row.setdefault("split", split)
    for row, part in zip(rows, parts, strict=True):
        row[CLASS_FOLDER] = part[0] if part else None


def _samples(file: Path, shown: str) -> Iterator[dict[str, Any]]:
    """The samples of a tar file, which is `shown` in names and messages."""
    for (folder, stem), members in groupby(_members(file, shown), key=lambda member: _key(member[0])):
        row: dict[str, Any] = {}
        for name, content in members:
            ending = name.rpartition("/")[2].partition(".")[2].lower()
            if isinstance(content, bytes):
                row |= _fields(content, ending, f"{shown}: {name}")
            elif "image" in row:
                raise DataError(f"{shown}: the sample {stem} has several images, {row['file']} and {name}")
            else:
                folders = [part for part in folder.split("/") if part not in ("", ".")]
                row |= {"image": content, "file": f"{shown}/{name}", "folders": folders}
        if "image" not in row:
            raise DataError(f"{shown}: a sample has no image, only {', '.join(row)}; allowed: an image per sample")
        yield row


def _key(name: str) -> tuple[str, str]:
    """The folder of a member, and its name up to the first dot."""
    folder, _, base = name.rpartition("/")
    return folder, base.partition(".")[0]


def _members(file: Path, shown: str) -> Iterator[tuple[str, str | bytes]]:
    """Name of each member of use, with the place of an image or the bytes of a small file."""
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                base = member.name.rpartition("/")[2]
                if not member.isfile() or base.startswith("."):
                    continue
                ending = base.partition(".")[2].lower()
                if f".{ending.rpartition('.')[2]}" in endings():
                    yield printable_path(member.name), part_of(file, member.offset_data, member.size)
                elif ending in (*_TEXTS, "json"):
                    stream = archive.extractfile(member)
                    yield printable_path(member.name), b"" if stream is None else stream.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{shown}: no tar file, or one that is cut short or compressed: {error}") from error


def _fields(content: bytes, ending: str, where: str) -> dict[str, Any]:
    """The columns that a member other than an image brings."""
    try:
        found = json.loads(content) if ending == "json" else {ending: content.decode().strip()}
    except (ValueError, RecursionError) as error:
        kind = "JSON" if ending == "json" else "UTF-8 text"
        raise DataError(f"{where} is no {kind}: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{where} holds {type(found).__name__}; allowed: an object")
    return {name: value for name, value in found.items() if name not in ("image", "file", "folders")}
