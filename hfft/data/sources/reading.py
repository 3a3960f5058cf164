"""A source named in a recipe -> train, validation and test rows with label names; reads no pixel.

A reader for the kind of source makes a `Table`, `make_rows` a `Source` of it, and `choose_splits` the `ImageData`.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets

from hfft.data.sources.advice import advice_for, missing_path, refuse_unused
from hfft.data.sources.class_folders import read_class_folders
from hfft.data.sources.folders import (
    files_by_split,
    files_ending,
    find_layout,
    holds_images,
    is_output,
    subfolders,
    visible_files,
)
from hfft.data.sources.image_tables import (
    metadata_files,
    read_images,
    read_metadata,
    read_path_tables,
    read_text_tables,
)
from hfft.data.sources.labels import (
    SOFT_LABELS,
    alike_classes,
    class_names,
    count_keys,
    is_multi_label,
    known_as,
    label_keys,
    relabelled,
)
from hfft.data.sources.rows import Source, make_rows
from hfft.data.sources.splits import existing_split, plan_splits, rows_to_measure, split_rows
from hfft.data.sources.table import Table
from hfft.data.sources.table_files import (
    SAVED,
    TABLES,
    TEXT_TABLES,
    read_hub,
    read_memory,
    read_parquet_folder,
    read_saved,
)
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
        found = count_keys(label_keys(self.splits[split]), len(self.labels))
        return dict(zip(self.labels, found.tolist(), strict=True))


def load_data(spec: DataSpec, seed: int, data: DatasetDict | None = None) -> ImageData:
    """Find the images of a recipe, or data in memory, and split them: `read_source` and `choose_splits` at once."""
    return choose_splits(read_source(spec, data), spec, seed)


def read_source(spec: DataSpec, data: DatasetDict | None = None) -> Source:
    """What the source itself, or data in memory, holds: rows without a label have -1, classes may have no row.

    The format or transform of data in memory is not applied. What is wrong with a source is a DataError.
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


def choose_splits(source: Source, spec: DataSpec, seed: int) -> ImageData:
    """Split what a source holds, leave out classes that no image has then, and check that there is enough to train on.

    `seed` decides which images a carved split takes.
    """
    where = source.name
    plan = plan_splits(source.splits, spec.splits, where)
    for folder in source.empty.get(plan.named["train"], ()):
        raise DataError(f"{folder}: the class folder holds no images; add some or remove the folder")
    splits = split_rows(source.splits, plan, seed=seed, where=where, max_per_class=spec.max_per_class)
    _warn_of_empty(source, source.splits)
    used = plan.named.values()
    unused = [f"{name} ({len(rows):,} rows)" for name, rows in source.splits.items() if name not in used]
    if unused:
        inform(f"{where}: not used: {', '.join(unused)}")
    splits = _without_unused_classes(splits, where)
    labels = class_names(splits["train"])
    data = ImageData(splits, labels, source.columns, carved=tuple(plan.carved), shards=source.shards)
    if len(labels) < 2:
        raise _one_class(labels, where)
    _check_counts(data, where)
    _warn_of_names(labels, where)
    return data


def _warn_of_empty(source: Source, splits: Collection[str]) -> None:
    for split in splits:
        for folder in source.empty.get(split, ()):
            warn(f"{folder}: the class folder holds no images")


def _used_classes(parts: Iterable[Dataset]) -> set[str]:
    """The classes that any rows have."""
    used = set()
    for rows in parts:
        names = class_names(rows)
        used.update(names[number] for number in np.flatnonzero(count_keys(label_keys(rows), len(names))))
    return used


def _without_unused_classes(splits: dict[str, Dataset], where: str) -> dict[str, Dataset]:
    """Rows with the names of those classes alone that any of them has."""
    names, used = class_names(splits["train"]), _used_classes(splits.values())
    unused = [name for name in names if name not in used]
    if not unused or SOFT_LABELS in splits["train"].column_names:  # a class may be nowhere the likeliest
        return splits
    shown = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
    warn(f"{where}: left out {'classes' if len(unused) > 1 else 'a class'} that no image of the splits has: {shown}")
    kept = [name for name in names if name in used]
    return {split: relabelled(rows, kept) for split, rows in splits.items()}


def _one_class(labels: Sequence[str], where: str) -> DataError:
    """That there is one class; with the folders in it, which may be meant."""
    problem = f"{where}: found the class {', '.join(labels)} only; a classifier needs at least two"
    within = next((path for label in labels for path in (Path(where, label), Path(where)) if path.is_dir()), None)
    deeper = subfolders(within) if within else []
    while len(deeper) == 1:  # flowers/flowers/rose
        within = deeper[0]
        deeper = subfolders(within)
    if deeper:
        names = ", ".join(path.name for path in deeper[:3])
        problem += f"; where its folders are the classes ({names}), say data.source={within}"
    return DataError(problem)


def _check_counts(data: ImageData, where: str) -> None:
    """Refuse a split without images, and a class without training images."""
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


def load_rows(spec: DataSpec, labels: tuple[str, ...], split: str | None = None) -> Dataset:
    """Rows of all splits of a source, or one, for a model, with label indices in the order of its class names."""
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
    used = _used_classes(parts)
    known = known_as(used, labels)
    unknown = [name for name in class_names(parts[0]) if name in used and name not in known]
    if unknown:
        raise DataError(
            f"{spec.source}: the model does not know the classes {', '.join(unknown)}; it knows {', '.join(labels)}"
        )
    return concatenate_datasets([relabelled(part, labels) for part in parts])


def images_of_run(folder: Path) -> ImageData:
    """What the recipe of a run finds, without the images that the run left out as they can't be read.

    Those of a folder or a file are not looked for on the Hub, where the same name may be that of somebody's data set.
    Whether they are still the same isn't looked at.

    Raises:
        DataError: If they aren't there any more.
    """
    run = RunRecord(folder)
    recipe, origin = run.recipe, run.environment.get("origin", {}).get("data", {})
    source = recipe.data.source
    if origin.get("kind") == "local" and not Path(expanded(source)).exists():
        raise DataError(f"data.source of {folder}: {missing_path(source)}")
    found = read_source(recipe.data).without([skip["file"] for skip in run.skipped])
    return choose_splits(found, recipe.data, recipe.seed)
