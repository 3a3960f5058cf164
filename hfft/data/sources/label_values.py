"""The columns of labels and weights of a table -> the classes and what each row has of them.

A row has one class; or a probability of each; or any number of classes (multi-label): a list of names, of indices, or
of 0 and 1 for each class; a text with several; or columns of 0 and 1.
"""

import ast
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
from datasets import ClassLabel, Dataset, List, Value

from hfft.data.sources.columns import flags_of
from hfft.data.sources.folders import CLASS_FOLDER, split_in
from hfft.data.sources.labels import (
    UNLABELLED,
    Label,
    is_number,
    is_text,
    label_feature,
    label_text,
    label_texts,
    number_classes,
    warn_of_missing_values,
)
from hfft.data.sources.table import RawRows, Table
from hfft.errors import DataError
from hfft.system.distributed import inform, warn
from hfft.system.text import printable

SEPARATORS = ("|", ";", ",")  # between labels in a text; the first of these that a column has anywhere
_TOLERANCE = 1e-3  # of the sum of probabilities
_T = TypeVar("_T")


@dataclass(frozen=True)
class RowLabels:
    """What the rows of each split have."""

    feature: ClassLabel | List  # type of the labels
    labels: Mapping[str, list[Any]]  # class of each row, -1 for none; multi-label, a list or None
    soft: Mapping[str, np.ndarray] | None = None  # probability of each class, (N, K) float32


@dataclass(frozen=True)
class _Values:
    """The values of a column, or lists of those of several, in the rows of all splits, one split after the other."""

    values: list[Any]  # None for nothing
    rows: Sequence[tuple[int, str]]  # number within its split, and name, of each row
    where: str  # names the source in messages
    key: str = "label_column"

    def read(self, read: Callable[[Any], _T]) -> list[_T]:
        """What `read` makes of each value; its ValueError becomes an error that names the row."""
        found = []
        for number, value in enumerate(self.values):
            try:
                found.append(read(value))
            except ValueError as error:
                raise self.error(number, f"; {error}") from None
        return found

    def error(self, number: int, allowed: str) -> DataError:
        """That a row holds something else than what is allowed."""
        row, file = self.rows[number]
        return DataError(f"{self.where}: {self.key}: row {row} ({file}) holds {self.values[number]!r}{allowed}")


def read_weights(rows: Dataset, column: str, files: Sequence[str], where: str) -> list[float]:
    """The weight of each row of a split."""
    return _Values(rows[column][:], list(enumerate(files)), where, "weight_column").read(_weight)


def _weight(value: Any) -> float:
    number = _numbers([value])
    if number is None or number[0] <= 0:
        raise ValueError("allowed: a number above 0")
    return number[0]


def read_labels(table: Table, files: Mapping[str, Sequence[str]], task: str) -> RowLabels:
    """The labels of a table's rows; `files` are their names by split, and `task` is that of `DataSpec`."""
    label, where = table.columns.label, table.name
    tables = {split: raw.rows for split, raw in table.splits.items()}
    first = next(iter(tables.values()))
    declared = _declared_names(tables, str(label))
    if isinstance(label, tuple) or label in first.column_names:
        kind = _kind(first, label)
        found = [value for rows in tables.values() for value in _values(rows, label)]
        rows = [row for own in files.values() for row in enumerate(own)]
        values = _Values(found, rows, where)
        if _detect_multi_label(values, kind, task):
            names, lists = _read_multi_label(values, kind, label, declared, where)
            return RowLabels(label_feature(names, is_multi_label=True), _by_split(lists, files))
        if kind in ("flags", "floats"):
            count = len(next(iter(found)) or ())
            soft = np.asarray(values.read(partial(_probabilities, count=count)), dtype=np.float32)
            feature = label_feature(_column_names(label, count), is_multi_label=False)
            return RowLabels(feature, _by_split(soft.argmax(axis=1).tolist(), files), _by_split(soft, files))
    elif task == "multi_label":
        raise DataError(f"{where}: data.task: multi_label needs a column with lists of labels, or columns of 0 and 1")
    found = [
        value for split, raw in table.splits.items() for value in _plain_values(raw, str(label), files[split], where)
    ]
    texts = label_texts(found, [file for own in files.values() for file in own], where)
    met = {text for text in texts if text is not None}
    _check_classes(met, len(texts), label=str(label), is_declared=bool(declared), where=where)
    if label != CLASS_FOLDER:
        warn_of_missing_values(met, declared, where)
    names, numbers = number_classes(met, declared, where)
    labels = [UNLABELLED if text is None else numbers[text] for text in texts]
    return RowLabels(label_feature(names, is_multi_label=False), _by_split(labels, files))


def _by_split(found: Any, files: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The part of each split of what the rows of all have."""
    ends = accumulate(map(len, files.values()))
    return {split: found[end - len(own) : end] for (split, own), end in zip(files.items(), ends, strict=True)}


def _kind(rows: Dataset, label: Label) -> str:
    """What labels are: `flags`, a column for each class; `class`; `text`; or lists.

    Lists are `declared` (of a ClassLabel), `numbers`, `floats` or `names`.
    """
    if isinstance(label, tuple):
        return "flags"
    kind = rows.features[label]
    inner = getattr(kind, "feature", None)
    if inner is None:
        return "text" if is_text(kind) else "class"
    if isinstance(inner, ClassLabel):
        return "declared"
    if isinstance(inner, Value) and inner.dtype.startswith(("int", "uint", "bool")):
        return "numbers"
    return "floats" if isinstance(inner, Value) and inner.dtype.startswith("float") else "names"


def _values(rows: Dataset, label: Label) -> list[Any]:
    """What each row holds; names where the table says what its numbers mean."""
    if isinstance(label, tuple):
        return [list(values) for values in zip(*(rows[name][:] for name in label), strict=True)]
    values, kind = rows[label][:], _kind(rows, label)
    if kind == "text":
        return [value if label_text(value) else None for value in values]
    if kind == "declared":
        names = dict(enumerate(rows.features[label].feature.names))
        return [value and [names.get(number, number) for number in value] for value in values]
    return values


def _declared_names(tables: Mapping[str, Dataset], label: str) -> list[str]:
    """Names that tables declare for the classes of a column, those of train first."""
    order = sorted(tables, key=lambda split: split_in(split) != "train")
    kinds = [tables[split].features.get(label) for split in order]
    features = [getattr(kind, "feature", kind) for kind in kinds]
    return list(dict.fromkeys(name for one in features if isinstance(one, ClassLabel) for name in one.names))


def _column_names(label: Label, count: int) -> list[str]:
    """Names of classes that have a column each, or a place in a list."""
    return [printable(str(name)) for name in (label if isinstance(label, tuple) else range(count))]


# One class


def _plain_values(raw: RawRows, label: str, files: Sequence[str], where: str) -> list[Any]:
    """The class of each row of a split, whatever its type; names where the table says what its numbers mean."""
    if label == CLASS_FOLDER and label not in raw.rows.column_names:
        parts = [file.split("/")[raw.depth :] for file in files]
        if all(len(part) == 1 for part in parts):
            raise DataError(f"{where}: label_column: none fits; name one of {', '.join(raw.rows.column_names)}")
        return [part[0] if len(part) > 1 else None for part in parts]
    feature, values = raw.rows.features[label], raw.rows[label][:]
    if isinstance(feature, ClassLabel):
        return [feature.names[value] if value is not None and value >= 0 else None for value in values]
    if not isinstance(feature, Value):
        raise DataError(f"{where}: label_column: the column {label!r} holds {feature}; allowed: one class per image")
    return values


def _check_classes(met: set[str], rows: int, *, label: str, is_declared: bool, where: str) -> None:
    are_numbers = not is_declared and len(met) > max(10, rows / 2) and all(map(is_number, met))
    if are_numbers and any(float(text) % 1 for text in met):
        raise DataError(
            f"{where}: label_column: the column {label!r} holds {len(met)} different numbers in {rows} rows, such as "
            f"{min(met)}; allowed: classes, of which most have several images"
        )


# Probabilities


def _probabilities(value: Any, count: int) -> list[float]:
    if not _sums_to_one(value) or len(value) != count:
        raise ValueError(
            "allowed: a probability of each class, which sum to 1; or in all rows 0 or 1 for each class (data.task: "
            "multi_label)"
        )
    return [float(one) for one in value]


def _sums_to_one(value: Any) -> bool:
    """Whether a row holds numbers of 0 or more that sum to 1."""
    found = None if value is None else _numbers(value)
    return found is not None and min(found) >= 0 and abs(sum(found) - 1) <= _TOLERANCE


def _numbers(values: Sequence[Any]) -> list[float] | None:
    """Finite numbers, also from text; None if one of them is none."""
    try:
        found = list(map(float, values))
    except (TypeError, ValueError):
        return None
    return found if found and all(map(math.isfinite, found)) else None


# Whether rows have any number of labels


def _detect_multi_label(labels: _Values, kind: str, task: str) -> bool:
    """Whether rows have any number of labels each: as asked, or as their values show.

    Lists of classes are, and so are lists or columns of 0 and 1 that don't have one 1 in every row.
    """
    if task == "multi_label" or kind == "class":
        return task == "multi_label"
    if kind == "text":
        return task == "auto" and _are_lists(labels)
    if kind in ("flags", "floats"):
        return task == "auto" and _are_flags(labels)
    if task == "auto":
        return True
    odd = (number for number, value in enumerate(labels.values) if isinstance(value, list) and len(value) != 1)
    allowed = "; allowed for data.task single_label: one class for each image; multi_label takes lists"
    raise labels.error(next(odd, 0), allowed)


def _are_lists(labels: _Values) -> bool:
    """Whether texts are lists in brackets, all or none of them."""
    others = [number for number, text in enumerate(labels.values) if text is not None and not _is_listed(text)]
    has_lists = any(map(_is_listed, labels.values))
    if has_lists and others:
        raise labels.error(
            others[0],
            ", and other rows a list in brackets; allowed: a list in all rows (multi-label), or data.task: "
            "single_label, which takes all of them for names of classes",
        )
    _warn_of_separators([str(labels.values[number]) for number in others], labels.where)
    return has_lists


def _are_flags(labels: _Values) -> bool:
    """Whether rows of numbers are 0 and 1 for each class, and not soft labels, which sum to 1."""
    flags = [flags_of(value) for value in labels.values]
    odd = next((number for number, found in enumerate(flags) if found is not None and sum(found) != 1), None)
    if odd is None:
        return False
    others = [number for number, found in enumerate(flags) if found is None]
    neither = next((number for number in others if not _sums_to_one(labels.values[number])), None)
    if neither is not None:
        raise labels.error(
            neither,
            "; allowed: 0 or 1 for each class (multi-label), or the probabilities of the classes, which sum to 1",
        )
    if others:
        return False
    (row, file), found = labels.rows[odd], flags[odd] or ()
    inform(
        f"{labels.where}: takes the labels as multi-label, as row {row} ({file}) has "
        f"{sum(found)} of the {len(found)} classes"
    )
    return True


def _warn_of_separators(values: Sequence[str], where: str) -> None:
    """A class may be called `ant|bee`; more likely somebody meant two."""
    met = set(values)
    odd = next((value for value in values if any(mark in value for mark in SEPARATORS[:2])), None)
    several = next((value for value in sorted(met) if len(value.split()) > 1 and met.issuperset(value.split())), None)
    if odd is not None:
        advice = "say data.task=multi_label, else data.task=single_label"
    else:
        advice = f"write {SEPARATORS[0]!r} between them, else say data.task=single_label"
    if odd or several:
        warn(f"{where}: the label {odd or several!r} is taken for one class; if it is several, {advice}")


# Any number of classes


def _read_multi_label(
    labels: _Values, kind: str, label: Label, declared: Sequence[str], where: str
) -> tuple[list[str], list[list[int] | None]]:
    """Names of the classes, and the class indices of each row, ascending; None for a row without labels."""
    given = [value for value in labels.values if value is not None]
    if kind == "class":
        allowed = "; allowed for data.task multi_label: a list of labels, or columns of 0 and 1 (label_column: [...])"
        raise labels.error(0, allowed)
    if kind in ("flags", "floats") or (kind == "numbers" and _are_vectors(given)):
        lengths = Counter(map(len, given))
        usual = max(lengths, key=lambda length: lengths[length], default=0)  # so that the odd one is found wrong
        names = _column_names(label, usual)
        return names, labels.read(partial(_from_flags, count=len(names)))
    separator = None
    if kind == "text":
        plain = [text for text in given if not _is_listed(text)]
        separator = next((mark for mark in SEPARATORS if any(mark in text for text in plain)), None)
    found = labels.read(partial(_names, declared=declared, separator=separator, in_text=kind == "text"))
    met = {name for names in found for name in names or ()}
    warn_of_missing_values(met, declared, where)
    names, numbers = number_classes(met, declared, where)
    return names, [None if row is None else sorted({numbers[name] for name in row}) for row in found]


def _are_vectors(lists: Sequence[list[Any]]) -> bool:
    """Whether lists of whole numbers have a 0 or 1 for each class, and are no lists of class indices.

    They are if they hold nothing else and are equally long, or name the same number twice.
    """
    if any(flags_of(value) is None for value in lists):
        return False
    lengths = set(map(len, lists))
    return (len(lengths) == 1 and max(lengths) > 1) or any(len(set(value)) < len(value) for value in lists)


def _from_flags(value: Any, count: int) -> list[int] | None:
    if value is None:
        return None
    found = flags_of(value)
    if found is None or len(found) != count:
        raise ValueError(f"allowed for data.task multi_label: 0 or 1 for each of the {count} classes")
    return [number for number, flag in enumerate(found) if flag]


def _is_listed(value: Any) -> bool:
    """Whether a value is a text with a list in brackets."""
    text = value.strip() if isinstance(value, str) else ""
    return text[:1] == "[" and text[-1:] == "]"


def _names(value: Any, declared: Sequence[str], *, separator: str | None, in_text: bool) -> list[str] | None:
    """The classes in a list, or in a text."""
    if value is None:
        return None
    listed = _split_text(str(value).strip(), separator) if in_text else value
    names = [_name(one, declared) for one in listed] if isinstance(listed, list) else [None]
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(
            "allowed for data.task multi_label: a list of names or of class numbers from 0, each once; it may be empty"
        )
    return [str(name) for name in names]


def _split_text(text: str, separator: str | None) -> list[str]:
    """What a text lists as JSON or Python writes a list, else what is between separators."""
    if not _is_listed(text):
        return [part.strip() for part in text.split(separator)] if separator else [text]
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list) and all(isinstance(one, str | int) for one in found):
            return list(map(str, found))
    raise ValueError(
        f'allowed: a list such as ["ant", "bee"], or labels between {" or ".join(map(repr, SEPARATORS))}; [] for an '
        "image of none of the classes"
    )


def _name(value: Any, declared: Sequence[str]) -> str | None:
    """A class's name; None where a value is none."""
    if isinstance(value, str):
        return label_text(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0 or (declared and value >= len(declared)):
        return None
    return label_text(declared[value]) if declared else str(value)
