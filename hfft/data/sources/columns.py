"""Which columns of a table are used for what: as asked, else by type, by name, or by their values."""

import dataclasses
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Image, Value

from hfft.data.sources.advice import check_header_row, check_paths
from hfft.data.sources.folders import endings
from hfft.data.sources.labels import Label, is_number, is_text
from hfft.data.sources.layout import (
    CLASS_FOLDER,
    SPLIT_WORDS,
    divide,
    folders_of,
    split_in,
    split_names,
    tells_no_class,
    words_of,
)
from hfft.data.sources.multi_label import class_list_columns, flag_columns
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec

PARENT_FOLDER = "parent_folder"  # stands for the folder of paths, as a group_column
_SAMPLE = 200  # values of a column that are read to see whether it holds paths or splits
_IMAGE_NAMES = ("file_name", "filename", "file", "path", "file_path", "filepath", "image", "image_path", "img")
_LABEL_NAMES = ("label", "labels", "class", "target", "category", "cls")
# As above, in any case and with any mark between words; those of well-known data sets among them.
_OTHER_LABEL_NAMES = frozenset(
    (
        *(*_LABEL_NAMES, "class_id", "class_name", "class_label", "classid", "classname", "label_id", "label_name"),
        *("category_id", "category_name", "categories", "classes", "tags", "ground_truth", "gt", "target_name", "y"),
        *("breed", "species", "variety", "disease", "diagnosis", "dx", "finding", "finding_labels", "choice"),
    )
)
# Words of columns that hold no classes, whatever they repeat.
_NO_LABELS = frozenset(
    (
        *("id", "ids", "uuid", "index", "idx", "unnamed", "number", "count", "hash", "md5", "url", "uri", "link"),
        *("file", "filename", "path", "filepath", "image", "img", "folder", "source", "origin", "license", "author"),
        *("patient", "subject", "person", "user", "annotator", "age", "sex", "gender", "date", "time", "timestamp"),
        *("year", "month", "day", "width", "height", "size", "resolution", "depth", "format", "bbox", "box", "roi"),
        *("xmin", "ymin", "xmax", "ymax", "lat", "lon", "latitude", "longitude", "location", "site", "camera", "view"),
        *("score", "confidence", "conf", "quality", "weight", "group", "fold", "split", "subset", "usage", "caption"),
        *("prediction", "predicted", "probability"),
    )
)


class NoColumnError(DataError):
    """A column that every table needs, where none fits."""


class SplitColumnError(DataError):
    """The column that holds the splits can't be decided."""


@dataclass(frozen=True)
class TableColumns:
    """The columns that a table of images is used by.

    Attributes:
        image: Images, their bytes, or their paths.
        label: Classes; or one column for each class.
        weight: Weight of each image; None for no such column.
        group: What is never divided between splits; None for no such column.
        split: Name of each row's split; None where a table is one split.
        has_paths: Whether `image` holds paths as text.
        unused: For each column that may hold splits and is not used, the reason.
    """

    image: str
    label: Label
    weight: str | None = None
    group: str | None = None
    split: str | None = None
    has_paths: bool = False
    unused: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """The columns of labels."""
        return (self.label,) if isinstance(self.label, str) else self.label

    def required(self) -> set[str]:
        """Columns that every table of a source must have."""
        chosen = {self.image, *self.labels, self.weight, self.group, self.split}
        return {name for name in chosen if name is not None} - {CLASS_FOLDER, PARENT_FOLDER}

    def described(self) -> str:
        """In words, for a plan."""
        label = ", ".join(self.labels)
        named = {"image": self.image, "label": label, "weight": self.weight, "group": self.group, "split": self.split}
        return ", ".join(f"{role} {name!r}" for role, name in named.items() if name is not None)


def choose_columns(rows: Dataset, spec: DataSpec, where: str, *, of_files: bool) -> TableColumns:
    """Which columns hold images, labels, weights, groups and splits.

    Raises:
        NoColumnError: If no column fits.
        SplitColumnError: If the column of splits can't be decided.
        DataError: If a column isn't there, or several fit.
    """
    if of_files:
        check_header_row(rows.column_names, where)
    images = _image_columns(rows)
    if of_files and not images:
        images = _path_columns(rows)
    image = _column(spec.image_column, images, rows, f"{where}: image_column")
    has_paths = of_files and is_text(rows.features[image])
    if has_paths:
        check_paths([path for path in rows[image][:_SAMPLE] if path], f"{where}: image_column: the column {image!r}")
    split, unused = _split_column(spec, rows, image, where)
    spec = dataclasses.replace(spec, split_column=split)
    asked = spec.weight_column
    weight = None if asked is None else _column(asked, [], rows, f"{where}: weight_column")
    label = _label(rows, spec, image, f"{where}: label_column", has_paths=has_paths)
    group = _group_column(spec.group_column, rows, has_paths, f"{where}: group_column")
    return TableColumns(image, label, weight, group, split, has_paths, unused)


def _column(asked: str | None, candidates: Sequence[str], rows: Dataset, where: str) -> str:
    if asked is not None:
        if asked not in rows.column_names:
            raise DataError(f"{where}: found {asked!r}; allowed: {', '.join(rows.column_names)}")
        return asked
    if len(candidates) == 1:
        return candidates[0]
    found = f"several fit ({', '.join(candidates)})" if candidates else "none fits"
    key = where.rpartition(" ")[2]
    example = next(iter(candidates), rows.column_names[-1])
    hint = "; ids are taken where images below the table's folder, or data.image_folder, are called so"
    raise (DataError if candidates else NoColumnError)(
        f"{where}: {found}; name one of {', '.join(rows.column_names)}, such as data.{key}={example}"
        f"{hint if key == 'image_column' and not candidates else ''}"
    )


def _group_column(asked: str | None, rows: Dataset, has_paths: bool, where: str) -> str | None:
    if asked is None or asked in rows.column_names or (asked == PARENT_FOLDER and has_paths):
        return asked
    extra = [PARENT_FOLDER] if has_paths else []
    raise DataError(f"{where}: found {asked!r}; allowed: {', '.join([*rows.column_names, *extra])}")


def normalized_name(name: str) -> str:
    """A column's name in small letters, with one mark between words."""
    return re.sub(r"[\W_]+", "_", name.strip().lower()).strip("_")


# Images


def first_paths(rows: Dataset, spec: DataSpec) -> list[str] | None:
    """The first paths of a table of paths; None for one that holds images, or has no column that looks like paths."""
    if _image_columns(rows):
        return None
    names = [spec.image_column] if spec.image_column in rows.column_names else _path_columns(rows)
    if len(names) != 1 or not is_text(rows.features[names[0]]):
        return []
    return [path for path in rows[names[0]][:_SAMPLE] if path]


def _image_columns(rows: Dataset) -> list[str]:
    images = [name for name, kind in rows.features.items() if isinstance(kind, Image)]
    return images or [name for name, kind in rows.features.items() if _is_content(kind)]


def _is_content(kind: Any) -> bool:
    """Whether a column holds the bytes of images, as Parquet files without datasets' own notes have them."""
    return kind in (Value("binary"), Value("large_binary"), Value("binary_view")) or (
        isinstance(kind, dict) and set(kind) == {"bytes", "path"}
    )


def _path_columns(rows: Dataset) -> list[str]:
    """Text columns that are called like paths, else those whose first values are."""
    texts = [name for name, kind in rows.features.items() if is_text(kind)]
    named = [name for name in _IMAGE_NAMES if name in texts]
    named = named or [name for known in _IMAGE_NAMES for name in texts if normalized_name(name) == known]
    return named[:1] or [name for name in texts if _are_paths([value for value in rows[name][:_SAMPLE] if value])]


def _are_paths(values: Sequence[str]) -> bool:
    return bool(values) and sum(Path(value).suffix.lower() in endings() for value in values) * 2 > len(values)


# Labels


def is_label_name(name: str) -> bool:
    """Whether a column is called like one of labels."""
    return normalized_name(name) in _OTHER_LABEL_NAMES


def _label(rows: Dataset, spec: DataSpec, image: str, where: str, *, has_paths: bool) -> Label:
    asked = spec.label_column
    if asked == CLASS_FOLDER and has_paths:
        return CLASS_FOLDER
    if isinstance(asked, tuple):
        return tuple(_column(name, [], rows, where) for name in asked)
    if asked is not None:
        return _column(asked, [], rows, where)
    found = [name for name in _declared_labels(rows, spec) or _named_labels(rows, image) if name != image]
    if found:
        return _column(None, found, rows, where)
    folders = _class_folders(rows, image) if has_paths else []
    flags = filter(is_split_flag, rows.column_names)
    others = [image, spec.weight_column, spec.group_column, spec.split_column, *flags]
    if spec.task == "multi_label" or (spec.task == "auto" and len(set(folders)) < 2):
        columns = flag_columns(rows, others, where)
        if columns:
            return columns
    columns = _repeating(rows, others)
    if folders:  # and columns that divide them further
        finer = [name for name in columns if len(set(zip(folders, rows[name][:], strict=True))) > len(set(folders))]
        columns = [CLASS_FOLDER, *finer]
    return _column(None, columns, rows, where)


def _declared_labels(rows: Dataset, spec: DataSpec) -> list[str]:
    """Columns of a type that data sets declare for classes."""
    several = class_list_columns(rows)
    single = [
        name for name, kind in rows.features.items() if isinstance(kind, ClassLabel) and name != spec.split_column
    ]
    return {"single_label": single, "multi_label": several}.get(spec.task, single or several)


def _named_labels(rows: Dataset, image: str) -> list[str]:
    """Columns with a name of labels; one of them where all hold the same classes, by name rather than number."""
    plain = [name for name in _LABEL_NAMES if name in rows.column_names and name != image]
    found = plain or [name for name in rows.column_names if is_label_name(name) and name != image]
    if plain or len(found) < 2:
        return found
    columns = [list(map(str, rows[name][:])) for name in found]
    if len({len(set(values)) for values in (*columns, zip(*columns, strict=True))}) > 1:
        return found
    words = [name for name, values in zip(found, columns, strict=True) if not all(map(is_number, values))]
    return [*words, *found][:1]


def _class_folders(rows: Dataset, image: str) -> list[str | None]:
    """The folder of each path that may name its class, below those of splits; nothing where no names are classes."""
    if CLASS_FOLDER in rows.column_names:  # of a tar file's members
        found = rows[CLASS_FOLDER][:]
    else:
        paths = list(map(folders_of, rows[image][:]))
        divided = divide(paths)
        found = [folders[0] if folders else None for folders in (paths if divided is None else divided[1])]
    names = {name for name in found if name is not None}
    return [] if not names or tells_no_class(names) else found


def _repeating(rows: Dataset, without: Collection[str | None]) -> list[str]:
    """Columns of text or whole numbers that may hold classes: values that repeat, under a name of nothing else."""
    found, flags = [], []
    for name, kind in rows.features.items():
        is_plain = isinstance(kind, Value) and kind.dtype.startswith(("string", "large_string", "int", "uint", "bool"))
        if not is_plain or name in without or not _NO_LABELS.isdisjoint(words_of(name)):
            continue
        values = [str(value) for value in rows[name][:] if value is not None]
        are_measures = all("." in value and is_number(value) for value in values)
        if 2 <= len(set(values)) <= len(values) / 2 and not are_measures:
            (flags if set(values) <= {"0", "1"} else found).append(name)
    return found + flags if len(flags) < 2 else found  # several of 0 and 1 are several labels


# Splits


def is_split_flag(name: str) -> bool:
    """Whether a column is called like one that marks the rows of a split: `is_valid`."""
    words = words_of(name)
    return len(words) == 2 and words[0] == "is" and split_in(words[1]) is not None


def split_values(rows: Dataset, column: str, most: int | None = None) -> list[str | None]:
    """Each row's split as text without spaces around it, or those of the first rows; None where there is none."""
    feature, values = rows.features[column], rows[column][:most]
    if isinstance(feature, ClassLabel):
        values = [None if value is None or value < 0 else feature.names[value] for value in values]
    texts = [None if value is None else str(value).strip() for value in values]
    return [None if text is None or text.lower() in ("", "nan", "none", "null") else text for text in texts]


def _split_column(spec: DataSpec, rows: Dataset, image: str, where: str) -> tuple[str | None, tuple[str, ...]]:
    """The one asked for; else one that is called `split`, or that holds names of splits alone.

    Returns:
        The column, or None; and for each other that may hold splits, why it is not used.
    """
    if spec.split_column is not None:
        if spec.split_column in rows.column_names:
            return spec.split_column, ()
        raise SplitColumnError(
            f"{where}: split_column: found {spec.split_column!r}; allowed: {', '.join(rows.column_names)}"
        )
    labels = spec.label_column if isinstance(spec.label_column, tuple) else (spec.label_column,)
    taken = (image, spec.weight_column, spec.group_column, *labels)
    found, unused = [], []
    for name, kind in rows.features.items():
        if name in taken:
            continue
        if is_split_flag(name):
            unused.append(f"the column {name!r} is not used; name train, validation and test in a column called split")
        elif _is_short(kind) and (normalized_name(name) == "split" or _holds_split_words(rows, name)):
            reason = _why_no_splits(rows, name, where)
            if reason is None:
                found.append(name)
            else:
                unused.append(
                    f"the column {name!r} is not used for splits, as {reason}; data.split_column={name} with "
                    "data.splits.train=..., ... takes it"
                )
    called = [name for name in found if normalized_name(name) == "split"]
    if len(found) < 2 or len(called) == 1:
        return next(iter(called or found), None), tuple(unused)
    raise SplitColumnError(
        f"{where}: split_column: several fit ({', '.join(found)}); name one: data.split_column={found[0]}"
    )


def _is_short(kind: Any) -> bool:
    is_plain = isinstance(kind, Value) and kind.dtype.startswith(("string", "large_string", "int64"))
    return is_plain or isinstance(kind, ClassLabel)


def _holds_split_words(rows: Dataset, name: str) -> bool:
    """Whether most of a column's values have a split's word, of two splits or more."""
    sample = [value for value in split_values(rows, name, _SAMPLE) if value is not None and split_in(value)]
    if 2 * len(sample) <= min(len(rows), _SAMPLE):
        return False
    met = {value for value in split_values(rows, name) if value is not None}
    return len(set(map(split_in, met)) - {None}) > 1 and not any("/" in value for value in met)  # in paths


def _why_no_splits(rows: Dataset, name: str, where: str) -> str | None:
    """Why a column that may hold splits does not; None where it does."""
    values, is_called = split_values(rows, name), normalized_name(name) == "split"
    known = split_names(value for value in values if value is not None)
    odd = next((value for value in values if value is not None and value not in known), None)
    if known and odd is None and (is_called or None not in values):
        return None
    if known and is_called:
        raise SplitColumnError(
            f"{where}: split_column: the column {name!r} holds {odd!r} in row {values.index(odd)} as well as names of "
            f"splits; say data.split_column={name} and which is which (data.splits.train=... .validation=... "
            f".test=...), or rename the column; known names: {', '.join(SPLIT_WORDS)}"
        )
    return f"no name of a split is {odd!r}" if odd is not None else f"row {values.index(None)} holds nothing"
