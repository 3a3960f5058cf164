"""Rows by the splits of a source -> train, validation and test: named, carved, or folds; stratified and seeded."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from hfft.data.sources.folders import SPLIT_NAMES
from hfft.data.sources.labels import is_multi_label, label_array, lacks_label
from hfft.errors import DataError
from hfft.recipe.spec import SplitSpec
from hfft.recipe.values import Fold
from hfft.system.distributed import inform

CARVED = {"validation": 0.15, "test": 0.15}
_GROUP = "group"  # column of a table of rows; needed for splitting alone


@dataclass(frozen=True)
class SplitPlan:
    """Where the splits of a run come from: the source's own splits, or a fraction or fold taken out of train."""

    named: dict[str, str]
    carved: dict[str, float | Fold]


def plan_splits(found: Collection[str], spec: SplitSpec, where: str) -> SplitPlan:
    """Match what is asked for with the source's own splits; `auto` carves a split only where the source has none."""
    named, carved = {"train": existing_split(found, spec.train, where)}, {}
    for name, wanted in (("validation", spec.validation), ("test", spec.test)):
        has_own = any(split.lower() in SPLIT_NAMES[name] for split in found)
        if wanted == "auto":
            wanted = name if has_own else CARVED[name]
        if isinstance(wanted, float | Fold):
            carved[name] = wanted
        elif wanted is not None:
            chosen = existing_split(found, str(wanted), where)
            used = next((split for split, other in named.items() if other == chosen), None)
            if used is not None:
                raise DataError(f"data.splits.{name}: {chosen!r} is used for {used} already")
            named[name] = chosen
    return SplitPlan(named, carved)


def split_rows(
    found: Mapping[str, Dataset], plan: SplitPlan, *, seed: int, where: str, max_per_class: int | None = None
) -> dict[str, Dataset]:
    """The splits of a run, of rows by the source's own split names.

    What is carved from train is a function of its rows and the seed: fewer training images per class, or another
    test split, leave validation as it is. Rows with a column `group` are never divided within a group.
    """
    own = plan.named["train"]
    _check_labelled(found[own], own, where)
    train = _first_rows(found[own])
    splits = {
        name: rows_to_measure(found[split], split, where) for name, split in plan.named.items() if name != "train"
    }
    _check_groups(train, splits, where)
    splits |= _carve(train, plan.carved, seed, where)
    if max_per_class is not None:
        if is_multi_label(train):
            raise DataError(
                f"{where}: data.max_per_class: an image with several labels counts for several classes; leave it out"
            )
        splits["train"] = splits["train"].select(_at_most(label_array(splits["train"]), max_per_class, seed))
    if len(train) < len(found[own]):
        splits["train"] = _with_repeats(splits["train"], found[own], own, where)
    chosen = {name: splits[name] for name in ("train", "validation", "test") if name in splits}
    return {name: rows.remove_columns(list({_GROUP} & set(rows.column_names))) for name, rows in chosen.items()}


def existing_split(found: Collection[str], wanted: str, where: str) -> str:
    """The source's name of a split: the same, or another word for it."""
    aliases = SPLIT_NAMES.get(wanted.lower(), (wanted.lower(),))
    fitting = [wanted] if wanted in found else [name for name in found if name.lower() in aliases]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise DataError(f"{where}: several splits could be {wanted!r}: {', '.join(fitting)}; name the one you mean")
    raise DataError(f"{where}: there is no split {wanted!r}; found: {', '.join(found)}")


def rows_to_measure(rows: Dataset, split: str, where: str) -> Dataset:
    """The rows of a split, which all have a label, each image once."""
    _check_labelled(rows, split, where)
    firsts = _first_rows(rows)
    if len(firsts) < len(rows):
        inform(f"{where}: left out {len(rows) - len(firsts)} of {len(rows)} rows of {split!r}, which repeat an image")
    return firsts


def _check_labelled(rows: Dataset, split: str, where: str) -> None:
    missing = np.flatnonzero(lacks_label(rows))
    if len(missing):
        first = rows[int(missing[0])]["file"]
        raise DataError(
            f"{where}: split {split!r}: no label in {len(missing)} of {len(rows)} rows, the first is row "
            f"{missing[0]} ({first}); fill them in"
            f"{', or leave the split out, such as data.splits.test=null' if len(missing) == len(rows) else ''}"
        )


def _first_rows(rows: Dataset) -> Dataset:
    """The first row of each image."""
    files = rows["file"][:]
    places = {file: len(files) - 1 - place for place, file in enumerate(reversed(files))}
    return rows if len(places) == len(files) else rows.select(sorted(places.values()))


def _with_repeats(train: Dataset, every: Dataset, own: str, where: str) -> Dataset:
    """All rows of the images that are left for training, with a word."""
    chosen = set(train["file"][:])
    rows = every.select([row for row, file in enumerate(every["file"][:]) if file in chosen])
    inform(
        f"{where}: {len(rows) - len(train)} of {len(rows)} training rows of {own!r} repeat an image, which is "
        "trained on as often; the keys sampler and data.weight_column do such things without more rows"
    )
    return rows


def _check_groups(train: Dataset, others: Mapping[str, Dataset], where: str) -> None:
    """Splits that the source made must not divide groups either."""
    if _GROUP not in train.column_names:
        return
    ours = set(train[_GROUP][:])
    for name, rows in others.items():
        common = sorted(ours & set(rows[_GROUP][:]))
        if common:
            raise DataError(
                f"{where}: data.group_column: {len(common)} groups have images in train and in {name}, the first is "
                f"{common[0]!r}; carve {name} from train instead (data.splits.{name}=0.15), or leave group_column out"
            )


def _carve(train: Dataset, carved: Mapping[str, float | Fold], seed: int, where: str) -> dict[str, Dataset]:
    """Take splits out of train and leave the rest; order is kept within each part. Folds are taken first."""
    labels = label_array(train)
    groups = np.asarray(train[_GROUP][:]) if _GROUP in train.column_names else None
    rest = np.arange(len(train))
    taken: dict[str, np.ndarray] = {}
    for name, fold in carved.items():
        if isinstance(fold, Fold):
            numbers = _folds(labels[rest], None if groups is None else groups[rest], fold.of, seed)
            taken[name] = rest[numbers == fold.fold]
            rest = rest[numbers != fold.fold]
    fractions = {name: fraction for name, fraction in carved.items() if isinstance(fraction, float)}
    if groups is not None:  # fractions of the classes are met as well as groups allow
        wanted = np.asarray([1 - sum(fractions.values()), *fractions.values()])
        numbers = _assign_groups(labels[rest], groups[rest], wanted, seed)
        parts = {name: np.flatnonzero(numbers == number) for number, name in enumerate(["train", *fractions])}
    elif labels.ndim == 2:
        parts = _carve_multi_label(labels[rest], fractions, seed)
    else:
        parts = _carve_rows(labels[rest], fractions, seed)
    taken |= {name: rest[places] for name, places in parts.items()}
    if groups is not None and any(len(places) == 0 for places in taken.values()):
        raise DataError(
            f"{where}: data.group_column: {len(set(groups))} groups are too few, or too uneven, for the splits "
            f"{', '.join(taken)}; ask for fewer splits or folds"
        )
    return {name: train.select(places) for name, places in taken.items()}


def _carve_rows(labels: np.ndarray, fractions: Mapping[str, float], seed: int) -> dict[str, np.ndarray]:
    """Places of the rows that each split takes, class by class; what is left is `train`."""
    rng = np.random.default_rng(seed)
    taken: dict[str, list[int]] = {"train": [], **{name: [] for name in fractions}}
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        start = 0
        for name, fraction in fractions.items():
            # At least one row of a class that can spare it, and never the last one.
            count = min(max(round(fraction * len(rows)), 1), len(rows) - start - 1)
            taken[name] += rows[start : start + count].tolist()
            start += count
        taken["train"] += rows[start:].tolist()
    return {name: np.sort(np.asarray(rows, dtype=np.int64)) for name, rows in taken.items()}


def _folds(labels: np.ndarray, groups: np.ndarray | None, count: int, seed: int) -> np.ndarray:
    """Number of the fold of each row, (N,): classes are spread evenly over all folds, groups are kept in one."""
    if groups is not None:
        return _assign_groups(labels, groups, np.full(count, 1 / count), seed)
    if labels.ndim == 2:
        targets = np.tile(labels.sum(axis=0) / count, (count, 1))
        return _assign_multi_label(labels, targets, np.full(count, 1 / count), seed)
    rng = np.random.default_rng(seed)
    folds = np.empty(len(labels), dtype=np.int64)
    start = 0  # where the class before ended, so that small classes don't all begin in the first fold
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        folds[rows] = (start + np.arange(len(rows))) % count
        start += len(rows)
    return folds


def _assign_groups(labels: np.ndarray, groups: np.ndarray, fractions: np.ndarray, seed: int) -> np.ndarray:
    """Number of the part of each row, (N,); whole groups, the largest first, go where their classes lack most.

    `labels` is (N,), or (N, K) of 0 and 1; `groups` is (N,); `fractions` of the parts is (P,).
    """
    names, numbers = np.unique(groups, return_inverse=True)
    if labels.ndim == 2:  # with a class that all images are of, so that those without a label are shared out too
        present = np.column_stack([labels[:, labels.any(axis=0)], np.ones(len(labels))])
    else:
        classes, columns = np.unique(labels, return_inverse=True)
        present = np.eye(len(classes))[columns]  # (N, K)
    counts = np.zeros((len(names), present.shape[1]))
    np.add.at(counts, numbers, present)
    totals = counts.sum(axis=0)  # (K,)
    lacking = fractions[:, None] * totals  # (P, K)
    parts = np.empty(len(names), dtype=np.int64)
    order = np.random.default_rng(seed).permutation(len(names))
    for group in order[np.argsort(-counts[order].sum(axis=1), kind="stable")]:
        # How much less far from its target each part would be, in squared fractions of the class.
        gain = ((lacking**2 - (lacking - counts[group]) ** 2) / totals**2).sum(axis=1)  # (P,)
        parts[group] = int(np.argmax(gain))
        lacking[parts[group]] -= counts[group]
    return parts[numbers]


def _at_most(labels: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Places of `most` rows of each class, in order; more of them for a larger `most`, never others."""
    rng = np.random.default_rng(seed)
    kept = [rng.permutation(np.flatnonzero(labels == label))[:most] for label in np.unique(labels)]
    return np.sort(np.concatenate(kept))


# Multi-label data: iterative stratification (Sechidis et al., On the stratification of multi-label data, ECML PKDD
# 2011). The label with the fewest images left is shared out first, image by image, to the part that lacks it most.


def _carve_multi_label(labels: np.ndarray, fractions: Mapping[str, float], seed: int) -> dict[str, np.ndarray]:
    """As `_carve_rows`, of labels (N, K) of 0 and 1; one split after the other, so that the first ignores the second.

    Each takes at least one image of a label that can spare it, and train is left with one, as far as the other labels
    of the images allow it.
    """
    rest = np.arange(len(labels))
    taken: dict[str, np.ndarray] = {}
    for number, (name, fraction) in enumerate(fractions.items()):
        counts = labels[rest].sum(axis=0, dtype=int)  # (K,)
        wanted = np.clip(np.round(fraction * labels.sum(axis=0)), 1, np.maximum(counts - 1, 0))
        rate = min(fraction * len(labels) / len(rest), 1.0)
        targets = np.stack([counts - wanted, wanted])
        parts = _assign_multi_label(labels[rest], targets, np.asarray([1 - rate, rate]), seed + number)
        parts[_kept_back(labels[rest], parts)] = 0
        taken[name], rest = rest[parts == 1], rest[parts == 0]
    return {"train": rest, **taken}


def _assign_multi_label(labels: np.ndarray, targets: np.ndarray, fractions: np.ndarray, seed: int) -> np.ndarray:
    """Number of the part of each image, (N,).

    `labels` is (N, K) of 0 and 1, `targets` the images of each label that each part is to have, (P, K), and
    `fractions` those of all images, (P,), which sum to 1.
    """
    rng = np.random.default_rng(seed)
    lacking, room = targets.astype(float), fractions * len(labels)  # (P, K), (P,)
    parts = np.full(len(labels), -1)
    left = labels.sum(axis=0, dtype=int)  # images of each label that are in no part yet
    present = labels.astype(bool)
    while left.any():
        label = int(np.argmin(np.where(left > 0, left, np.iinfo(int).max)))
        for row in rng.permutation(np.flatnonzero(present[:, label] & (parts < 0))).tolist():
            part = _neediest(lacking[:, label], room, rng)
            parts[row] = part
            lacking[part] -= labels[row]
            room[part] -= 1
            left -= labels[row]
    for row in rng.permutation(np.flatnonzero(parts < 0)).tolist():  # images of none of the labels
        part = _neediest(room, room, rng)
        parts[row] = part
        room[part] -= 1
    return parts


def _neediest(lacking: np.ndarray, room: np.ndarray, rng: np.random.Generator) -> int:
    """The part that lacks most of a label; of equals the one with most room, and of those any."""
    most = np.flatnonzero(lacking == lacking.max())
    most = most[room[most] == room[most].max()]
    return int(most[0] if len(most) == 1 else rng.choice(most))


def _kept_back(labels: np.ndarray, parts: np.ndarray) -> list[int]:
    """Images that have to stay in part 0, as it would have none of a label otherwise."""
    lost = np.flatnonzero(labels.any(axis=0) & ~labels[parts == 0].any(axis=0))
    return [int(np.flatnonzero(labels[:, label])[0]) for label in lost]
