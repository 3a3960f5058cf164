"""A source named in a recipe -> train, validation and test rows with label names; reads no pixel."""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, Value, concatenate_datasets, load_from_disk

from hfft.data.sources.advice import advice_for, looked_for, missing_path, missing_source
from hfft.data.sources.folders import (
    filled_subfolders,
    holds_images,
    is_output,
    splits_of,
    subfolders,
    table_files,
    visible_files,
)
from hfft.data.sources.image_folders import read_class_folders, read_images, refuse_unused
from hfft.data.sources.label_tables import find_images
from hfft.data.sources.label_values import known_as, warn_of_alike
from hfft.data.sources.labels import class_names, count_keys, is_multi_label, label_keys, labels_of, relabelled
from hfft.data.sources.layout import CLASS_FOLDER, find_layout, metadata_files, split_names
from hfft.data.sources.loading import check_numbering, load, load_parquet, read_table, reason_of
from hfft.data.sources.rows import Source, Table, standardize
from hfft.data.sources.splits import carved_shares, existing_split, labelled, once, split_rows
from hfft.data.sources.targets import SHARES
from hfft.data.sources.text_tables import TEXT_TABLES
from hfft.data.sources.webdataset import read_tars, tar_files
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec
from hfft.system.hub_lookup import hub_problem
from hfft.system.messages import say, warn
from hfft.system.paths import expanded

_SAVED = ("dataset_dict.json", "state.json")  # of `save_to_disk`


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
    spec: DataSpec, seed: int, data: DatasetDict | None = None, *, without: Collection[str] = ()
) -> ImageData:
    """Find the images of a recipe and split them: `read_source` and `choose_splits` at once.

    Args:
        spec: The recipe's data section.
        seed: Decides which images a carved split takes.
        data: Data already in memory; replaces `spec.source`. Its format or transform is not applied.
        without: Names of rows that are left out before anything is split, such as those that can't be decoded.

    Raises:
        DataError: If the source can't be found, or has no images, labels or splits as asked.
    """
    return choose_splits(read_source(spec, data).without(without), spec, seed)


def choose_splits(source: Source, spec: DataSpec, seed: int) -> ImageData:
    """Split what a source holds, and check that there is something to train on.

    Classes that no image of the chosen splits has are left out.

    Raises:
        DataError: If there are no splits as asked, or too few classes, or one without training images.
    """
    where = source.name
    own = existing_split(source.splits, spec.splits.train, where)
    for folder in source.empty.get(own, ()):
        raise DataError(f"{folder}: the class folder holds no images; add some or remove the folder")
    splits = split_rows(source.splits, spec.splits, seed=seed, where=where, max_per_class=spec.max_per_class)
    _warn_of_empty(source, [split for split in source.empty if split != own])
    _tell_of_unused(source.splits, spec, own, where)
    splits = _without_unused(splits, where)
    labels = class_names(splits["train"])
    carved = tuple(carved_shares(source.splits, spec.splits))
    data = ImageData(splits=splits, labels=labels, columns=source.columns, carved=carved, shards=source.shards)
    _check_classes(data, where)
    warn_of_alike(labels, where)
    if "-1" in labels:
        warn(f"{where}: -1 is taken for the name of a class; where it means that there is no label, leave it empty")
    return data


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
    source = read_source(spec)
    found = source.without(without).splits
    if split is not None:
        own = existing_split(found, split, spec.source)
        found = {own: found[own]}
    elif len(found) > 1:
        counts = ", ".join(f"{name} {len(part)}" for name, part in found.items())
        say(f"{spec.source}: takes all splits together: {counts}; name one to have it alone")
    _warn_of_empty(source, found)
    parts = [once(labelled(part, name, spec.source), name, spec.source) for name, part in found.items()]
    used = {name for part in parts for name in _used(part)}
    known = known_as(used, labels)
    unknown = [name for name in class_names(parts[0]) if name in used and name not in known]
    if unknown:
        raise DataError(
            f"{spec.source}: the model does not know the classes {', '.join(unknown)}; it knows {', '.join(labels)}"
        )
    return concatenate_datasets([relabelled(part, labels) for part in parts])


def _warn_of_empty(found: Source, splits: Collection[str]) -> None:
    for folder in (folder for split in splits for folder in found.empty.get(split, ())):
        warn(f"{folder}: the class folder holds no images")


def _tell_of_unused(found: Mapping[str, Dataset], spec: DataSpec, own: str, where: str) -> None:
    """Name the splits of the source that are used for nothing."""
    carved = carved_shares(found, spec.splits)
    wanted = {"validation": spec.splits.validation, "test": spec.splits.test}
    named = [name if split == "auto" else str(split) for name, split in wanted.items() if split and name not in carved]
    used = {own, *(existing_split(found, name, where) for name in named)}
    unused = [f"{name} ({len(rows):,} rows)" for name, rows in found.items() if name not in used]
    if unused:
        say(f"{where}: not used: {', '.join(unused)}")


def _used(rows: Dataset) -> list[str]:
    """The classes that rows have."""
    names = class_names(rows)
    counts = count_keys(label_keys(rows), len(names))
    return [name for name, count in zip(names, counts.tolist(), strict=True) if count]


def _without_unused(splits: dict[str, Dataset], where: str) -> dict[str, Dataset]:
    """Rows with the names of those classes alone that any of them has."""
    names = class_names(splits["train"])
    used = {name for rows in splits.values() for name in _used(rows)}
    unused = [name for name in names if name not in used]
    if not unused or SHARES in splits["train"].column_names:  # shares may tell of classes that are nowhere the largest
        return splits
    shown = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
    warn(f"{where}: left out {'classes' if len(unused) > 1 else 'a class'} that no image of the splits has: {shown}")
    kept = [name for name in names if name in used]
    return {split: relabelled(rows, kept) for split, rows in splits.items()}


def read_source(spec: DataSpec, data: DatasetDict | None = None) -> Source:
    """What the source itself holds, as it is: rows without a label have -1, classes may have no row.

    Args:
        spec: The recipe's data section.
        data: Data already in memory; replaces `spec.source`. Its format or transform is not applied.

    Raises:
        DataError: If the source can't be read.
    """
    if data is not None:
        return standardize(_tables_in(data), spec, "data")
    path = Path(expanded(spec.source))
    if path.is_dir():
        return _read_folder(path, spec)
    if path.is_file():
        return _read_file(path, spec)
    missing = missing_source(spec.source)
    if missing is not None:
        raise DataError(f"data.source: {missing}")
    looked = f"{spec.source} is no folder or file here ({looked_for(path)})"
    problem = hub_problem(spec.source, "dataset", spec.revision)
    if problem is not None:
        raise DataError(f"data.source: {looked}, and {problem}")
    try:
        loaded = load(spec.source, spec.source, spec.config, revision=spec.revision)
    except DataError as error:
        raise DataError(f"{error}; {looked}") from error
    return standardize(_tables_in(loaded), spec, spec.source)


def _tables_in(source: DatasetDict) -> dict[str, Table]:
    return {str(split): Table(part.with_format(None)) for split, part in source.items()}


def _read_file(file: Path, spec: DataSpec) -> Source:
    """One file: a table of paths or images, or a tar file."""
    refuse_unused(spec, ("config", "revision"), f"{file} is a file")
    ending = file.suffix.lower()
    if ending in (*TEXT_TABLES, ".parquet"):
        return _read_tables({"train": file}, spec, file.parent)
    if ending == ".tar":
        return _read_shards({"train": [file]}, file.parent, spec)
    raise DataError(
        f"data.source: {spec.source} is a {ending or 'nameless'} file; allowed: a folder, a table "
        f"({', '.join(TEXT_TABLES)}, .parquet), a .tar file or a Hub id{advice_for([file])}"
    )


def _read_folder(folder: Path, spec: DataSpec) -> Source:
    if any((folder / name).is_file() for name in _SAVED):
        return _read_saved(folder, spec)
    tables = metadata_files(folder)
    if tables:
        return _read_metadata(folder, tables, spec)
    if holds_images(folder):
        return read_images(folder, spec)
    if is_output(folder):
        raise DataError(f"data.source: {spec.source} holds a run or a model, and no images; name the folder of images")
    tables = table_files(folder, (".parquet",))
    if tables:
        found = standardize(_tables_in(_load_tables(folder, tables, spec)), spec, spec.source)
        return dataclasses.replace(found, shards=0 if _has_card(folder) else len(tables))
    tables = table_files(folder, TEXT_TABLES)
    if tables:
        return _read_text_tables(folder, tables, spec)
    shards = tar_files(folder)
    if shards:
        return _read_shards(splits_of(folder, shards), folder, spec)
    saved = next((file for file in visible_files(folder) if file.name in _SAVED), None)
    if saved is not None:
        raise DataError(f"data.source: a saved data set lies in {saved.parent}; name that folder")
    return read_class_folders(folder, spec, find_layout(folder))


def _read_saved(folder: Path, spec: DataSpec) -> Source:
    """What `save_to_disk` wrote."""
    refuse_unused(spec, ("config", "revision", "image_folder"), f"{folder} is a saved data set")
    try:
        loaded = load_from_disk(str(folder))
    except Exception as error:  # pyarrow, JSON and the file system raise their own
        raise DataError(
            f"data.source: {spec.source} can't be loaded as a saved data set: {reason_of(error)}"
        ) from error
    splits = loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})
    return standardize(_tables_in(splits), spec, spec.source)


def _read_metadata(folder: Path, files: Sequence[Path], spec: DataSpec) -> Source:
    """Tables that lie beside their images: of the whole folder, or of its split folders."""
    refuse_unused(spec, ("config", "revision", "image_folder"), f"{folder} is a folder of images")
    if files[0].parent == folder:
        if len(files) > 1:
            shown = ", ".join(file.relative_to(folder).as_posix() for file in files)
            raise DataError(f"{folder}: found {shown}; allowed: one table for the folder, or one in each split folder")
        return _read_tables({"train": files[0]}, spec, folder)
    names = split_names(path.name for path in filled_subfolders(folder))
    tables = {names.get(file.parent.name, file.parent.name): file for file in files}
    lacking = [name for name in names.values() if name not in tables]
    if lacking:
        raise DataError(f"{folder}: found tables in {', '.join(tables)} and none in {', '.join(lacking)}; add one")
    return _read_tables(tables, spec, folder, depth=1)


def _read_tables(files: Mapping[str, Path], spec: DataSpec, root: Path, *, depth: int = 0) -> Source:
    """Tables of paths by split; paths begin at `image_folder`, else beside the table; files are named below `root`."""
    images = spec.image_folder and Path(expanded(spec.image_folder))
    if images and not images.is_dir():
        raise DataError(f"data.image_folder: {missing_path(str(spec.image_folder))}")
    tables = {}
    for split, file in files.items():
        base = images or file.parent
        rows, spec = find_images(read_table(file), base, spec, file)
        tables[split] = Table(rows, base, depth)
    return standardize(tables, spec, spec.source, root=images or root)


def _load_tables(folder: Path, tables: list[Path], spec: DataSpec) -> DatasetDict:
    """Parquet files as the folder's card describes them, else in splits that their names tell."""
    if _has_card(folder):
        if spec.config is None:
            check_numbering(spec.source, tables)
        return load(spec.source, str(folder), spec.config)
    return load_parquet(spec.source, splits_of(folder, tables))


def _has_card(folder: Path) -> bool:
    """Whether a card says which files are whose."""
    card = folder / "README.md"
    found = card.is_file() and re.search(r"^(configs|dataset_info):", card.read_text("utf-8", "replace"), re.MULTILINE)
    return bool(found)


def _read_text_tables(folder: Path, files: Sequence[Path], spec: DataSpec) -> Source:
    refuse_unused(spec, ("config", "revision"), f"{folder} is a folder of tables")
    splits = splits_of(folder, files)
    for named in splits.values():
        if len(named) > 1:
            shown = ", ".join(file.relative_to(folder).as_posix() for file in named)
            raise DataError(f"{folder}: {shown} are tables of one split; allowed: one each, called like the split")
    return _read_tables({split: named[0] for split, named in splits.items()}, spec, folder)


def _read_shards(files: Mapping[str, Sequence[Path]], root: Path, spec: DataSpec) -> Source:
    """Images in tar files."""
    refuse_unused(spec, ("config", "revision", "image_column", "image_folder"), f"{spec.source} holds tar files")
    tables = {split: _shard_table(list(named), root, spec) for split, named in files.items()}
    found = standardize(tables, dataclasses.replace(spec, image_column="image"), spec.source, root=root)
    return dataclasses.replace(found, shards=sum(map(len, files.values())))


def _shard_table(files: list[Path], root: Path, spec: DataSpec) -> Table:
    rows = read_tars(files, root)
    if set(rows.column_names) <= {"image", "file", CLASS_FOLDER} and not any(rows[CLASS_FOLDER][:]):
        if spec.label_column != CLASS_FOLDER:
            raise DataError(
                f"{spec.source}: the tar files hold images without labels; allowed: 1.cls, 1.txt or 1.json beside "
                "1.jpg, class folders, or data.label_column=class_folder, which takes the tar files' names as classes"
            )
        names = [file.rpartition(".tar/")[0].rpartition("/")[2] for file in rows["file"][:]]
        rows = rows.remove_columns(CLASS_FOLDER).add_column(CLASS_FOLDER, names, feature=Value("string"))
    return Table(rows, root, names="file")


def _check_classes(data: ImageData, where: str) -> None:
    if len(data.labels) < 2:
        within = next(
            (path for label in data.labels for path in (Path(where, label), Path(where)) if path.is_dir()), None
        )
        deeper = [] if within is None else [child.name for child in subfolders(within)]
        while within and len(deeper) == 1:  # flowers/flowers/rose
            within = within / deeper[0]
            deeper = [child.name for child in subfolders(within)]
        hint = f"; where its folders are the classes ({', '.join(deeper[:3])}), say data.source={within}"
        raise DataError(
            f"{where}: found the class {', '.join(data.labels)} only; a classifier needs at least two"
            f"{hint if len(deeper) > 1 else ''}"
        )
    for split, rows in data.splits.items():
        if len(rows) == 0:
            carved = f": {len(data.splits['train'])} are too few to take some out of" if split in data.carved else ""
            raise DataError(
                f"{where}: the split {split!r} holds no images{carved}; add some, or do without it "
                f"(data.splits.{split}=null)"
            )
    empty = [label for label, count in data.counts("train").items() if count == 0]
    if empty:
        raise DataError(
            f"{where}: no training images of the class {', '.join(empty)}, which other splits have; add some, or "
            "leave those images out"
        )
