"""A source named in a recipe -> train, validation and test rows with label names; reads no pixel."""

import dataclasses
import glob
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, DatasetDict, Value, concatenate_datasets, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from hfft.data.content import stored_path
from hfft.data.folders import (
    image_files,
    metadata_files,
    split_folders,
    splits_of,
    subfolders,
    table_files,
    warn_of_left_out,
)
from hfft.data.label_values import folder_classes, known_as, warn_of_alike
from hfft.data.labels import UNLABELLED, class_names, count_keys, is_multi_label, label_keys, labels_of, relabelled
from hfft.data.rows import Found, Table, parent_folders, rows_of, standardize
from hfft.data.splits import carved_shares, existing_split, labelled, once, split_rows
from hfft.data.tables import PARENT_FOLDER
from hfft.data.tars import read_tars, tar_files
from hfft.data.text_tables import TEXT_TABLES, read_text_table
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec
from hfft.remote import hub_problem
from hfft.text import path_text, printable_path

_LOG = get_logger(__name__)


@dataclass(frozen=True)
class ImageData:
    """Rows of every split; pixels are read later.

    Attributes:
        splits: `train`, and `validation` and `test` where there are any. Each row has `image` (`bytes` and `path`,
            not decoded), `label` (index into `labels`; multi-label, a list of them) and `file` (path below the
            source, or row name).
        labels: Class names, in the order of the label indices.
        columns: Which columns of a table are used for what, in words; empty for folders.
        carved: Splits that were taken out of train.
        shards: Tar files, or Parquet files of a folder, that hold the images; 0 for other sources.
    """

    splits: Mapping[str, Dataset]
    labels: tuple[str, ...]
    columns: str = ""
    carved: tuple[str, ...] = ()
    shards: int = 0

    @property
    def is_multi_label(self) -> bool:
        """Whether an image has any number of labels."""
        return is_multi_label(next(iter(self.splits.values())))

    @property
    def task(self) -> str:
        """`single_label` or `multi_label`, as a recipe has it."""
        return "multi_label" if self.is_multi_label else "single_label"

    def counts(self, split: str) -> dict[str, int]:
        """Images per class of a split; an image with several labels counts for each."""
        labels = labels_of(self.splits[split])
        found = labels.sum(axis=0, dtype=int) if labels.ndim == 2 else np.bincount(labels, minlength=len(self.labels))
        return {label: int(count) for label, count in zip(self.labels, found, strict=True)}


def load_data(
    spec: DataSpec, seed: int, source: DatasetDict | None = None, *, without: Collection[str] = ()
) -> ImageData:
    """Find the images of a recipe and split them.

    Args:
        spec: The recipe's data section.
        seed: Decides which images a carved split takes.
        source: Data already in memory; replaces `spec.source`. Its format or transform is not applied.
        without: Names of rows that are left out before anything is split, such as those that can't be decoded.

    Raises:
        DataError: If the source can't be found, or has no images, labels or splits as asked.
    """
    found = standardize(_tables_in(source), spec, "data") if source is not None else _read_filled(spec)
    where = "data" if source is not None else spec.source
    kept = _without(found.splits, without)
    splits = split_rows(kept, spec.splits, seed=seed, where=where, max_per_class=spec.max_per_class)
    labels = class_names(splits["train"])
    carved = tuple(carved_shares(found.splits, spec.splits))
    data = ImageData(splits=splits, labels=labels, columns=found.columns, carved=carved, shards=found.shards)
    _check_classes(data, where)
    warn_of_alike(labels, where)
    return data


def read_splits(spec: DataSpec) -> dict[str, Dataset]:
    """The splits that the source itself has, as they are: rows without a label have -1, classes may have no row.

    Raises:
        DataError: If the source can't be read.
    """
    return _read(spec).splits


def load_rows(
    spec: DataSpec, labels: tuple[str, ...], split: str | None = None, *, without: Collection[str] = ()
) -> Dataset:
    """Rows of a labelled source for an existing model, with label indices in the model's order.

    Args:
        spec: Where the images are.
        labels: The model's class names.
        split: One of the source's splits; all of its rows when None.
        without: Names of rows that are left out.

    Raises:
        DataError: If these rows have classes that the model does not know.
    """
    found = _without(_read_filled(spec).splits, without)
    if split is not None:
        found = {split: found[existing_split(found, split, spec.source)]}
    elif len(found) > 1:
        counts = ", ".join(f"{name} {len(part)}" for name, part in found.items())
        PartialState()  # the logger asks it which process this is
        _LOG.info(f"{spec.source}: takes all splits together: {counts}; name one to have it alone")
    parts = [once(labelled(part, name, spec.source), name, spec.source) for name, part in found.items()]
    used = {name for part in parts for name in _used(part)}
    known = known_as(used, labels)
    unknown = [name for name in class_names(parts[0]) if name in used and name not in known]
    if unknown:
        raise DataError(
            f"{spec.source}: the model does not know the classes {', '.join(unknown)}; it knows {', '.join(labels)}"
        )
    return concatenate_datasets([relabelled(part, labels) for part in parts])


def _used(rows: Dataset) -> list[str]:
    """The classes that rows have."""
    names = class_names(rows)
    counts = count_keys(label_keys(rows), len(names))
    return [name for name, count in zip(names, counts.tolist(), strict=True) if count]


def _read_filled(spec: DataSpec) -> Found:
    found = _read(spec)
    for folder in found.empty:
        raise DataError(f"{folder}: the class folder holds no images; add some or remove the folder")
    return found


def _without(found: dict[str, Dataset], names: Collection[str]) -> dict[str, Dataset]:
    if not names:
        return found
    left_out = set(names)
    kept = {
        name: [n for n, file in enumerate(part["file"][:]) if file not in left_out] for name, part in found.items()
    }
    return {name: part if len(kept[name]) == len(part) else part.select(kept[name]) for name, part in found.items()}


def _read(spec: DataSpec) -> Found:
    path = Path(spec.source).expanduser()
    if path.is_dir():
        return _read_folder(path, spec)
    if path.is_file():
        return _read_file(path, spec)
    if spec.source.startswith((".", "/", "~")) or spec.source.count("/") > 1:
        raise DataError(f"data.source: the folder {spec.source} does not exist")
    problem = hub_problem(spec.source, "dataset", spec.revision)
    if problem is not None:
        raise DataError(f"data.source: {spec.source} is no folder or file here, and {problem}")
    loaded = _load(spec.source, spec.source, spec.config, revision=spec.revision)
    return standardize(_tables_in(loaded), spec, spec.source)


def _load(
    where: str,
    path: str,
    config: str | None = None,
    *,
    revision: str | None = None,
    data_files: dict[str, list[str]] | None = None,
) -> DatasetDict:
    try:
        loaded = load_dataset(path, config, revision=revision, data_files=data_files)
    except Exception as error:  # datasets 5.2 wraps errors in rows alone; YAML, tar, HDF5, ... raise their own before
        raise DataError(f"data.source: {where} can't be loaded as a data set: {_reason(error)}") from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})


def _reason(error: Exception) -> str:
    """The first line that says anything; the first of a DatasetGenerationError doesn't, but the rest and its cause."""
    lines = str(error).splitlines()
    if isinstance(error, DatasetGenerationError):
        lines = [*lines[1:], *str(error.__cause__ or "").splitlines()]
    return next((line.strip() for line in lines if line.strip()), type(error).__name__)


def _tables_in(source: DatasetDict) -> dict[str, Table]:
    return {str(split): Table(part.with_format(None)) for split, part in source.items()}


def _read_file(file: Path, spec: DataSpec) -> Found:
    """One file: a table of paths or images, or a tar file."""
    _refuse_unused(spec, ("config", "revision"), f"{file} is a file")
    ending = file.suffix.lower()
    base = file.parent if spec.image_folder is None else _image_folder(spec.image_folder)
    if ending in TEXT_TABLES:
        return standardize({"train": Table(read_text_table(file), base)}, spec, spec.source, root=base)
    if ending == ".parquet":
        rows = _load(spec.source, "parquet", data_files={"train": [str(file)]})["train"]
        return standardize({"train": Table(rows, base)}, spec, spec.source, root=base)
    if ending == ".tar":
        return _read_shards({"train": [file]}, file.parent, spec)
    raise DataError(
        f"data.source: {spec.source} is a {ending or 'nameless'} file; allowed: a folder, a table "
        f"({', '.join(TEXT_TABLES)}, .parquet), a .tar file or a Hub id"
    )


def _image_folder(name: str) -> Path:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise DataError(f"data.image_folder: the folder {name} does not exist")
    return folder


def _read_folder(folder: Path, spec: DataSpec) -> Found:
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _read_saved(folder, spec)
    tables = metadata_files(folder)
    if tables:
        _refuse_unused(spec, ("config", "revision", "image_folder"), f"{folder} is a folder of images")
        return standardize(_metadata_tables(folder, tables), spec, spec.source, root=folder)
    tables = table_files(folder, (".parquet",))
    if tables:
        found = standardize(_tables_in(_load_tables(folder, tables, spec)), spec, spec.source)
        return dataclasses.replace(found, shards=0 if _has_card(folder) else len(tables))
    tables = table_files(folder, TEXT_TABLES)
    if tables:
        _refuse_unused(spec, ("config", "revision"), f"{folder} is a folder of tables")
        base = folder if spec.image_folder is None else _image_folder(spec.image_folder)
        return standardize(_text_tables(folder, tables, spec), spec, spec.source, root=base)
    shards = tar_files(folder)
    if shards and not any(image_files(path) for path in subfolders(folder)):
        return _read_shards(splits_of(folder, shards), folder, spec)
    return _read_class_folders(folder, spec)


def _refuse_unused(spec: DataSpec, keys: Sequence[str], what: str) -> None:
    unused = [key for key in keys if getattr(spec, key) is not None]
    if unused:
        raise DataError(f"data.{unused[0]}: {what}, which has none; leave it out")


def _read_saved(folder: Path, spec: DataSpec) -> Found:
    """What `save_to_disk` wrote."""
    _refuse_unused(spec, ("config", "revision", "image_folder"), f"{folder} is a saved data set")
    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # pyarrow, JSON and the file system raise their own
        raise DataError(f"data.source: {spec.source} can't be loaded as a saved data set: {_reason(error)}") from error
    splits = loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})
    return standardize(_tables_in(splits), spec, spec.source)


def _metadata_tables(folder: Path, files: Sequence[Path]) -> dict[str, Table]:
    """Tables that lie beside their images: of the whole folder, or of its split folders."""
    if files[0].parent == folder:
        if len(files) > 1:
            shown = ", ".join(file.relative_to(folder).as_posix() for file in files)
            raise DataError(f"{folder}: found {shown}; allowed: one table for the folder, or one in each split folder")
        return {"train": Table(read_text_table(files[0]), folder)}
    tables = {file.parent.name: Table(read_text_table(file), file.parent, 1) for file in files}
    lacking = [name for name in split_folders(folder) if name not in tables]
    if lacking:
        raise DataError(f"{folder}: found tables in {', '.join(tables)} and none in {', '.join(lacking)}; add one")
    return tables


def _load_tables(folder: Path, tables: list[Path], spec: DataSpec) -> DatasetDict:
    """Parquet files as the folder's card describes them, else in splits that their names tell."""
    if _has_card(folder):
        return _load(spec.source, str(folder), spec.config)
    files = {split: [glob.escape(str(file)) for file in named] for split, named in splits_of(folder, tables).items()}
    return _load(spec.source, "parquet", data_files=files)


def _has_card(folder: Path) -> bool:
    """Whether a card says which files are whose."""
    card = folder / "README.md"
    found = card.is_file() and re.search(r"^(configs|dataset_info):", card.read_text("utf-8", "replace"), re.MULTILINE)
    return bool(found)


def _text_tables(folder: Path, files: Sequence[Path], spec: DataSpec) -> dict[str, Table]:
    base = None if spec.image_folder is None else _image_folder(spec.image_folder)
    tables = {}
    for split, named in splits_of(folder, files).items():
        if len(named) > 1:
            shown = ", ".join(file.relative_to(folder).as_posix() for file in named)
            raise DataError(f"{folder}: {shown} are tables of one split; allowed: one each, called like the split")
        tables[split] = Table(read_text_table(named[0]), base or named[0].parent)
    return tables


def _read_shards(files: Mapping[str, Sequence[Path]], root: Path, spec: DataSpec) -> Found:
    """Images in tar files."""
    _refuse_unused(spec, ("config", "revision", "image_column", "image_folder"), f"{spec.source} holds tar files")
    tables = {split: Table(read_tars(list(named), root), root, names="file") for split, named in files.items()}
    found = standardize(tables, dataclasses.replace(spec, image_column="image"), spec.source, root=root)
    return dataclasses.replace(found, shards=sum(map(len, files.values())))


def _read_class_folders(folder: Path, spec: DataSpec) -> Found:
    keys = ("config", "revision", "image_column", "label_column", "split_column", "image_folder")
    _refuse_unused(spec, keys, f"{folder} is a folder of images")
    if spec.task == "multi_label":
        raise DataError(
            f"data.task: {folder} is a folder of class folders, where an image has one label; multi_label needs a "
            "table with lists of labels, or with columns of 0 and 1"
        )
    if spec.group_column not in (None, PARENT_FOLDER):
        raise DataError(f"data.group_column: found {spec.group_column!r}; allowed for class folders: {PARENT_FOLDER}")
    splits = split_folders(folder)
    classes = folder_classes((child.name for path in splits.values() for child in subfolders(path)), str(folder))
    if not classes:
        raise DataError(f"{folder}: found no class folders; allowed: one folder of images per class")
    warn_of_left_out(folder, splits.values())
    rows = {split: _class_folder_rows(path, folder, classes, spec.group_column) for split, path in splits.items()}
    empty = []
    for split, path in splits.items():
        filled = _used(rows[split])
        empty += [str(child) for child in subfolders(path) if classes[child.name] not in (*filled, None)]
    return Found(rows, empty=tuple(map(str, empty)))


def _class_folder_rows(folder: Path, root: Path, classes: Mapping[str, str | None], group: str | None) -> Dataset:
    names = list(dict.fromkeys(name for name in classes.values() if name is not None))
    places: dict[str | None, int] = {None: UNLABELLED, **{name: place for place, name in enumerate(names)}}
    paths: list[str] = []
    labels: list[int] = []
    files: list[str] = []
    for child, name in classes.items():
        found = image_files(folder / child)
        paths += [stored_path(path_text(path)) for path in found]
        labels += [places[name]] * len(found)
        files += [printable_path(path.relative_to(root).as_posix()) for path in found]
    rows = rows_of(paths, labels, files, names)
    if group is None:
        return rows
    groups = parent_folders(files, len(folder.relative_to(root).parts) + 1, str(root))
    return rows.add_column("group", groups, feature=Value("string"))


def _check_classes(data: ImageData, where: str) -> None:
    if len(data.labels) < 2:
        raise DataError(f"{where}: found the class {', '.join(data.labels)} only; a classifier needs at least two")
    for split, rows in data.splits.items():
        if len(rows) == 0:
            raise DataError(f"{where}: the split {split!r} holds no images")
    empty = [label for label, count in data.counts("train").items() if count == 0]
    if empty:
        raise DataError(f"{where}: no training images of the class {', '.join(empty)}")
