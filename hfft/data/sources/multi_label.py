"""Multi-label data: whether images have any number of labels, and which classes each row has.

The labels of a row are a list of names, of indices, or of 0 and 1 for each class; a text; or columns of 0 and 1.
"""

import ast
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from datasets import ClassLabel, Dataset, Value

from hfft.data.sources.labels import (
    Label,
    class_spellings,
    is_text,
    label_text,
    label_values,
    sums_to_one,
    warn_of_missing_values,
)
from hfft.data.sources.layout import split_in
from hfft.errors import DataError
from hfft.system.distributed import inform, warn
from hfft.system.text import printable

SEPARATORS = ("|", ";", ",")  # between labels in a text; the first of these that a column has anywhere
_SAMPLE = 100  # values that are read to see whether a column holds 0 and 1
_FLAGS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
_T = TypeVar("_T")
_Rows = Mapping[str, list[list[int] | None]]


@dataclass(frozen=True)
class LabelValues:
    """The values of a table's columns of labels.

    Attributes:
        kind: `flags` are a column for each class; `class` is one class each; `text`; lists are `declared` (of a
            ClassLabel), `numbers`, `floats` or `names`.
        values: Of each row, by split; None for nothing, names where the table says what its numbers mean.
        files: Names of the rows, by split.
        where: Names the source in errors.
    """

    kind: str
    values: Mapping[str, list[Any]]
    files: Mapping[str, Sequence[str]]
    where: str

    @classmethod
    def of(
        cls, tables: Mapping[str, Dataset], label: Label, files: Mapping[str, Sequence[str]], where: str
    ) -> "LabelValues":
        """The values of the columns `label`, which the tables have."""
        values = {split: _values(rows, label) for split, rows in tables.items()}
        return cls(_kind(next(iter(tables.values())), label), values, files, where)

    def all(self) -> Iterator[tuple[str, int, Any]]:
        """Split, number of the row, and value of each row."""
        for split, column in self.values.items():
            for row, value in enumerate(column):
                yield split, row, value

    def map(self, read: Callable[[Any], _T]) -> dict[str, list[_T | None]]:
        """What `read` makes of each value, by split; None of None.

        Raises:
            DataError: With the first row that `read` has a ValueError for.
        """

        def one(split: str, row: int, value: Any) -> _T | None:
            try:
                return None if value is None else read(value)
            except ValueError as error:
                raise self.error(split, row, f"; {error}") from None

        return {
            split: [one(split, row, value) for row, value in enumerate(column)]
            for split, column in self.values.items()
        }

    def error(self, split: str, row: int, allowed: str) -> DataError:
        """That a row holds something else than what is allowed."""
        value = self.values[split][row]
        return DataError(f"{self.where}: label_column: row {row} ({self.files[split][row]}) holds {value!r}{allowed}")


def _kind(rows: Dataset, label: Label) -> str:
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
    values, kind = label_values(rows, label), _kind(rows, label)
    if kind == "text":
        return [value if label_text(value) else None for value in values]
    if kind == "declared":
        names = dict(enumerate(rows.features[label].feature.names))
        return [value and [names.get(number, number) for number in value] for value in values]
    return values


def declared_names(tables: Mapping[str, Dataset], label: str) -> list[str]:
    """Names that tables declare for the classes of a column, those of train first."""
    order = sorted(tables, key=lambda split: split_in(split) != "train")
    kinds = [tables[split].features.get(label) for split in order]
    features = [getattr(kind, "feature", kind) for kind in kinds]
    return list(dict.fromkeys(name for one in features if isinstance(one, ClassLabel) for name in one.names))


# Columns


def class_list_columns(rows: Dataset) -> list[str]:
    """Columns of the type that a data set declares for several classes in a row."""
    return [name for name, kind in rows.features.items() if isinstance(getattr(kind, "feature", None), ClassLabel)]


def flag_columns(rows: Dataset, without: Sequence[str | None], where: str) -> tuple[str, ...]:
    """Columns that hold 0 and 1 alone, two or more of them; else none.

    Raises:
        DataError: With the first other value of a column that holds mostly 0 and 1, which a guess would leave out.
    """
    found, problem = [], None
    for name, kind in rows.features.items():
        if name in without or not isinstance(kind, Value | ClassLabel) or len(rows) == 0:
            continue
        sample = rows[name][:_SAMPLE]
        if 2 * sum(map(_is_flag, sample)) < len(sample):
            continue
        values = rows[name][:]
        odd = next((row for row, value in enumerate(values) if not _is_flag(value)), None)
        if odd is None:
            found.append(name)
        else:
            problem = problem or f"row {odd} holds {values[odd]!r} in the column {name!r}"
    if problem is not None and found:
        raise DataError(
            f"{where}: {problem}, which holds mostly 0 and 1, as {', '.join(found)} do alone; name the columns of "
            "the labels, for example label_column: [ant, bee]"
        )
    return tuple(found) if len(found) > 1 else ()


def _is_flag(value: Any) -> bool:
    return _flags([value]) is not None


def _flags(value: Any) -> list[int] | None:
    """A row of 0 and 1, also as text; None if there is anything else in it."""
    if not isinstance(value, list):
        return None
    found = [_FLAGS.get(str(one).strip().lower()) for one in value]
    return None if None in found else [int(one or 0) for one in found]


# Whether rows have any number of labels


def detect_multi_label(labels: LabelValues, task: str) -> bool:
    """Whether rows have any number of labels each: as asked, or as their values show.

    Lists of classes are, and so are lists or columns of 0 and 1 that don't have one 1 in every row.

    Raises:
        DataError: With the first row that has not the one label that was asked for.
    """
    if task == "multi_label" or labels.kind == "class":
        return task == "multi_label"
    if labels.kind == "text":
        return task == "auto" and _are_lists(labels)
    if labels.kind in ("flags", "floats"):
        return task == "auto" and _are_flags(labels)
    if task == "auto":
        return True
    rows = list(labels.all())
    split, row, _ = next((one for one in rows if isinstance(one[2], list) and len(one[2]) != 1), rows[0])
    raise labels.error(
        split, row, "; allowed for data.task single_label: one class for each image; multi_label takes lists"
    )


def _are_lists(labels: LabelValues) -> bool:
    """Whether texts are lists in brackets, all or none of them."""
    others = [(split, row, value) for split, row, value in labels.all() if value is not None and not _is_listed(value)]
    has_lists = any(_is_listed(value) for _, _, value in labels.all())
    if has_lists and others:
        split, row, _ = others[0]
        raise labels.error(
            split,
            row,
            ", and other rows a list in brackets; allowed: a list in all rows (multi-label), or data.task: "
            "single_label, which takes all of them for names of classes",
        )
    _warn_of_separators([value for _, _, value in others], labels.where)
    return has_lists


def _are_flags(labels: LabelValues) -> bool:
    """Whether rows of numbers are 0 and 1 for each class, and not soft labels, which sum to 1."""
    rows = list(labels.all())
    flags = [_flags(value) for _, _, value in rows]
    odd = next((n for n, found in enumerate(flags) if found is not None and sum(found) != 1), None)
    if odd is None:
        return False
    neither = next((n for n, found in enumerate(flags) if found is None and not sums_to_one(rows[n][2])), None)
    if neither is not None:
        split, row, _ = rows[neither]
        raise labels.error(
            split,
            row,
            "; allowed: 0 or 1 for each class (multi-label), or the probabilities of the classes, which sum to 1",
        )
    if None in flags:
        return False
    split, row, value = rows[odd]
    inform(
        f"{labels.where}: takes the labels as multi-label, as row {row} ({labels.files[split][row]}) has "
        f"{sum(flags[odd] or ())} of the {len(value)} classes"
    )
    return True


def _warn_of_separators(values: Sequence[Any], where: str) -> None:
    """A class may be called `ant|bee`; more likely somebody meant two."""
    met = set(map(str, values))
    odd = next((value for value in values if any(mark in str(value) for mark in SEPARATORS[:2])), None)
    several = next((value for value in sorted(met) if len(value.split()) > 1 and met.issuperset(value.split())), None)
    if odd is not None:
        warn(
            f"{where}: the label {odd!r} is taken for one class; if it is several, say data.task=multi_label, else "
            "data.task=single_label"
        )
    elif several is not None:
        warn(
            f"{where}: the label {several!r} is taken for one class; if it is several, write {SEPARATORS[0]!r} "
            "between them, else say data.task=single_label"
        )


# The labels of each row


def read_multi_label(labels: LabelValues, label: Label, declared: Sequence[str]) -> tuple[list[str], _Rows]:
    """Names of the classes, and by split the class indices of each row, ascending; None for a row without labels.

    Raises:
        DataError: With the first row that holds something else.
    """
    every = [value for _, _, value in labels.all()]
    if labels.kind == "flags" or (labels.kind in ("numbers", "floats") and _are_vectors(every, labels.kind)):
        lengths = Counter(len(value) for value in every if value is not None)
        usual = max(lengths, key=lambda length: lengths[length], default=0)  # so that the odd one is found wrong
        names = [printable(str(name)) for name in (label if isinstance(label, tuple) else range(usual))]
        return names, labels.map(partial(_from_flags, count=len(names)))
    if labels.kind == "class":
        split, row, _ = next(labels.all())
        raise labels.error(
            split,
            row,
            "; allowed for data.task multi_label: a list of labels, or columns of 0 and 1 (label_column: [...])",
        )
    read = partial(_names, declared=declared)
    if labels.kind == "text":
        plain = [str(value) for value in every if value is not None and not _is_listed(value)]
        separator = next((mark for mark in SEPARATORS if any(mark in value for value in plain)), None)
        read = partial(_names_in_text, separator=separator, declared=declared)
    found = labels.map(read)
    met = {name for column in found.values() for row in column for name in row or ()}
    warn_of_missing_values(met, declared, labels.where)
    spellings = class_spellings(met, [name for name in map(label_text, declared) if name is not None], labels.where)
    names = list(dict.fromkeys(spellings.values()))
    places = {name: place for place, name in enumerate(names)}
    return names, {
        split: [None if row is None else sorted({places[spellings[name]] for name in row}) for row in column]
        for split, column in found.items()
    }


def _are_vectors(values: Sequence[Any], kind: str) -> bool:
    """Whether lists of numbers have a 0 or 1 for each class, and are no lists of class indices.

    They are if they hold nothing else and are equally long, or name the same number twice.
    """
    if kind == "floats":
        return True
    lists = [value for value in values if value is not None]
    if any(_flags(value) is None for value in lists):
        return False
    lengths = {len(value) for value in lists}
    return (len(lengths) == 1 and max(lengths) > 1) or any(len(set(value)) < len(value) for value in lists)


def _from_flags(value: Any, count: int) -> list[int]:
    found = _flags(value)
    if found is None or len(found) != count:
        raise ValueError(f"allowed for data.task multi_label: 0 or 1 for each of the {count} classes")
    return [number for number, flag in enumerate(found) if flag]


def _is_listed(value: Any) -> bool:
    """Whether a value is a text with a list in brackets."""
    text = value.strip() if isinstance(value, str) else ""
    return text[:1] == "[" and text[-1:] == "]"


def _names_in_text(value: Any, separator: str | None, declared: Sequence[str]) -> list[str]:
    """The classes in a text: a list as JSON or Python writes it, else what is between separators."""
    text = str(value).strip()
    if not _is_listed(text):
        return _names([part.strip() for part in text.split(separator)] if separator else [text], declared)
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list) and all(isinstance(one, str | int) for one in found):
            return _names([str(one) for one in found], declared)
    raise ValueError(
        'allowed: a list such as ["ant", "bee"], or labels between '
        f"{' or '.join(map(repr, SEPARATORS))}; [] for an image of none of the classes"
    )


def _names(value: Any, declared: Sequence[str]) -> list[str]:
    """The classes in a list."""
    names = [_name(one, declared) for one in value] if isinstance(value, list) else [None]
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(
            "allowed for data.task multi_label: a list of names or of class numbers from 0, each once; it may be empty"
        )
    return [str(name) for name in names]


def _name(value: Any, declared: Sequence[str]) -> str | None:
    """A class's name; None where a value is none."""
    if isinstance(value, str):
        return label_text(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0 or (declared and value >= len(declared)):
        return None
    return label_text(declared[value]) if declared else str(value)
