"""Tables that name image files, by a path, a file name, or an id without ending."""

import dataclasses
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path

from datasets import Dataset, Value

from hfft.data.images.decoding import stored_path
from hfft.data.sources.advice import advice_for, check_header_row, check_paths, missing_path, not_found, refuse_unused
from hfft.data.sources.columns import first_paths
from hfft.data.sources.datasets_library import read_table
from hfft.data.sources.folders import endings, filled_subfolders, is_image_file, subfolders, visible_files
from hfft.data.sources.layout import files_by_split, split_names
from hfft.data.sources.table import RawRows, Table, make_table
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec
from hfft.system.files import expanded
from hfft.system.text import path_text

_METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")  # as datasets' imagefolder has them
_SAMPLE = 200  # values of a column that are looked up among the images
_MOST = 1_000_000  # files that are listed to find the images of a table
_REPLACED = "hfft's own: the column that is replaced"
_UPLOADED = re.compile(r"^[0-9a-f]{8}-")  # what Label Studio puts in front of a file's name


def read_path_tables(files: Mapping[str, Path], spec: DataSpec, root: Path, *, depth: int = 0) -> Table:
    """Tables of paths by split; paths begin at `image_folder`, else at the table's own folder.

    Images are named below `root`, of whose folders the first `depth` tell no class.
    """
    images = spec.image_folder and Path(expanded(spec.image_folder))
    if images and not images.is_dir():
        raise DataError(f"data.image_folder: {missing_path(str(spec.image_folder))}")
    splits = {}
    for split, file in files.items():
        base = images or file.parent
        rows, spec = _locate_images(read_table(file), base, spec, file)
        splits[split] = RawRows(rows, base, depth)
    return make_table(splits, spec, root=images or root)


def metadata_files(folder: Path) -> list[Path]:
    """The tables called `metadata` that lie in a folder of images, or in its split folders."""
    children = subfolders(folder)
    splits = split_names(path.name for path in children)
    places = [folder, *(path for path in children if path.name in splits)]
    files = (file for place in places for file in sorted(place.iterdir()))
    return [file for file in files if file.name.lower() in _METADATA and file.is_file()]


def read_metadata(folder: Path, files: Sequence[Path], spec: DataSpec) -> Table:
    """Tables called `metadata`: of the whole folder, or of its split folders."""
    refuse_unused(spec, ("config", "revision", "image_folder"), f"{folder} is a folder of images")
    if files[0].parent == folder:
        if len(files) > 1:
            shown = ", ".join(file.relative_to(folder).as_posix() for file in files)
            raise DataError(f"{folder}: found {shown}; allowed: one table for the folder, or one in each split folder")
        return read_path_tables({"train": files[0]}, spec, folder)
    names = split_names(path.name for path in filled_subfolders(folder))
    tables = {names.get(file.parent.name, file.parent.name): file for file in files}
    lacking = [name for name in names.values() if name not in tables]
    if lacking:
        raise DataError(f"{folder}: found tables in {', '.join(tables)} and none in {', '.join(lacking)}; add one")
    return read_path_tables(tables, spec, folder, depth=1)


def read_text_tables(folder: Path, files: Sequence[Path], spec: DataSpec) -> Table:
    """Text tables of a folder without images, one for each split."""
    refuse_unused(spec, ("config", "revision"), f"{folder} is a folder of tables")
    splits = files_by_split(folder, files)
    for named in splits.values():
        if len(named) > 1:
            shown = ", ".join(file.relative_to(folder).as_posix() for file in named)
            raise DataError(f"{folder}: {shown} are tables of one split; allowed: one each, called like the split")
    return read_path_tables({split: named[0] for split, named in splits.items()}, spec, folder)


class ImageNames:
    """Image files below a folder, to be found by what a table calls them."""

    def __init__(self, root: Path, paths: Iterable[str]) -> None:
        """Of images at these paths below the folder."""
        self.root = root
        self._exact: dict[str, str] = {}
        self._last: dict[str, str] = {}
        self._others: dict[str, str] = {}  # the second image of a name
        for path in paths:
            for full, known in ((path, self._exact), (path.rpartition("/")[2], self._last)):
                full = unicodedata.normalize("NFC", full)  # macOS writes names in the other form
                for key in (full, full.rpartition(".")[0]):
                    if known.setdefault(key, path) != path:
                        self._others[key] = path

    def find(self, value: object, base: str) -> tuple[str, ...]:
        """The images that a value may mean: none, one or two.

        Args:
            value: Path, file name or id.
            base: The table's own folder, with a slash at its end; empty for that of the images.
        """
        text = unicodedata.normalize("NFC", str(value)).strip().replace("\\", "/")
        text = text.rpartition("?d=")[2].removeprefix("./")  # Label Studio's local files end in ?d=PATH
        parts = text.split("/")
        for path in (base + text, *("/".join(parts[place:]) for place in range(len(parts)))):
            if path in self._exact:
                return self._of(self._exact, path)
        stem, dot, ending = parts[-1].rpartition(".")
        keys = [parts[-1], _UPLOADED.sub("", parts[-1]), *([stem] if dot + ending.lower() in endings() else [])]
        return next((self._of(self._last, key) for key in keys if key in self._last), ())

    def _of(self, known: dict[str, str], key: str) -> tuple[str, ...]:
        return (known[key], self._others[key]) if key in self._others else (known[key],)


def resolve_paths(
    rows: Dataset, names: ImageNames, base: str, spec: DataSpec, file: Path
) -> tuple[Dataset, str] | None:
    """Rows with the path of each image, and the column that holds it; None where no column names images.

    Raises:
        DataError: If a value may mean several images.
    """
    kinds = {name: getattr(kind, "dtype", "") for name, kind in rows.features.items() if isinstance(kind, Value)}
    texts = [name for name, kind in kinds.items() if kind.startswith(("string", "large_string", "int", "uint"))]
    counts = {}
    for column in [name for name in texts if name == spec.image_column] or texts:
        sample = {value for value in rows[column][:_SAMPLE] if value is not None}
        found = [names.find(value, base) for value in sample]
        counts[column] = len(set().union(*found)) if sum(map(bool, found)) * 2 > len(sample) else 0
    column = max(counts, key=lambda name: counts[name], default=None)
    if column is None or counts[column] == 0:
        return None
    check_header_row([column], str(file), is_row=bool(names.find(column, base)) and column[:1].isdigit())
    paths: list[str | None] = []
    for value in rows[column][:]:
        found = () if value is None else names.find(value, base)
        if len(found) > 1:
            first, second = sorted(found)[:2]
            raise DataError(
                f"{file}: {value} may be {first} or {second}; name the folder of its images: data.source={file} "
                f"data.image_folder={(names.root / second).parent}"
            )
        paths.append(next(iter(found), None if value is None else f"{base}{value}"))
    order = rows.column_names
    rows = rows.rename_column(column, _REPLACED).add_column(column, paths, feature=Value("string"))
    return rows.select_columns(order), column


def path_below(path: Path, folder: Path) -> str:
    """A path below a folder as rows have it."""
    return stored_path(path_text(path.relative_to(folder).as_posix()))


def _locate_images(rows: Dataset, base: Path, spec: DataSpec, file: Path) -> tuple[Dataset, DataSpec]:
    """A table whose paths lead nowhere, with the images below its folder that are called so; else the table as it is.

    Raises:
        DataError: If several images are called the same.
    """
    check_header_row(rows.column_names, str(file))
    paths = first_paths(rows, spec)
    if paths is None or not base.is_dir() or _exist(paths[:3], base):
        return rows, spec
    try:
        files = list(islice(visible_files(base), _MOST))
    except DataError:  # it may be the root of a file system
        return rows, spec
    images = [path_below(path, base) for path in files if is_image_file(path)]
    found = resolve_paths(rows, ImageNames(base, images), "", spec, file)
    if found is not None:
        return found[0], dataclasses.replace(spec, image_column=found[1])
    check_paths(paths, f"{file}: image_column: a column")
    has_endings = any(Path(path).suffix.lower() in endings() for path in paths)
    if paths and not _exist(paths, base) and (images or advice_for(files) or not has_endings):
        raise not_found(base / paths[0], str(file))
    return rows, spec


def _exist(paths: Sequence[str], base: Path) -> bool:
    return any(os.path.exists(base / expanded(path.replace("\\", "/"))) for path in paths)
