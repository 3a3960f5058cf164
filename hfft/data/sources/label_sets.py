"""Columns of a table -> the set of labels of each row, for multi-label data; and whether a table is multi-label.

A set is written as a list of names, indices or 0 and 1 for each class; as text in CSV; or as columns of 0 and 1.
"""

import ast
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from datasets import ClassLabel, Dataset, Value

from hfft.data.sources.folders import split_in
from hfft.data.sources.label_values import class_spellings, is_text, label_text, warn_of_nothing
from hfft.data.sources.targets import are_shares
from hfft.errors import DataError
from hfft.system.distributed import inform, warn
from hfft.system.text import printable

Label = str | tuple[str, ...]  # a column, or one for each class
SEPARATORS = ("|", ";", ",")  # between labels in a text; the first of these that a column has anywhere
_SAMPLE = 100  # values that are looked at to see whether a column holds 0 and 1
_FLAGS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
_T = TypeVar("_T")


@dataclass(frozen=True)
class LabelSets:
    """The labels of rows.

    Attributes:
        names: Of the classes.
        rows: By split, the class indices of each row, ascending; None for a row that nobody has labelled.
    """

    names: list[str]
    rows: dict[str, list[list[int] | None]]


def holds_sets(
    tables: Mapping[str, Dataset], label: Label, task: str, files: Mapping[str, Sequence[str]], where: str
) -> bool:
    """Whether rows have any number of labels each: as asked, or as their values tell.

    Lists of classes are, and so are lists or columns of 0 and 1 that don't have one 1 in every row.

    Args:
        tables: Rows by split.
        label: Where the labels are.
        task: `auto`, `single_label` or `multi_label`.
        files: Names of the rows, by split.
        where: Names the source in errors.

    Raises:
        DataError: With the first row that has not the one label that was asked for.
    """
    first = next(iter(tables.values()))
    if task == "multi_label" or (isinstance(label, str) and label not in first.column_names):
        return task == "multi_label"
    kind = _kind(first, label)
    if kind == "class":
        return False
    told = [(split, row, value) for split, table in tables.items() for row, value in enumerate(_values(table, label))]
    if kind == "text":
        return task == "auto" and _are_lists(told, files, where)
    if kind in ("flags", "floats"):
        return task == "auto" and _are_sets(told, files, where)
    if task == "auto":
        return True
    split, row, value = next((one for one in told if isinstance(one[2], list) and len(one[2]) != 1), told[0])
    raise DataError(
        f"{_row(where, files[split], row, value)}; allowed for data.task single_label: one class for each image; "
        "multi_label takes lists"
    )


def _are_lists(told: Sequence[tuple[str, int, Any]], files: Mapping[str, Sequence[str]], where: str) -> bool:
    """Whether texts are lists in brackets, all or none of them."""
    is_list = [value is None or _is_listed(value) for _, _, value in told]
    if any(one and value is not None for one, (_, _, value) in zip(is_list, told, strict=True)) and not all(is_list):
        split, row, value = told[is_list.index(False)]
        raise DataError(
            f"{_row(where, files[split], row, value)}, and other rows a list in brackets; allowed: a list in all rows "
            "(multi-label), or data.task: single_label, which takes all of them for names of classes"
        )
    _tell_of_separators([value for _, _, value in told if value is not None and not _is_listed(value)], where)
    return all(is_list) and any(value is not None for _, _, value in told)


def _are_sets(told: Sequence[tuple[str, int, Any]], files: Mapping[str, Sequence[str]], where: str) -> bool:
    """Whether rows of numbers are 0 and 1 for each class, and not shares, which sum to 1."""
    flags = [_flags(value) for _, _, value in told]
    odd = next((n for n, found in enumerate(flags) if found is not None and sum(found) != 1), None)
    if odd is None:
        return False
    neither = next((n for n, found in enumerate(flags) if found is None and not are_shares(told[n][2])), None)
    if neither is not None:
        split, row, value = told[neither]
        raise DataError(
            f"{_row(where, files[split], row, value)}; allowed: 0 or 1 for each class (multi-label), or shares that "
            "sum to 1"
        )
    if None in flags:
        return False
    split, row, value = told[odd]
    inform(
        f"{where}: takes the labels as multi-label, as row {row} ({files[split][row]}) has {sum(flags[odd] or ())} "
        f"of the {len(value)} classes"
    )
    return True


def read_sets(
    tables: Mapping[str, Dataset], label: Label, files: Mapping[str, Sequence[str]], where: str
) -> LabelSets:
    """The labels of every row.

    Args:
        tables: Rows by split.
        label: Where the labels are.
        files: Names of the rows, by split.
        where: Names the source in errors.

    Raises:
        DataError: With the first row that holds something else.
    """
    first = next(iter(tables.values()))
    if isinstance(label, str) and label not in first.column_names:
        raise DataError(f"{where}: data.task: multi_label needs a column with lists of labels, or columns of 0 and 1")
    kind, values = _kind(first, label), {split: _values(table, label) for split, table in tables.items()}
    every = [value for column in values.values() for value in column]
    if kind == "flags" or (kind in ("numbers", "floats") and _are_vectors(every, kind)):
        lengths = Counter(len(value) for value in every if value is not None)
        usual = max(lengths, key=lambda length: lengths[length], default=0)  # so that the odd one is found wrong
        names = [printable(str(name)) for name in (label if isinstance(label, tuple) else range(usual))]
        return LabelSets(names, _read_each(values, partial(_from_flags, count=len(names)), files, where))
    if kind == "text":
        plain = [str(value) for value in every if value is not None and not _is_listed(value)]
        separator = next((mark for mark in SEPARATORS if any(mark in value for value in plain)), None)
        values = _read_each(values, partial(_divide, separator=separator), files, where)
    elif kind == "class":
        split, row, value = next((s, n, v) for s, column in values.items() for n, v in enumerate(column))
        raise DataError(
            f"{_row(where, files[split], row, value)}; allowed for data.task multi_label: a list of labels, or "
            "columns of 0 and 1 (label_column: [...])"
        )
    return _indexed(values, declared_names(tables, str(label)), files, where)


def flag_columns(table: Dataset, without: Sequence[str | None], where: str) -> tuple[str, ...]:
    """Columns that hold 0 and 1 alone, two or more of them; else none.

    Args:
        table: Rows with any columns.
        without: Columns that are something else.
        where: Names the source in errors.

    Raises:
        DataError: With the first other value of a column that holds mostly 0 and 1, which a guess would leave out.
    """
    found, doubtful = [], None
    for name, kind in table.features.items():
        if name in without or not isinstance(kind, Value | ClassLabel) or len(table) == 0:
            continue
        if 2 * sum(map(_is_flag, table.select(range(min(len(table), _SAMPLE)))[name][:])) < min(len(table), _SAMPLE):
            continue
        values = table[name][:]
        odd = next((row for row, value in enumerate(values) if not _is_flag(value)), None)
        if odd is None:
            found.append(name)
        else:
            doubtful = doubtful or f"row {odd} holds {values[odd]!r} in the column {name!r}"
    if doubtful is not None and found:
        raise DataError(
            f"{where}: {doubtful}, which holds mostly 0 and 1, as {', '.join(found)} do alone; name the columns of "
            "the labels, for example label_column: [ant, bee]"
        )
    return tuple(found) if len(found) > 1 else ()


def _is_flag(value: Any) -> bool:
    return _flags([value]) is not None


def list_columns(table: Dataset) -> list[str]:
    """Columns of the type that a data set declares for several classes in a row."""
    return [name for name, kind in table.features.items() if isinstance(getattr(kind, "feature", None), ClassLabel)]


def _kind(table: Dataset, label: Label) -> str:
    """What a row's labels are written as."""
    if isinstance(label, tuple):
        return "flags"
    kind = table.features[label]
    inner = getattr(kind, "feature", None)
    if inner is None:
        return "text" if is_text(kind) else "class"
    if isinstance(inner, ClassLabel):
        return "declared"
    if isinstance(inner, Value) and inner.dtype.startswith(("int", "uint", "bool")):
        return "numbers"
    return "floats" if isinstance(inner, Value) and inner.dtype.startswith("float") else "names"


def _values(table: Dataset, label: Label) -> list[Any]:
    """What each row holds: None for nothing, names where the table says what its numbers mean."""
    if isinstance(label, str):
        values, kind = table[label][:], _kind(table, label)
        if kind == "text":
            return [value if label_text(value) else None for value in values]
        if kind == "declared":
            names = dict(enumerate(table.features[label].feature.names))
            return [value and [names.get(number, number) for number in value] for value in values]
        return values
    return [list(row) for row in zip(*(table[name][:] for name in label), strict=True)]


def _row(where: str, files: Sequence[str], row: int, value: Any) -> str:
    return f"{where}: label_column: row {row} ({files[row]}) holds {value!r}"


def _flags(value: Any) -> list[int] | None:
    """A row of 0 and 1, also as text; None if there is anything else in it."""
    if not isinstance(value, list):
        return None
    found = [_FLAGS.get(str(one).strip().lower()) for one in value]
    return None if None in found else [int(one or 0) for one in found]


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


def _read_each(
    values: Mapping[str, list[Any]], read: Callable[[Any], _T], files: Mapping[str, Sequence[str]], where: str
) -> dict[str, list[_T | None]]:
    """What `read` makes of each value, by split; None of None. Its ValueError is told with the row."""

    def one(split: str, row: int, value: Any) -> _T | None:
        try:
            return None if value is None else read(value)
        except ValueError as error:
            raise DataError(f"{_row(where, files[split], row, value)}; {error}") from None

    return {split: [one(split, row, value) for row, value in enumerate(column)] for split, column in values.items()}


def _from_flags(value: Any, count: int) -> list[int]:
    found = _flags(value)
    if found is None or len(found) != count:
        raise ValueError(f"allowed for data.task multi_label: 0 or 1 for each of the {count} classes")
    return [number for number, flag in enumerate(found) if flag]


def _is_listed(value: Any) -> bool:
    """Whether a value is a text with a list in brackets."""
    text = value.strip() if isinstance(value, str) else ""
    return text[:1] == "[" and text[-1:] == "]"


def _divide(value: Any, separator: str | None) -> list[str]:
    """The labels in a text: a list as JSON or Python writes it, else what is between separators."""
    text = str(value).strip()
    if not _is_listed(text):
        return [part.strip() for part in text.split(separator)] if separator else [text]
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list) and all(isinstance(one, str | int) for one in found):
            return [str(one) for one in found]
    raise ValueError(
        'allowed: a list such as ["ant", "bee"], or labels between '
        f"{' or '.join(map(repr, SEPARATORS))}; [] for an image of none of the classes"
    )


def declared_names(tables: Mapping[str, Dataset], label: str) -> list[str]:
    """Names that tables declare for the classes of a column, those of train first."""
    order = sorted(tables, key=lambda split: split_in(split) != "train")
    kinds = [tables[split].features.get(label) for split in order]
    features = [getattr(kind, "feature", kind) for kind in kinds]
    return list(dict.fromkeys(name for one in features if isinstance(one, ClassLabel) for name in one.names))


def _indexed(
    values: Mapping[str, list[Any]], declared: list[str], files: Mapping[str, Sequence[str]], where: str
) -> LabelSets:
    """Lists of names or of indices, and the names of the classes in their natural order."""
    found = _read_each(values, partial(_names, declared=declared), files, where)
    met = {name for column in found.values() for labels in column for name in labels or ()}
    warn_of_nothing(met, declared, where)
    spellings = class_spellings(met, [name for name in map(label_text, declared) if name is not None], where)
    names = list(dict.fromkeys(spellings.values()))
    places = {name: place for place, name in enumerate(names)}
    return LabelSets(
        names,
        {
            split: [None if one is None else sorted({places[spellings[name]] for name in one}) for one in column]
            for split, column in found.items()
        },
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


def _tell_of_separators(values: Sequence[Any], where: str) -> None:
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
