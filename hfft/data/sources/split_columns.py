"""Which column of a table tells the split of each row, and the rows by its values."""

from typing import Any

from datasets import ClassLabel, Dataset, Value

from hfft.data.sources.folders import SPLIT_WORDS, split_in
from hfft.data.sources.label_columns import is_split_flag, plain_name
from hfft.data.sources.layout import split_names
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec

_SAMPLE = 200  # values of a column that are looked at to see whether it may hold splits


class SplitColumnError(DataError):
    """Which column tells the splits can't be told."""


def find_split_column(spec: DataSpec, table: Dataset, image: str, where: str) -> tuple[str | None, tuple[str, ...]]:
    """The one asked for; else one that is called `split`, or that holds names of splits alone.

    Returns:
        The column, or None; and for each other that may tell splits, that it is not used.

    Raises:
        SplitColumnError: If a column called `split` holds some names of splits and something else, or several fit.
    """
    if spec.split_column is not None:
        if spec.split_column in table.column_names:
            return spec.split_column, ()
        raise SplitColumnError(
            f"{where}: split_column: found {spec.split_column!r}; allowed: {', '.join(table.column_names)}"
        )
    labels = spec.label_column if isinstance(spec.label_column, tuple) else (spec.label_column,)
    taken = (image, spec.weight_column, spec.group_column, *labels)
    found, unused = [], []
    for name, kind in table.features.items():
        if name in taken or not (_is_short(kind) or is_split_flag(name)):
            continue
        if is_split_flag(name):
            unused.append(f"the column {name!r} is not used; tell train, validation and test in a column called split")
            continue
        is_called = plain_name(name) == "split"
        if not is_called and not _may_tell(table, name):
            continue
        values = _split_values(table, name)
        known = split_names(value for value in values if value is not None)
        odd = next((value for value in values if value is not None and value not in known), None)
        if known and odd is None and (is_called or None not in values):
            found.append(name)
        elif known and is_called:
            raise SplitColumnError(
                f"{where}: split_column: the column {name!r} holds {odd!r} in row {values.index(odd)} beside names of "
                f"splits; say data.split_column={name} and which is which (data.splits.train=... .validation=... "
                f".test=...), or rename the column; known names: {', '.join(SPLIT_WORDS)}"
            )
        else:
            reason = f"no name of a split is {odd!r}" if odd is not None else f"row {values.index(None)} holds nothing"
            unused.append(
                f"the column {name!r} is not used for splits, as {reason}; data.split_column={name} with "
                "data.splits.train=..., ... takes it"
            )
    called = [name for name in found if plain_name(name) == "split"]
    if len(found) < 2 or len(called) == 1:
        return next(iter(called or found), None), tuple(unused)
    raise SplitColumnError(
        f"{where}: split_column: several fit ({', '.join(found)}); name one: data.split_column={found[0]}"
    )


def _may_tell(table: Dataset, name: str) -> bool:
    """Whether most of a column's values have a split's word, of two splits or more."""
    sample = [value for value in _split_values(table, name, _SAMPLE) if value is not None and split_in(value)]
    if 2 * len(sample) <= min(len(table), _SAMPLE):
        return False
    met = {value for value in _split_values(table, name) if value is not None}
    return len(set(map(split_in, met)) - {None}) > 1 and not any("/" in value for value in met)  # in paths


def _is_short(kind: Any) -> bool:
    is_text = isinstance(kind, Value) and kind.dtype.startswith(("string", "large_string", "int64"))
    return is_text or isinstance(kind, ClassLabel)


def split_by_column(table: Dataset, column: str | None, where: str) -> dict[str, Dataset]:
    """Rows by the values of a column, as text, whatever its case and spaces; all of them as `train` without one.

    Raises:
        DataError: If a row has no value.
    """
    if column is None:
        return {"train": table}
    values = _split_values(table, column)
    if None in values:
        raise DataError(
            f"{where}: split_column: the column {column!r} holds nothing in {values.count(None)} of {len(values)} "
            f"rows, the first is row {values.index(None)}; fill them in, or rename the column"
        )
    known = split_names(map(str, values))
    names: dict[str, str] = {}
    places: dict[str, list[int]] = {}
    for place, value in enumerate(map(str, values)):
        name = known.get(value, value)
        places.setdefault(names.setdefault(name.lower(), name), []).append(place)
    return {name: table.select(rows) for name, rows in places.items()}


def _split_values(table: Dataset, column: str, most: int | None = None) -> list[str | None]:
    """Each row's split as text without spaces around it, or those of the first rows; None where there is none."""
    feature, values = table.features[column], table[column][:most]
    if isinstance(feature, ClassLabel):
        values = [None if value is None or value < 0 else feature.names[value] for value in values]
    texts = [None if value is None else str(value).strip() for value in values]
    return [None if text is None or text.lower() in ("", "nan", "none", "null") else text for text in texts]
