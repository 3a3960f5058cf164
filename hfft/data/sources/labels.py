"""Labels: one name for each class from values of any spelling, and what rows hold as label, soft label and weight."""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, List, Value

from hfft.system.distributed import inform, warn
from hfft.system.text import printable

Label = str | tuple[str, ...]  # a column of labels, or one for each class
UNLABELLED = -1  # where a row has no class; a list of classes is None then, and an empty list is an image of none
SOFT_LABELS = "soft_labels"  # column of rows: (K,) probability of each class
WEIGHT = "weight"  # column of rows: of the image in the loss
_AROUND = r"[\s\u200b\u2060\ufeff]+"  # spaces, and characters without width that tables have at their ends
_ENDS = re.compile(f"^{_AROUND}|{_AROUND}$")
_WHOLE = re.compile(r"(-?[0-9]+)\.0+")  # a whole number as a float is written
_FLAGS = {"false": "0", "true": "1"}
# How programs write that there is no value; any of them may be the name of a class.
_NOTHING = frozenset(
    (
        *("NA", "N/A", "n/a", "na", "NaN", "nan", "-nan", "NAN", "NaT", "<NA>", "#N/A"),
        *("NULL", "Null", "null", "None", "NONE", "-", "--", "?"),
    )
)


# Values of a column


def is_text(kind: Any) -> bool:
    """Whether a column of this type holds text, in any of Arrow's ways to keep it."""
    return isinstance(kind, Value) and kind.dtype in ("string", "large_string", "string_view")


def is_number(text: str) -> bool:
    """Whether a text is a number of any kind."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def natural(text: str) -> tuple[int, int, str]:
    """A key that sorts numbers by their value, in front of all other texts."""
    is_whole = text.isdecimal() and len(text) < 1000  # Python reads no longer ones
    return (0, int(text), text) if is_whole else (1, 0, text)


def label_text(value: Any) -> str | None:
    """A label of any type as text on one line, without spaces around it; None for nothing, NaN and blanks."""
    if value is None or value != value:
        return None
    text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
    return printable(_ENDS.sub("", text)) or None


def label_texts(values: Sequence[Any], files: Sequence[str], where: str) -> list[str | None]:
    """The label of each row as `label_text` has it; logs where texts lost spaces."""
    kinds = [(type(value), value) for value in values]  # 1, 1.0 and True are equal
    known = {kind: label_text(kind[1]) for kind in set(kinds)}
    texts = [known[kind] for kind in kinds]
    changed = [
        row for row, text in enumerate(texts) if isinstance(values[row], str) and text not in (None, values[row])
    ]
    if changed:
        first = changed[0]
        inform(
            f"{where}: {len(changed)} of {len(values)} labels are taken without spaces around them and control "
            f"characters, the first is that of {files[first]}: {values[first]!r} as {texts[first]!r}"
        )
    return texts


# Names of classes


def same_class(name: str) -> str:
    """The common spelling of names that mean one class: Unicode's composed form; 0 for 0.0 and false, 1 for true."""
    text = unicodedata.normalize("NFC", name)
    whole = _WHOLE.fullmatch(text)
    text = whole[1] if whole else text
    return _FLAGS.get(text.lower(), "0" if text == "-0" else text)


def number_classes(found: Iterable[str], declared: Iterable[str], where: str) -> tuple[list[str], dict[str, int]]:
    """Names of the classes in their order, each in one of its spellings, and the number of each spelling's class.

    `declared` are names that a data set declares, which come first, in their order.
    """
    declared = [name for name in map(label_text, declared) if name is not None]
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys([*declared, *sorted(set(found), key=natural)]):
        groups.setdefault(same_class(name), []).append(name)
    chosen = [common if common in names else names[0] for common, names in groups.items()]
    for name, names in zip(chosen, groups.values(), strict=True):
        if len(names) > 1:
            is_one_text = len({unicodedata.normalize("NFC", one) for one in names}) == 1
            shown = ", ".join(map(ascii if is_one_text else repr, names))
            warn(f"{where}: {shown} are taken for one class, {name!r}; write it one way")
    return chosen, {name: number for number, names in enumerate(groups.values()) for name in names}


def known_as(names: Iterable[str], known: Sequence[str]) -> dict[str, str]:
    """Names that an existing model has, too, perhaps in another spelling -> the model's name."""
    spelled = {same_class(label_text(name) or name): name for name in reversed(known)} | {name: name for name in known}
    found = {name: spelled.get(name, spelled.get(same_class(name))) for name in names}
    return {name: other for name, other in found.items() if other is not None}


def alike_classes(names: Iterable[str]) -> list[list[str]]:
    """Names that differ in case, marks between words, width or invisible characters alone, in groups."""
    groups: dict[str, list[str]] = {}
    for name in names:
        seen = (one for one in unicodedata.normalize("NFKC", name).casefold() if unicodedata.category(one) != "Cf")
        groups.setdefault(" ".join(re.split(r"[\s_-]+", "".join(seen))), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def warn_of_missing_values(found: Iterable[str], declared: Sequence[str], where: str) -> None:
    """Warn if a table that declares no such class holds words for a missing value."""
    odd = sorted((_NOTHING & set(found)).difference(declared))
    if odd:
        warn(
            f"{where}: {', '.join(map(repr, odd))} is taken for the name of a class; where it means that there is no "
            "label, leave the field empty"
        )


# What rows hold


def label_feature(names: Sequence[str], *, is_multi_label: bool) -> ClassLabel | List:
    """The type of the column `label`: the index of one class, or the indices of any number."""
    one = ClassLabel(names=list(names))
    return List(one) if is_multi_label else one


def is_multi_label(rows: Dataset) -> bool:
    """Whether rows hold any number of labels each."""
    return isinstance(rows.features["label"], List)


def class_names(rows: Dataset) -> tuple[str, ...]:
    """Names of the classes, in the order of their indices."""
    feature = rows.features["label"]
    return tuple(feature.feature.names if isinstance(feature, List) else feature.names)


def label_array(rows: Dataset) -> np.ndarray:
    """Class indices, (N,) int64; of multi-label rows which labels each has, (N, K) uint8 of 0 and 1."""
    if not is_multi_label(rows):
        return np.asarray(rows["label"][:], dtype=np.int64)
    found = np.zeros((len(rows), len(class_names(rows))), dtype=np.uint8)
    for place, numbers in enumerate(rows["label"][:]):
        found[place, numbers or []] = 1
    return found


def lacks_label(rows: Dataset) -> np.ndarray:
    """Whether a row has no label, (N,) bool; an empty list is a label: none of the classes."""
    if is_multi_label(rows):
        return np.fromiter((numbers is None for numbers in rows["label"][:]), bool, len(rows))
    return label_array(rows) < 0


def label_keys(rows: Dataset) -> np.ndarray:
    """The labels as hashable values, (N,): class indices, or tuples of them; -1 and (-1,) for none given."""
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


def targets_of(rows: Dataset, classes: int) -> np.ndarray | None:
    """What rows are trained towards, (N, K) float32: 0 and 1 of multi-label rows; soft labels times weight.

    None where class indices say it all.
    """
    if is_multi_label(rows):
        return label_array(rows).astype(np.float32)
    names = rows.column_names
    if SOFT_LABELS not in names and WEIGHT not in names:
        return None
    if SOFT_LABELS in names:
        targets = np.asarray(rows[SOFT_LABELS][:], dtype=np.float32)
    else:
        targets = np.eye(classes, dtype=np.float32)[np.asarray(rows["label"][:])]
    if WEIGHT in names:
        targets = targets * np.asarray(rows[WEIGHT][:], dtype=np.float32)[:, None]
    return targets
