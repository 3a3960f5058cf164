"""Which columns of a table of images are used for what."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, Value

from hfft.data.sources.advice import check_header, check_paths
from hfft.data.sources.folders import endings
from hfft.data.sources.label_columns import label_candidates, plain_name
from hfft.data.sources.label_values import is_text
from hfft.data.sources.layout import CLASS_FOLDER
from hfft.data.sources.split_columns import find_split_column
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec

PARENT_FOLDER = "parent_folder"  # stands for the folder of paths, as a group_column
_IMAGE_NAMES = ("file_name", "filename", "file", "path", "file_path", "filepath", "image", "image_path", "img")
_SAMPLE = 200  # values that are looked at to see whether a column holds paths


class NoColumnError(DataError):
    """A column that every table needs, where none fits."""


@dataclass(frozen=True)
class Columns:
    """The columns that a table of images is used by.

    Attributes:
        image: Images, their bytes, or their paths.
        label: Classes; or one column for each class.
        weight: Weight of each image; None for no such column.
        group: What is never divided between splits; None for no such column.
        split: Name of each row's split; None where a table is one split.
        has_paths: Whether `image` holds paths as text.
        unused: For each column that may tell splits and doesn't, that it is not used.
    """

    image: str
    label: str | tuple[str, ...]
    weight: str | None
    group: str | None
    split: str | None
    has_paths: bool
    unused: tuple[str, ...] = ()

    def named(self) -> list[str]:
        """Columns that every table of a source must have."""
        labels = (self.label,) if isinstance(self.label, str) else self.label
        chosen = (self.image, *labels, self.weight, self.group, self.split)
        return [name for name in chosen if name is not None and name not in (CLASS_FOLDER, PARENT_FOLDER)]

    def described(self) -> str:
        """In words, for a plan."""
        label = self.label if isinstance(self.label, str) else ", ".join(self.label)
        named = {"image": self.image, "label": label, "weight": self.weight, "group": self.group, "split": self.split}
        return ", ".join(f"{role} {name!r}" for role, name in named.items() if name is not None)


def choose_columns(table: Dataset, spec: DataSpec, where: str, *, of_files: bool) -> Columns:
    """Which columns hold images, labels, groups and splits: as asked, else by type, else by name.

    Args:
        table: Rows with any columns.
        spec: For what was asked.
        where: Names the source in errors.
        of_files: Whether text may be paths.

    Raises:
        NoColumnError: If no column fits.
        SplitColumnError: If the column of splits can't be told.
        DataError: If a column isn't there, or several fit.
    """
    if of_files:
        check_header(table.column_names, where)
    images = _columns_of(table, Image) or [name for name, kind in table.features.items() if _is_content(kind)]
    if of_files and not images:
        images = _path_columns(table)
    image = _column(spec.image_column, images, table, f"{where}: image_column")
    has_paths = of_files and is_text(table.features[image])
    if has_paths:
        check_paths([name for name in table[image][:_SAMPLE] if name], f"{where}: image_column: the column {image!r}")
    split, unused = find_split_column(spec, table, image, where)
    spec = dataclasses.replace(spec, split_column=split)
    candidates = label_candidates(table, spec, image, f"{where}: label_column", has_paths=has_paths)
    return Columns(
        image=image,
        label=_label_columns(spec.label_column, candidates, table, f"{where}: label_column"),
        weight=None
        if spec.weight_column is None
        else _column(spec.weight_column, [], table, f"{where}: weight_column"),
        group=_group_column(spec.group_column, table, has_paths, f"{where}: group_column"),
        split=split,
        has_paths=has_paths,
        unused=unused,
    )


def path_names(table: Dataset, spec: DataSpec) -> list[str] | None:
    """The first paths of a table of paths; None for one that holds images, or has no column that looks like paths."""
    if _columns_of(table, Image) or any(map(_is_content, table.features.values())):
        return None
    names = [spec.image_column] if spec.image_column in table.column_names else _path_columns(table)
    if len(names) != 1 or not is_text(table.features[names[0]]):
        return []
    return [name for name in table[names[0]][:_SAMPLE] if name]


def _columns_of(table: Dataset, feature: type) -> list[str]:
    return [name for name, kind in table.features.items() if isinstance(kind, feature)]


def _is_content(kind: Any) -> bool:
    """Whether a column holds the bytes of images, as Parquet files without datasets' own notes have them."""
    return kind in (Value("binary"), Value("large_binary"), Value("binary_view")) or (
        isinstance(kind, dict) and set(kind) == {"bytes", "path"}
    )


def _path_columns(table: Dataset) -> list[str]:
    """Text columns that are called like paths, else those whose first values are."""
    texts = [name for name, kind in table.features.items() if is_text(kind)]
    named = [name for name in _IMAGE_NAMES if name in texts]
    named = named or [name for known in _IMAGE_NAMES for name in texts if plain_name(name) == known]
    if named:
        return named[:1]
    sample = table.select(range(min(len(table), _SAMPLE)))
    return [name for name in texts if _are_paths([value for value in sample[name][:] if value])]


def _are_paths(values: Sequence[str]) -> bool:
    return bool(values) and sum(Path(value).suffix.lower() in endings() for value in values) * 2 > len(values)


def _column(asked: str | None, candidates: list[str], table: Dataset, where: str) -> str:
    if asked is not None:
        if asked not in table.column_names:
            raise DataError(f"{where}: found {asked!r}; allowed: {', '.join(table.column_names)}")
        return asked
    if len(candidates) == 1:
        return candidates[0]
    found = f"several fit ({', '.join(candidates)})" if candidates else "none fits"
    key = where.rpartition(" ")[2]
    example = next(iter(candidates), table.column_names[-1])
    hint = "; ids are taken where images below the table's folder, or data.image_folder, are called so"
    raise (DataError if candidates else NoColumnError)(
        f"{where}: {found}; name one of {', '.join(table.column_names)}, such as data.{key}={example}"
        f"{hint if key == 'image_column' and not candidates else ''}"
    )


def _label_columns(
    asked: str | tuple[str, ...] | None, candidates: list[str] | tuple[str, ...], table: Dataset, where: str
) -> str | tuple[str, ...]:
    if asked is None and isinstance(candidates, tuple):
        return candidates
    candidates = list(candidates)
    if asked == CLASS_FOLDER and candidates == [CLASS_FOLDER]:
        return CLASS_FOLDER
    if asked is None or isinstance(asked, str):
        return _column(asked, candidates, table, where)
    return tuple(_column(name, [], table, where) for name in asked)


def _group_column(asked: str | None, table: Dataset, has_paths: bool, where: str) -> str | None:
    if asked is None or asked in table.column_names:
        return asked
    if asked == PARENT_FOLDER and has_paths:
        return asked
    extra = [PARENT_FOLDER] if has_paths else []
    raise DataError(f"{where}: found {asked!r}; allowed: {', '.join([*table.column_names, *extra])}")
