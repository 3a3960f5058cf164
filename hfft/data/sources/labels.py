"""What rows hold as labels: the index of one class each (single-label), or the indices of any number (multi-label)."""

from collections.abc import Sequence

import numpy as np
from datasets import ClassLabel, Dataset, List

from hfft.data.sources.label_values import known_as

UNLABELLED = -1  # where a row has no class; a list of classes is None then, and an empty list is an image of none


def label_feature(names: Sequence[str], *, is_multi_label: bool) -> ClassLabel | List:
    """The type of the column `label`."""
    one = ClassLabel(names=list(names))
    return List(one) if is_multi_label else one


def is_multi_label(rows: Dataset) -> bool:
    """Whether rows hold any number of labels each."""
    return isinstance(rows.features["label"], List)


def class_names(rows: Dataset) -> tuple[str, ...]:
    """Names of the classes, in the order of their indices."""
    feature = rows.features["label"]
    return tuple(feature.feature.names if isinstance(feature, List) else feature.names)


def labels_of(rows: Dataset) -> np.ndarray:
    """Class indices, (N,) int64; of multi-label rows which labels each has, (N, K) uint8 of 0 and 1."""
    if not is_multi_label(rows):
        return np.asarray(rows["label"][:], dtype=np.int64)
    found = np.zeros((len(rows), len(class_names(rows))), dtype=np.uint8)
    for place, numbers in enumerate(rows["label"][:]):
        found[place, numbers or []] = 1
    return found


def lacks_label(rows: Dataset) -> np.ndarray:
    """Whether nobody has said what is to be seen, (N,) bool; an empty list says: none of the classes."""
    if is_multi_label(rows):
        return np.fromiter((numbers is None for numbers in rows["label"][:]), bool, len(rows))
    return labels_of(rows) < 0


def label_keys(rows: Dataset) -> np.ndarray:
    """What tells the labels of two rows apart, (N,): class indices, or tuples of them; -1 and (-1,) for none given."""
    if not is_multi_label(rows):
        return np.asarray(rows["label"][:])
    found = np.empty(len(rows), dtype=object)
    for place, numbers in enumerate(rows["label"][:]):
        found[place] = (UNLABELLED,) if numbers is None else tuple(sorted(numbers))
    return found


def count_keys(keys: np.ndarray, classes: int) -> np.ndarray:
    """Rows of each class among keys of `label_keys`, (K,)."""
    numbers = [number for key in keys.tolist() for number in (key if isinstance(key, tuple) else (key,))]
    return np.bincount([number for number in numbers if number >= 0], minlength=classes)


def strata_of(labels: np.ndarray) -> np.ndarray:
    """A number for each image that is the same where the labels are, (N,): the class, or which set of labels."""
    return labels if labels.ndim == 1 else np.unique(labels, axis=0, return_inverse=True)[1].reshape(-1)


def spoken_label(key: int | tuple[int, ...] | Sequence[int], names: Sequence[str]) -> str:
    """A label or a set of labels in words; `no label` for an empty set."""
    numbers = (key,) if isinstance(key, int | np.integer) else tuple(key)
    if numbers == (UNLABELLED,):
        return "none"
    return " + ".join(str(names[number]) for number in numbers) or "no label"


def relabelled(rows: Dataset, names: Sequence[str]) -> Dataset:
    """The rows with the indices of another list of class names, which has all names that occur, in some spelling."""
    own = class_names(rows)
    known = known_as(own, names)
    numbers = {name: number for number, name in enumerate(names)}
    places = {number: numbers[known[name]] for number, name in enumerate(own) if name in known}
    many = is_multi_label(rows)
    values = rows["label"][:]
    values = [[places[one] for one in value] if many else places[value] for value in values]
    return rows.remove_columns("label").add_column("label", values, feature=label_feature(names, is_multi_label=many))
