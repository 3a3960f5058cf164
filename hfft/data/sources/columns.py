"""Which columns of a table are used for what: as asked, else by type, by name, or by their values."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Image, Value

from hfft.data.sources.advice import check_header_row, check_paths
from hfft.data.sources.folders import (
    CLASS_FOLDER,
    SPLIT_WORDS,
    divide,
    endings,
    folders_of,
    split_in,
    split_names,
    tells_no_class,
    words_of,
)
from hfft.data.sources.labels import Label, is_number, is_text
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec

PARENT_FOLDER = "parent_folder"  # stands for the folder of paths, as a group_column
_SAMPLE = 200  # values of a column that are read to see what it holds
_CONTENT = (Value("binary"), Value("large_binary"), Value("binary_view"), {"bytes", "path"})
_FLAGS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
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
    """The columns that a table of images is used by."""

    image: str  # images, their bytes, or their paths
    label: Label
    weight: str | None = None
    group: str | None = None  # what is never divided between splits
    split: str | None = None  # name of each row's split; None where a table is one split
    has_paths: bool = False  # as text in `image`
    unused: tuple[str, ...] = ()  # the reason, for each column that may hold splits and is not used

    @property
    def labels(self) -> tuple[str, ...]:
        """The columns of labels."""
        return (self.label,) if isinstance(self.label, str) else self.label

    @property
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
    """Which columns hold images, labels, weights, groups and splits; a DataError where that can't be decided."""
    if of_files:
        check_header_row(rows.column_names, where)
    names = rows.column_names
    images = _image_columns(rows) or (_path_columns(rows) if of_files else [])
    image = _column(spec.image_column, images, names, f"{where}: image_column")
    has_paths = of_files and is_text(rows.features[image])
    if has_paths:
        check_paths([path for path in rows[image][:_SAMPLE] if path], f"{where}: image_column: the column {image!r}")
    split, unused = _split_column(spec, rows, image, f"{where}: split_column")
    weight, group = spec.weight_column, spec.group_column
    if weight is not None:
        _check_asked(weight, names, f"{where}: weight_column")
    label = _label(rows, replace(spec, split_column=split), image, f"{where}: label_column", has_paths=has_paths)
    if group is not None:
        _check_asked(group, [*names, PARENT_FOLDER] if has_paths else names, f"{where}: group_column")
    return TableColumns(image, label, weight, group, split, has_paths, unused)


def _check_asked(name: str, allowed: Collection[str], where: str, error: type[DataError] = DataError) -> None:
    if name not in allowed:
        raise error(f"{where}: found {name!r}; allowed: {', '.join(allowed)}")


def _column(asked: str | None, fitting: Sequence[str], names: Sequence[str], where: str) -> str:
    """The column that was asked for, else the one that fits; `where` ends with the key that names it."""
    if asked is not None:
        _check_asked(asked, names, where)
        return asked
    if len(fitting) == 1:
        return fitting[0]
    key = where.rpartition(" ")[2]
    advice = f"name one of {', '.join(names)}, such as data.{key}={next(iter(fitting), names[-1])}"
    if fitting:
        raise DataError(f"{where}: several fit ({', '.join(fitting)}); {advice}")
    if key == "image_column":
        advice += "; ids are taken where images below the table's folder, or data.image_folder, are called so"
    raise NoColumnError(f"{where}: none fits; {advice}")


def normalized_name(name: str) -> str:
    """A column's name in small letters, with one mark between words."""
    return re.sub(r"[\W_]+", "_", name.strip().lower()).strip("_")


def _is_plain(kind: Any, *others: str) -> bool:
    """Whether a column holds texts or whole numbers, or others of Arrow's types."""
    return isinstance(kind, Value) and kind.dtype.startswith(("string", "large_string", "int", *others))


# Images


def first_paths(rows: Dataset, spec: DataSpec) -> list[str] | None:
    """The first paths of a table of paths; None for one that holds images; empty where no column looks like paths."""
    if _image_columns(rows):
        return None
    names = [spec.image_column] if spec.image_column in rows.column_names else _path_columns(rows)
    if len(names) != 1 or not is_text(rows.features[names[0]]):
        return []
    return [path for path in rows[names[0]][:_SAMPLE] if path]


def _image_columns(rows: Dataset) -> list[str]:
    """Columns of images, else those of their bytes, as Parquet files without datasets' own notes have them."""
    kinds = {name: set(kind) if isinstance(kind, dict) else kind for name, kind in rows.features.items()}
    images = [name for name, kind in kinds.items() if isinstance(kind, Image)]
    return images or [name for name, kind in kinds.items() if kind in _CONTENT]


def _path_columns(rows: Dataset) -> list[str]:
    """Text columns that are called like paths, else those whose first values are."""
    texts = [name for name, kind in rows.features.items() if is_text(kind)]
    named = [name for name in _IMAGE_NAMES if name in texts]
    named = named or [name for known in _IMAGE_NAMES for name in texts if normalized_name(name) == known]
    samples = {name: [value for value in rows[name][:_SAMPLE] if value] for name in ([] if named else texts)}
    read = endings()
    return named[:1] or [
        name
        for name, values in samples.items()
        if sum(Path(value).suffix.lower() in read for value in values) * 2 > len(values)
    ]


# Labels


def is_label_name(name: str) -> bool:
    """Whether a column is called like one of labels."""
    return normalized_name(name) in _OTHER_LABEL_NAMES


def _label(rows: Dataset, spec: DataSpec, image: str, where: str, *, has_paths: bool) -> Label:
    names, asked = rows.column_names, spec.label_column
    if asked == CLASS_FOLDER and has_paths:
        return CLASS_FOLDER
    if isinstance(asked, tuple):
        return tuple(_column(name, [], names, where) for name in asked)
    fitting = [name for name in _declared_labels(rows, spec) or _named_labels(rows, image) if name != image]
    if asked is not None or fitting:
        return _column(asked, fitting, names, where)
    folders = _class_folders(rows, image) if has_paths else []
    others = [image, spec.weight_column, spec.group_column, spec.split_column, *filter(is_split_flag, names)]
    if spec.task == "multi_label" or (spec.task == "auto" and len(set(folders)) < 2):
        columns = _flag_columns(rows, others, where)
        if columns:
            return columns
    columns = _repeating(rows, others)
    if folders:  # and columns that divide them further
        finer = [name for name in columns if len(set(zip(folders, rows[name][:], strict=True))) > len(set(folders))]
        columns = [CLASS_FOLDER, *finer]
    return _column(None, columns, names, where)


def _declared_labels(rows: Dataset, spec: DataSpec) -> list[str]:
    """Columns of a type that data sets declare for classes."""
    kinds = rows.features
    several = [name for name, kind in kinds.items() if isinstance(getattr(kind, "feature", None), ClassLabel)]
    single = [name for name, kind in kinds.items() if isinstance(kind, ClassLabel) and name != spec.split_column]
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
        if not _is_plain(kind, "uint", "bool") or name in without or not _NO_LABELS.isdisjoint(words_of(name)):
            continue
        values = [str(value) for value in rows[name][:] if value is not None]
        are_measures = all("." in value and is_number(value) for value in values)
        if 2 <= len(set(values)) <= len(values) / 2 and not are_measures:
            (flags if set(values) <= {"0", "1"} else found).append(name)
    return found + flags if len(flags) < 2 else found  # several of 0 and 1 are several labels


def _flag_columns(rows: Dataset, without: Collection[str | None], where: str) -> tuple[str, ...]:
    """Columns that hold 0 and 1 alone, two or more of them; else none.

    Refuses the first other value of a column that holds mostly 0 and 1, which a guess would leave out.
    """
    found, problem = [], None
    for name, kind in rows.features.items():
        if name in without or not isinstance(kind, Value | ClassLabel) or len(rows) == 0:
            continue
        sample = rows[name][:_SAMPLE]
        if 2 * sum(flags_of([value]) is not None for value in sample) < len(sample):
            continue
        values = rows[name][:]
        odd = next((row for row, value in enumerate(values) if flags_of([value]) is None), None)
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


def flags_of(value: Any) -> list[int] | None:
    """A row of 0 and 1, also as text; None if there is anything else in it, or it is no list."""
    found = [_FLAGS.get(str(one).strip().lower()) for one in value] if isinstance(value, list) else [None]
    return None if None in found else [int(one or 0) for one in found]


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
    """The column asked for; else one that is called `split`, or that holds names of splits alone; or None.

    And for each other column that may hold splits, why it is not used.
    """
    if spec.split_column is not None:
        _check_asked(spec.split_column, rows.column_names, where, SplitColumnError)
        return spec.split_column, ()
    labels = spec.label_column if isinstance(spec.label_column, tuple) else (spec.label_column,)
    taken = (image, spec.weight_column, spec.group_column, *labels)
    found, unused = [], []
    for name, kind in rows.features.items():
        if name in taken:
            continue
        if is_split_flag(name):
            unused.append(f"the column {name!r} is not used; name train, validation and test in a column called split")
        elif _may_hold_splits(rows, name, kind):
            reason = _why_no_splits(rows, name, where)
            if reason is None:
                found.append(name)
            else:
                unused.append(
                    f"the column {name!r} is not used for splits, as {reason}; data.split_column={name} with "
                    "data.splits.train=..., ... takes it"
                )
    called = [name for name in found if _is_called_split(name)]
    if len(found) < 2 or len(called) == 1:
        return next(iter(called or found), None), tuple(unused)
    raise SplitColumnError(f"{where}: several fit ({', '.join(found)}); name one: data.split_column={found[0]}")


def _is_called_split(name: str) -> bool:
    return normalized_name(name) == "split"


def _may_hold_splits(rows: Dataset, name: str, kind: Any) -> bool:
    """Whether a column is called `split`, or most of its values have a split's word, of two splits or more."""
    if not (isinstance(kind, ClassLabel) or _is_plain(kind)):
        return False
    if _is_called_split(name):
        return True
    sample = [value for value in split_values(rows, name, _SAMPLE) if value is not None and split_in(value)]
    if 2 * len(sample) <= min(len(rows), _SAMPLE):
        return False
    met = {value for value in split_values(rows, name) if value is not None}
    return len(set(map(split_in, met)) - {None}) > 1 and not any("/" in value for value in met)  # in paths


def _why_no_splits(rows: Dataset, name: str, where: str) -> str | None:
    """Why a column that may hold splits does not; None where it does."""
    values, is_called = split_values(rows, name), _is_called_split(name)
    known = split_names(value for value in values if value is not None)
    odd = next((value for value in values if value is not None and value not in known), None)
    if known and odd is None and (is_called or None not in values):
        return None
    if known and is_called:
        raise SplitColumnError(
            f"{where}: the column {name!r} holds {odd!r} in row {values.index(odd)} as well as names of splits; say "
            f"data.split_column={name} and which is which (data.splits.train=... .validation=... .test=...), or "
            f"rename the column; known names: {', '.join(SPLIT_WORDS)}"
        )
    return f"no name of a split is {odd!r}" if odd is not None else f"row {values.index(None)} holds nothing"
