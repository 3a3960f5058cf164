"""A source named in a recipe -> train, validation and test rows with label names; reads no pixel.

A reader for the kind of source makes a `Table`, `make_rows` a `Source` of it, and `choose_splits` the `ImageData`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets

from hfft.data.sources.advice import advice_for, missing_path, refuse_unused
from hfft.data.sources.class_folders import read_class_folders
from hfft.data.sources.datasets_library import SAVED, TABLES, read_hub, read_memory, read_parquet_folder, read_saved
from hfft.data.sources.folders import files_ending, holds_images, is_output, subfolders, visible_files
from hfft.data.sources.image_tables import read_images
from hfft.data.sources.labels import (
    SOFT_LABELS,
    alike_classes,
    class_names,
    count_keys,
    is_multi_label,
    known_as,
    label_array,
    label_keys,
    relabelled,
)
from hfft.data.sources.layout import files_by_split, find_layout
from hfft.data.sources.path_tables import metadata_files, read_metadata, read_path_tables, read_text_tables
from hfft.data.sources.rows import Source, make_rows
from hfft.data.sources.splits import existing_split, plan_splits, rows_to_measure, split_rows
from hfft.data.sources.table import Table
from hfft.data.sources.text_tables import TEXT_TABLES
from hfft.data.sources.webdataset import read_shards
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec
from hfft.runs.record import RunRecord
from hfft.system.distributed import inform, warn
from hfft.system.files import expanded


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
        labels = label_array(self.splits[split])
        found = labels.sum(axis=0, dtype=int) if labels.ndim == 2 else np.bincount(labels, minlength=len(self.labels))
        return {label: int(count) for label, count in zip(self.labels, found, strict=True)}


def load_data(spec: DataSpec, seed: int, data: DatasetDict | None = None) -> ImageData:
    """Find the images of a recipe and split them: `read_source` and `choose_splits` at once.

    Args:
        spec: The recipe's data section.
        seed: Decides which images a carved split takes.
        data: Data already in memory; replaces `spec.source`. Its format or transform is not applied.

    Raises:
        DataError: If the source can't be found, or has no images, labels or splits as asked.
    """
    return choose_splits(read_source(spec, data), spec, seed)


def choose_splits(source: Source, spec: DataSpec, seed: int) -> ImageData:
    """Split what a source holds, and check that there is something to train on.

    Classes that no image of the chosen splits has are left out.

    Raises:
        DataError: If there are no splits as asked, or too few classes, or one without training images.
    """
    where = source.name
    plan = plan_splits(source.splits, spec.splits, where)
    for folder in source.empty.get(plan.named["train"], ()):
        raise DataError(f"{folder}: the class folder holds no images; add some or remove the folder")
    splits = split_rows(source.splits, plan, seed=seed, where=where, max_per_class=spec.max_per_class)
    _warn_of_empty(source, source.splits)
    unused = [
        f"{name} ({len(rows):,} rows)" for name, rows in source.splits.items() if name not in plan.named.values()
    ]
    if unused:
        inform(f"{where}: not used: {', '.join(unused)}")
    splits = _without_unused_classes(splits, where)
    labels = class_names(splits["train"])
    data = ImageData(splits, labels, source.columns, carved=tuple(plan.carved), shards=source.shards)
    _check_classes(data, where)
    _warn_of_names(labels, where)
    return data


def load_rows(spec: DataSpec, labels: tuple[str, ...], split: str | None = None) -> Dataset:
    """Rows of a labelled source for an existing model, with label indices in the model's order.

    Args:
        spec: Where the images are.
        labels: The model's class names.
        split: One of the source's splits; all of its rows when None.

    Raises:
        DataError: If these rows have classes that the model does not know.
    """
    source = read_source(spec)
    found = source.splits
    if split is not None:
        own = existing_split(found, split, spec.source)
        found = {own: found[own]}
    elif len(found) > 1:
        counts = ", ".join(f"{name} {len(part)}" for name, part in found.items())
        inform(f"{spec.source}: takes all splits together: {counts}; name one to have it alone")
    _warn_of_empty(source, found)
    parts = [rows_to_measure(part, name, spec.source) for name, part in found.items()]
    used = {name for part in parts for name in _used_classes(part)}
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


def _used_classes(rows: Dataset) -> list[str]:
    """The classes that rows have."""
    names = class_names(rows)
    counts = count_keys(label_keys(rows), len(names))
    return [name for name, count in zip(names, counts.tolist(), strict=True) if count]


def _without_unused_classes(splits: dict[str, Dataset], where: str) -> dict[str, Dataset]:
    """Rows with the names of those classes alone that any of them has."""
    names = class_names(splits["train"])
    used = {name for rows in splits.values() for name in _used_classes(rows)}
    unused = [name for name in names if name not in used]
    if not unused or SOFT_LABELS in splits["train"].column_names:  # a class may be nowhere the likeliest
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
    return make_rows(read_memory(data, spec) if data is not None else _read_table(spec), spec.task)


def _read_table(spec: DataSpec) -> Table:
    path = Path(expanded(spec.source))
    if path.is_dir():
        return _read_folder(path, spec)
    return _read_file(path, spec) if path.is_file() else read_hub(spec)


def _read_file(file: Path, spec: DataSpec) -> Table:
    refuse_unused(spec, ("config", "revision"), f"{file} is a file")
    ending = file.suffix.lower()
    if ending in TABLES:
        return read_path_tables({"train": file}, spec, file.parent)
    if ending == ".tar":
        return read_shards({"train": [file]}, file.parent, spec)
    raise DataError(
        f"data.source: {spec.source} is a {ending or 'nameless'} file; allowed: a folder, a table "
        f"({', '.join(TABLES)}), a .tar file or a Hub id{advice_for([file])}"
    )


def _read_folder(folder: Path, spec: DataSpec) -> Table:
    if any((folder / name).is_file() for name in SAVED):
        return read_saved(folder, spec)
    if files := metadata_files(folder):
        return read_metadata(folder, files, spec)
    if holds_images(folder):
        return read_images(folder, spec)
    if is_output(folder):
        raise DataError(f"data.source: {spec.source} holds a run or a model, and no images; name the folder of images")
    if files := files_ending(folder, (".parquet",)):
        return read_parquet_folder(folder, files, spec)
    if files := files_ending(folder, TEXT_TABLES):
        return read_text_tables(folder, files, spec)
    if files := files_ending(folder, (".tar",)):
        return read_shards(files_by_split(folder, files), folder, spec)
    saved = next((file for file in visible_files(folder) if file.name in SAVED), None)
    if saved is not None:
        raise DataError(f"data.source: a saved data set lies in {saved.parent}; name that folder")
    return read_class_folders(folder, spec, find_layout(folder))


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


def _warn_of_names(labels: Collection[str], where: str) -> None:
    """Warn of classes that are called almost alike, or like a missing label."""
    alike = alike_classes(labels)
    if alike:
        shown = "; ".join(" and ".join(map(repr, group)) for group in alike[:5])
        more = f"; and {len(alike) - 5} more" if len(alike) > 5 else ""
        warn(f"{where}: classes are called almost alike: {shown}{more}; rename them if they are one")
    if "-1" in labels:
        warn(f"{where}: -1 is taken for the name of a class; where it means that there is no label, leave it empty")


def images_of_run(folder: Path) -> ImageData:
    """What the recipe of a run finds, without the images that the run left out as they can't be read.

    Those of a folder or a file are not looked for on the Hub, where the same name may be that of somebody's data set.

    Args:
        folder: Of the run; where it was downloaded from the Hub, its recipe alone.

    Raises:
        DataError: If they aren't there any more. Whether they are still the same isn't looked at.
    """
    run = RunRecord(folder)
    recipe, origin = run.recipe, run.environment.get("origin", {}).get("data", {})
    source = recipe.data.source
    if origin.get("kind") == "local" and not Path(expanded(source)).exists():
        raise DataError(f"data.source of {folder}: {missing_path(source)}")
    source = read_source(recipe.data).without([skip["file"] for skip in run.skipped])
    return choose_splits(source, recipe.data, recipe.seed)
