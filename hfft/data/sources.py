"""A source named in a recipe -> train, validation and test rows with label names; reads no pixel."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError

from hfft.data.folders import (
    SPLIT_NAMES,
    image_files,
    parquet_files,
    parquet_splits,
    split_folders,
    subfolders,
    warn_of_left_out,
)
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec, SplitSpec
from hfft.remote import hub_problem

CARVED = {"validation": 0.15, "test": 0.15}
_LABEL_NAMES = ("label", "labels", "class", "target", "category")
_LOG = get_logger(__name__)


@dataclass(frozen=True)
class ImageData:
    """Rows of every split; pixels are read later.

    Attributes:
        splits: `train`, and `validation` and `test` where there are any. Each row has `image` (`bytes` and `path`,
            not decoded), `label` (index into `labels`) and `file` (path below the source, or row name).
        labels: Class names, in the order of the label indices.
    """

    splits: Mapping[str, Dataset]
    labels: tuple[str, ...]

    def counts(self, split: str) -> dict[str, int]:
        """Images per class of a split."""
        found = np.bincount(np.asarray(self.splits[split]["label"]), minlength=len(self.labels))
        return {label: int(count) for label, count in zip(self.labels, found, strict=True)}


def load_data(spec: DataSpec, seed: int, source: DatasetDict | None = None) -> ImageData:
    """Find the images of a recipe and split them.

    Args:
        spec: The recipe's data section.
        seed: Decides which images a carved split takes.
        source: Data already in memory; replaces `spec.source`. Its format or transform is not applied.

    Raises:
        DataError: If the source can't be found, or has no images, labels or splits as asked.
    """
    found = _standardize(source, spec, "data") if source is not None else _read(spec)
    where = "data" if source is not None else spec.source
    data = _split(found, spec.splits, seed=seed, where=where)
    _check_classes(data, where)
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
    found = _read(spec)
    if split is not None:
        found = {split: found[_existing_split(found, split, spec.source)]}
    elif len(found) > 1:
        counts = ", ".join(f"{name} {len(part)}" for name, part in found.items())
        PartialState()  # the logger asks it which process this is
        _LOG.info(f"{spec.source}: takes all splits together: {counts}; name one to have it alone")
    ours = next(iter(found.values())).features["label"].names
    used = {value for name, part in found.items() for value in _labelled(part, name, spec.source)["label"][:]}
    unknown = [name for value, name in enumerate(ours) if value in used and name not in labels]
    if unknown:
        raise DataError(
            f"{spec.source}: the model does not know the classes {', '.join(unknown)}; it knows {', '.join(labels)}"
        )
    places = {value: labels.index(ours[value]) for value in used}
    label = ClassLabel(names=list(labels))
    parts = []
    for part in found.values():
        values = [places[value] for value in part["label"][:]]
        parts.append(part.remove_columns("label").add_column("label", values, feature=label))
    return concatenate_datasets(parts)


def _read(spec: DataSpec) -> dict[str, Dataset]:
    folder = Path(spec.source).expanduser()
    if folder.is_dir():
        return _read_folder(folder, spec)
    if folder.exists():
        raise DataError(f"data.source: {spec.source} is a file; allowed: a folder or a Hub id")
    if spec.source.startswith((".", "/", "~")) or spec.source.count("/") > 1:
        raise DataError(f"data.source: the folder {spec.source} does not exist")
    problem = hub_problem(spec.source, "dataset", spec.revision)
    if problem is not None:
        raise DataError(f"data.source: {spec.source} is no folder here, and {problem}")
    loaded = _load(spec.source, spec.source, spec.config, revision=spec.revision)
    return _standardize(loaded, spec, spec.source)


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


def _read_folder(folder: Path, spec: DataSpec) -> dict[str, Dataset]:
    tables = parquet_files(folder)
    if tables:
        return _standardize(_load_tables(folder, tables, spec), spec, spec.source)
    unused = [key for key in ("config", "revision", "image_column", "label_column") if getattr(spec, key) is not None]
    if unused:
        raise DataError(f"data.{unused[0]}: {folder} is a folder of images, which has none; leave it out")
    splits = split_folders(folder)
    names = sorted({child.name for path in splits.values() for child in subfolders(path)})
    if not names:
        raise DataError(f"{folder}: found no class folders; allowed: one folder of images per class")
    warn_of_left_out(folder, splits.values())
    return {split: _class_folder_rows(path, folder, tuple(names)) for split, path in splits.items()}


def _load_tables(folder: Path, tables: list[Path], spec: DataSpec) -> DatasetDict:
    """Parquet files as the folder's card describes them, else in splits that their names tell."""
    card = folder / "README.md"
    if card.is_file() and re.search(r"^(configs|dataset_info):", card.read_text("utf-8", "replace"), re.MULTILINE):
        return _load(spec.source, str(folder), spec.config)
    return _load(spec.source, "parquet", data_files=parquet_splits(folder, tables))


def _class_folder_rows(folder: Path, root: Path, names: tuple[str, ...]) -> Dataset:
    rows = []
    for label, name in enumerate(names):
        files = image_files(folder / name)
        if (folder / name).is_dir() and not files:
            raise DataError(f"{folder / name}: the class folder holds no images; add some or remove the folder")
        rows += [
            {"image": {"path": str(path), "bytes": None}, "label": label, "file": path.relative_to(root).as_posix()}
            for path in files
        ]
    return Dataset.from_list(rows, features=_features(names))


def _features(names: tuple[str, ...]) -> Features:
    return Features({"image": Image(decode=False), "label": ClassLabel(names=list(names)), "file": Value("string")})


def _standardize(source: DatasetDict, spec: DataSpec, where: str) -> dict[str, Dataset]:
    """Any data set with an image and a label column -> splits with our three columns and one list of class names."""
    if not source:
        raise DataError(f"{where}: holds no splits")
    source = source.with_format(None)
    first = next(iter(source.values()))
    image = _column(spec.image_column, _columns_of(first, Image), first, f"{where}: image_column")
    labelled = _columns_of(first, ClassLabel) or [name for name in _LABEL_NAMES if name in first.column_names]
    label = _column(spec.label_column, labelled, first, f"{where}: label_column")
    texts: dict[str, list[str | None]] = {}
    for split, part in source.items():
        if not {image, label} <= set(part.column_names):
            raise DataError(f"{where}: split {split!r} has other columns: {', '.join(part.column_names)}")
        texts[str(split)] = _label_texts(part, label, f"{where}: label_column")
    names = {text: None for column in texts.values() for text in column if text is not None}
    ordered = sorted(names, key=_natural)
    if isinstance(first.features[label], ClassLabel):
        declared = (name for part in source.values() for name in getattr(part.features[label], "names", ()))
        ordered = list(dict.fromkeys([*declared, *ordered]))
    return {
        str(split): _three_columns(part, str(split), image=image, texts=texts[str(split)], names=ordered)
        for split, part in source.items()
    }


def _label_texts(part: Dataset, label: str, where: str) -> list[str | None]:
    """The label of each row as text, whatever its type; None for a row without one."""
    feature = part.features[label]
    if isinstance(feature, ClassLabel):
        return [feature.names[value] if value is not None and value >= 0 else None for value in part[label][:]]
    if isinstance(feature, Value):
        return [None if value is None else str(value) for value in part[label][:]]
    raise DataError(f"{where}: the column {label!r} holds {feature}; allowed: one class per image")


def _three_columns(part: Dataset, split: str, *, image: str, texts: list[str | None], names: list[str]) -> Dataset:
    """Our columns; a row without a label gets -1, which `_labelled` refuses in the splits that are used."""
    kept = part.select_columns([image])
    kept = kept if image == "image" else kept.rename_column(image, "image")
    try:
        kept = kept.cast_column("image", Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's errors derive from these
        raise DataError(f"image_column: the column {image!r} holds {part.features[image]}, not images") from error
    places = {name: place for place, name in enumerate(names)}
    values = [-1 if text is None else places[text] for text in texts]
    width = len(str(max(len(part) - 1, 1)))
    kept = kept.add_column("label", values, feature=ClassLabel(names=names))
    return kept.add_column("file", [f"{split}/{row:0{width}d}" for row in range(len(part))], feature=Value("string"))


def _columns_of(dataset: Dataset, feature: type) -> list[str]:
    return [name for name, kind in dataset.features.items() if isinstance(kind, feature)]


def _column(asked: str | None, candidates: list[str], dataset: Dataset, where: str) -> str:
    if asked is not None:
        if asked not in dataset.column_names:
            raise DataError(f"{where}: found {asked!r}; allowed: {', '.join(dataset.column_names)}")
        return asked
    if len(candidates) == 1:
        return candidates[0]
    found = f"several fit ({', '.join(candidates)})" if candidates else "none fits"
    raise DataError(f"{where}: {found}; name one of {', '.join(dataset.column_names)}")


def _natural(text: str) -> tuple[int, int, str]:
    return (0, int(text), "") if text.isdecimal() else (1, 0, text)


def _existing_split(found: Mapping[str, Any], wanted: str, where: str) -> str:
    aliases = SPLIT_NAMES.get(wanted, (wanted,))
    fitting = [wanted] if wanted in found else [name for name in found if name.lower() in aliases]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise DataError(f"{where}: several splits could be {wanted!r}: {', '.join(fitting)}; name the one you mean")
    raise DataError(f"{where}: there is no split {wanted!r}; found: {', '.join(found)}")


def _labelled(rows: Dataset, split: str, where: str) -> Dataset:
    """The rows as they are; an error if any has no label."""
    missing = np.flatnonzero(np.asarray(rows["label"]) < 0)
    if len(missing):
        raise DataError(
            f"{where}: split {split!r}: no label in {len(missing)} of {len(rows)} rows, the first is row {missing[0]}"
        )
    return rows


def _split(found: dict[str, Dataset], spec: SplitSpec, *, seed: int, where: str) -> ImageData:
    name = _existing_split(found, spec.train, where)
    train = _labelled(found[name], name, where)
    labels = tuple(train.features["label"].names)
    splits: dict[str, Dataset] = {}
    fractions: dict[str, float] = {}
    used = {name: "train"}
    for name, wanted in (("validation", spec.validation), ("test", spec.test)):
        has_own = any(alias in (split.lower() for split in found) for alias in SPLIT_NAMES[name])
        if wanted == "auto":
            wanted = name if has_own else CARVED[name]
        if isinstance(wanted, float):
            fractions[name] = wanted
        elif wanted is not None:
            chosen = _existing_split(found, str(wanted), where)
            if chosen in used:
                raise DataError(f"data.splits.{name}: {chosen!r} is used for {used[chosen]} already")
            used[chosen] = name
            splits[name] = _labelled(found[chosen], chosen, where)
    splits.update(_carve(train, fractions, seed))
    ordered = {name: splits[name] for name in ("train", "validation", "test") if name in splits}
    return ImageData(splits=ordered, labels=labels)


def _carve(train: Dataset, fractions: dict[str, float], seed: int) -> dict[str, Dataset]:
    """Take the fractions out of train, class by class, and leave the rest; order is kept within each part."""
    labels = np.asarray(train["label"])
    rng = np.random.default_rng(seed)
    taken: dict[str, list[int]] = {name: [] for name in fractions}
    kept: list[int] = []
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        start = 0
        for name, fraction in fractions.items():
            # At least one row of a class that can spare it, and never the last one.
            count = min(max(round(fraction * len(rows)), 1), len(rows) - start - 1)
            taken[name] += rows[start : start + count].tolist()
            start += count
        kept += rows[start:].tolist()
    return {name: train.select(sorted(rows)) for name, rows in {"train": kept, **taken}.items()}


def _check_classes(data: ImageData, where: str) -> None:
    if len(data.labels) < 2:
        raise DataError(f"{where}: found the class {', '.join(data.labels)} only; a classifier needs at least two")
    for split, rows in data.splits.items():
        if len(rows) == 0:
            raise DataError(f"{where}: the split {split!r} holds no images")
    empty = [label for label, count in data.counts("train").items() if count == 0]
    if empty:
        raise DataError(f"{where}: no training images of the class {', '.join(empty)}")
