"""What is said of sources that can't be read as they are: where was looked, and what to do."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from datasets import Dataset

from hfft.data.images.decoding import opened_path
from hfft.data.sources.folders import endings
from hfft.errors import DataError, nearest
from hfft.recipe.spec import DataSpec
from hfft.system.files import expanded

_UNPACK = "an archive: unpack it, and name the folder"
_ADVICE = {
    **dict.fromkeys((".zip", ".7z", ".rar", ".gz", ".tgz", ".bz2", ".xz", ".zst"), _UNPACK),
    ".tar": f"{_UNPACK}, or name it alone",
    ".json": "no table: write one object per line (.jsonl), or export Label Studio's and COCO's annotations as CSV",
    ".txt": "no table: save a list of images as .csv with a first line such as path,label",
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "a spreadsheet: save it as .csv"),
    **dict.fromkeys((".h5", ".hdf5", ".npz", ".npy", ".mat", ".pkl", ".lmdb"), "arrays: write the images to files"),
}
_SAMPLE = 100  # images that are looked for
_URL = re.compile(r"^[a-z][a-z0-9+]*://", re.IGNORECASE)
_BASE64 = re.compile(r"^(data:image/|[A-Za-z0-9+/\s]{200})")


def missing_source(source: str) -> str | None:
    """Why a source that is neither file nor folder can't be one on the Hub either, or None."""
    if source.startswith("hf://datasets/"):
        return f"found the URL {source}; allowed: the Hub id alone, {'/'.join(source.split('/')[3:5])}"
    if _URL.match(source):
        return f"found the URL {source}; allowed: a folder or file on this machine, or a Hub id; download it first"
    is_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source
    return missing_path(source) if is_path or PurePath(source).suffix.lower() in (*_ADVICE, ".csv", ".tsv") else None


def missing_path(name: str) -> str:
    """That a path leads to no folder: what was tried, and how far it leads."""
    path = Path(expanded(name))
    return f"{name} is no folder" if path.exists() else f"the folder {name} does not exist; {looked_for(path)}"


def looked_for(path: Path) -> str:
    """How far a path leads that leads nowhere, and what may be meant."""
    parent = _existing_parent(path)
    lost = path.absolute().relative_to(parent).parts[0]
    meant = nearest(lost, os.listdir(parent) if os.access(parent, os.R_OK) else ())
    hint = f"; did you mean {meant!r}?" if meant else ""
    return f"looked for {path.absolute()}: {parent} holds no {lost!r}{hint}"


def _existing_parent(path: Path) -> Path:
    parents = path.absolute().parents
    return next((folder for folder in parents if folder.is_dir()), parents[0])


def refuse_unused(spec: DataSpec, keys: Sequence[str], what: str) -> None:
    """Refuse keys of the data section that a source has no use for."""
    unused = [key for key in keys if getattr(spec, key) is not None]
    if unused:
        raise DataError(f"data.{unused[0]}: {what}, which has none; leave it out")


def advice_for(files: Iterable[Path]) -> str:
    """What to do with files that are neither images nor tables, as the end of a sentence; empty for nothing."""
    found = Counter(file.suffix.lower() for file in files)
    known = [f"{ending} is {advice}" for ending, advice in _ADVICE.items() if ending in found]
    return f"; {'; '.join(known)}" if known else ""


def check_header_row(names: Sequence[str], where: str, *, is_row: bool = False) -> None:
    """Refuse a first line that names an image, and so is a row."""
    odd = next((name for name in names if is_row or PurePath(name).suffix.lower() in endings()), None)
    if odd is not None:
        raise DataError(
            f"{where}: the first line holds {odd!r}, which looks like an image's row; add a line of names above it, "
            "such as path,label"
        )


def check_paths(values: Sequence[str], where: str) -> None:
    """Refuse texts of which the first is a URL, or an image written as text."""
    first = next(iter(values), "")
    if _URL.match(first):
        raise DataError(f"{where} holds URLs ({first[:80]}); download the images, and name their paths")
    if _BASE64.match(first):
        raise DataError(
            f"{where} holds images as text (base64: {first[:20]}...); write them to files, or to Parquet as bytes"
        )


def check_found(rows: Dataset, where: str) -> None:
    """Refuse images in files of which none of the first is there: the folder that paths begin at is wrong."""
    images = rows[:_SAMPLE]["image"]
    paths = [image["path"] for image in images if image is not None and image["bytes"] is None]
    if len(paths) < len(images) or any(path is None or "?" in path for path in paths):
        return
    if not any(os.path.exists(opened_path(path)) for path in paths):
        raise not_found(Path(paths[0]), where)


def not_found(path: Path, where: str) -> DataError:
    """That images aren't where a table says; `path` is the first."""
    return DataError(
        f"{where}: no image is where the rows say; looked for {path.absolute()} first; name the column of paths, file "
        "names or ids (data.image_column) and the folder that they begin at (data.image_folder)"
        f"{advice_for(_existing_parent(path).iterdir())}"
    )
