"""What an image is trained towards where that is more than its class: labels, shares of classes, and its weight."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, List, Value
from datasets.features import LargeList
from datasets.features import Sequence as SequenceOf

from hfft.data.sources.labels import is_multi_label, labels_of
from hfft.errors import DataError

SHARES = "shares"  # column of rows: (K,) shares of the classes
WEIGHT = "weight"  # column of rows: of the image in the loss
_TOLERANCE = 1e-3  # of a sum of shares


def read_shares(rows: Dataset, columns: str | tuple[str, ...], files: Sequence[str], where: str) -> np.ndarray:
    """Shares of the classes, (N, K) float32, that sum to 1.

    Args:
        rows: A table.
        columns: One with lists of shares, or one for each class.
        files: Name of each row.
        where: Names the source in errors.

    Raises:
        DataError: With the first row that holds something else.
    """
    if isinstance(columns, str):
        values = rows[columns][:]
    else:
        values = list(zip(*(rows[name][:] for name in columns), strict=True))
    found: list[list[float]] = []
    for place, row in enumerate(values):
        shares = _numbers(row) if are_shares(row) else None
        if shares is None or len(shares) != len(values[0]):
            shown = list(row) if isinstance(row, tuple | list) else row
            raise DataError(
                f"{where}: label_column: row {place} ({files[place]}) holds {shown!r}; allowed: a share of 0 or more "
                "for each class, which sum to 1; or in all rows 0 or 1 for each class (data.task: multi_label)"
            )
        found.append(shares)
    return np.asarray(found, dtype=np.float32)


def are_shares(row: Any) -> bool:
    """Whether a row holds shares: numbers of 0 or more that sum to 1."""
    found = None if row is None else _numbers(row)
    return found is not None and min(found) >= 0 and abs(sum(found) - 1) <= _TOLERANCE


def read_weights(rows: Dataset, column: str, files: Sequence[str], where: str) -> np.ndarray:
    """The weight of each image, (N,) float32.

    Raises:
        DataError: With the first row whose weight is no number above 0.
    """
    found = _numbers(rows[column][:])
    if found is not None and min(found) > 0:
        return np.asarray(found, dtype=np.float32)
    for place, value in enumerate(rows[column][:]):
        number = _numbers([value])
        if number is None or number[0] <= 0:
            raise DataError(
                f"{where}: weight_column: row {place} ({files[place]}) holds {value!r}; allowed: a number above 0"
            )
    raise DataError(f"{where}: weight_column: the column {column!r} is empty")


def holds_lists(rows: Dataset, column: str) -> bool:
    """Whether a column holds lists of floating-point numbers."""
    kind = rows.features[column]
    inner = getattr(kind, "feature", None)
    return isinstance(kind, List | LargeList | SequenceOf) and inner in (Value("float32"), Value("float64"))


def targets_of(rows: Dataset, classes: int) -> np.ndarray | None:
    """What rows are trained towards, (N, K) float32: 0 and 1 of multi-label rows; shares times weight.

    None where class indices say it all.
    """
    if is_multi_label(rows):
        return labels_of(rows).astype(np.float32)
    names = rows.column_names
    if SHARES not in names and WEIGHT not in names:
        return None
    if SHARES in names:
        shares = np.asarray(rows[SHARES][:], dtype=np.float32)
    else:
        shares = np.eye(classes, dtype=np.float32)[np.asarray(rows["label"][:])]
    if WEIGHT in names:
        shares = shares * np.asarray(rows[WEIGHT][:], dtype=np.float32)[:, None]
    return shares


def _numbers(values: Sequence[object]) -> list[float] | None:
    """Finite numbers, also from text; None if one of them is none."""
    try:
        found = [float(value) for value in values]  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        return None
    return found if found and all(np.isfinite(found)) else None
