"""A source named in a recipe -> train, validation and test rows with label names; reads no pixel."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset
from PIL import Image as PillowImage

from hfft.errors import DataError
from hfft.recipe.spec import DataSpec

# Names under which folders and data sets on the Hub keep a split, by the name used here.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
CARVED = {"validation": 0.15, "test": 0.15}
_LABEL_NAMES = ("label", "labels", "class", "target", "category")


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
        source: Data already in memory; replaces `spec.source`.

    Raises:
        DataError: If the source can't be found, or has no images, labels or splits as asked.
    """
    found = _standardize(source, spec, "data") if source is not None else _read(spec)
    data = _split(found, spec, seed)
    _check_classes(data, spec.source)
    return data


def load_rows(spec: DataSpec, labels: tuple[str, ...], split: str | None = None) -> Dataset:
    """Rows of a labelled source for an existing model, with label indices in the model's order.

    Args:
        spec: Where the images are.
        labels: The model's class names.
        split: One of the source's splits; all of its rows when None.

    Raises:
        DataError: If the source has classes that the model does not know.
    """
    found = _read(spec)
    if split is not None:
        found = {split: found[_existing_split(found, split, spec.source)]}
    ours = next(iter(found.values())).features["label"].names
    unknown = [name for name in ours if name not in labels]
    if unknown:
        raise DataError(
            f"{spec.source}: the model does not know the classes {', '.join(unknown)}; it knows {', '.join(labels)}"
        )
    rows: list[Any] = [row for part in found.values() for row in part]
    features = _features(labels)
    return Dataset.from_list([{**row, "label": labels.index(ours[row["label"]])} for row in rows], features=features)


def _read(spec: DataSpec) -> dict[str, Dataset]:
    folder = Path(spec.source).expanduser()
    if folder.is_dir():
        return _read_folder(folder, spec)
    if folder.exists():
        raise DataError(f"data.source: {spec.source} is a file; allowed: a folder or a Hub id")
    if spec.source.startswith((".", "/", "~")) or spec.source.count("/") > 1:
        raise DataError(f"data.source: the folder {spec.source} does not exist")
    return _standardize(_load(spec, spec.source, spec.config), spec, spec.source)


def _load(spec: DataSpec, path: str, config: str | None) -> DatasetDict:
    try:
        loaded = load_dataset(path, config, revision=spec.revision)
    except Exception as error:  # datasets raises its own, huggingface_hub's, pyarrow's and plain ValueErrors here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"data.source: {path} is no folder here, and the Hub gave no data set of that name: {reason}"
        ) from error
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})


def _read_folder(folder: Path, spec: DataSpec) -> dict[str, Dataset]:
    if any(folder.rglob("*.parquet")):
        return _standardize(_load(spec, str(folder), None), spec, spec.source)
    children = _subfolders(folder)
    splits = {path.name: path for path in children}
    if not _are_splits(children):
        splits = {"train": folder}
    names = sorted({child.name for path in splits.values() for child in _subfolders(path)})
    if not names:
        raise DataError(f"{folder}: found no class folders; allowed: one folder of images per class")
    return {split: _class_folder_rows(path, folder, tuple(names)) for split, path in splits.items()}


def _are_splits(children: list[Path]) -> bool:
    """Folders are splits only when every one of them is called like a split, one is train, and all hold folders."""
    known = {name for names in SPLIT_NAMES.values() for name in names}
    called = {path.name.lower() for path in children}
    is_split_layout = called <= known and any(name in called for name in SPLIT_NAMES["train"])
    return is_split_layout and all(_subfolders(path) for path in children)


def _class_folder_rows(folder: Path, root: Path, names: tuple[str, ...]) -> Dataset:
    readable = PillowImage.registered_extensions()
    rows = []
    for label, name in enumerate(names):
        files = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in readable)
        files = [path for path in files if not path.name.startswith(".") and path.is_file()]
        if (folder / name).is_dir() and not files:
            raise DataError(f"{folder / name}: the class folder holds no images; add some or remove the folder")
        rows += [
            {"image": {"path": str(path), "bytes": None}, "label": label, "file": path.relative_to(root).as_posix()}
            for path in files
        ]
    return Dataset.from_list(rows, features=_features(names))


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _features(names: tuple[str, ...]) -> Features:
    return Features({"image": Image(decode=False), "label": ClassLabel(names=list(names)), "file": Value("string")})


def _standardize(source: DatasetDict, spec: DataSpec, where: str) -> dict[str, Dataset]:
    """Any data set with an image and a label column -> splits with our three columns and one list of class names."""
    first = next(iter(source.values()))
    image = _column(spec.image_column, _columns_of(first, Image), first, f"{where}: image_column")
    labelled = _columns_of(first, ClassLabel) or [name for name in _LABEL_NAMES if name in first.column_names]
    label = _column(spec.label_column, labelled, first, f"{where}: label_column")
    feature = first.features[label]
    if isinstance(feature, ClassLabel):
        names = list(feature.names)
    else:
        names = sorted({str(value) for part in source.values() for value in part.unique(label)}, key=_natural)
    return {str(split): _three_columns(part, str(split), image, label, tuple(names)) for split, part in source.items()}


def _three_columns(part: Dataset, split: str, image: str, label: str, names: tuple[str, ...]) -> Dataset:
    values = part[label][:]
    if not isinstance(part.features[label], ClassLabel):
        values = [names.index(str(value)) for value in values]
    unlabelled = [row for row, value in enumerate(values) if value is None or not 0 <= value < len(names)]
    if unlabelled:
        raise DataError(f"split {split!r}: {len(unlabelled)} rows have no label, the first is row {unlabelled[0]}")
    kept = part.select_columns([image]).rename_column(image, "image").cast_column("image", Image(decode=False))
    width = len(str(max(len(part) - 1, 1)))
    kept = kept.add_column("label", values, feature=ClassLabel(names=list(names)))
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
    return (0, int(text), "") if text.isdigit() else (1, 0, text)


def _existing_split(found: Mapping[str, Any], wanted: str, where: str) -> str:
    aliases = SPLIT_NAMES.get(wanted, (wanted,))
    for name in found:
        if name == wanted or name.lower() in aliases:
            return name
    raise DataError(f"{where}: there is no split {wanted!r}; found: {', '.join(found)}")


def _split(found: dict[str, Dataset], spec: DataSpec, seed: int) -> ImageData:
    train = found[_existing_split(found, spec.splits.train, spec.source)]
    labels = tuple(train.features["label"].names)
    splits: dict[str, Dataset] = {}
    fractions: dict[str, float] = {}
    for name, wanted in (("validation", spec.splits.validation), ("test", spec.splits.test)):
        has_own = any(alias in (split.lower() for split in found) for alias in SPLIT_NAMES[name])
        if wanted == "auto":
            wanted = name if has_own else CARVED[name]
        if isinstance(wanted, float):
            fractions[name] = wanted
        elif wanted is not None:
            splits[name] = found[_existing_split(found, str(wanted), spec.source)]
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
