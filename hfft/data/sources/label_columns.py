"""Which columns of a table hold its labels: by type, by name, else by what repeats."""

import re
from collections.abc import Collection

from datasets import ClassLabel, Dataset, Value

from hfft.data.sources.folders import split_in, words_of
from hfft.data.sources.label_sets import flag_columns, list_columns
from hfft.data.sources.label_values import is_number
from hfft.data.sources.layout import CLASS_FOLDER, divide, folders_of, tells_no_class
from hfft.recipe.spec import DataSpec

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


def label_candidates(
    table: Dataset, spec: DataSpec, image: str, where: str, *, has_paths: bool
) -> list[str] | tuple[str, ...]:
    """Columns that may hold the labels; a tuple of them holds 0 and 1 for each class."""
    sets = list_columns(table)
    kinds = table.features.items()
    single = [name for name, kind in kinds if isinstance(kind, ClassLabel) and name != spec.split_column]
    declared = {"single_label": single, "multi_label": sets}.get(spec.task, single or sets)
    found = declared or [name for name in _LABEL_NAMES if name in table.column_names and name != image]
    found = found or _called_labels(table, image)
    found = [name for name in found if name != image]
    if spec.label_column == CLASS_FOLDER and has_paths:
        return [CLASS_FOLDER]
    if found or spec.label_column is not None:
        return found
    folders = _class_folders(table, image) if has_paths else []
    others = [
        image,
        spec.weight_column,
        spec.group_column,
        spec.split_column,
        *filter(is_split_flag, table.column_names),
    ]
    if spec.task == "multi_label" or (spec.task == "auto" and len(set(folders)) < 2):
        flags = flag_columns(table, others, where)
        if flags:
            return flags
    columns = _repeating(table, others)
    if not folders:
        return columns
    others = [name for name in columns if len(set(zip(folders, table[name][:], strict=True))) > len(set(folders))]
    return [CLASS_FOLDER, *others]


def _called_labels(table: Dataset, image: str) -> list[str]:
    """Columns with another name of labels; one of them where all tell the same classes, by name rather than number."""
    found = [name for name in table.column_names if is_label_name(name) and name != image]
    if len(found) < 2:
        return found
    columns = [list(map(str, table[name][:])) for name in found]
    if len({len(set(values)) for values in (*columns, zip(*columns, strict=True))}) > 1:
        return found
    words = [name for name, values in zip(found, columns, strict=True) if not all(map(is_number, values))]
    return [*words, *found][:1]


def _class_folders(table: Dataset, image: str) -> list[str | None]:
    """The folder of each path that may name its class, below those of splits; nothing where no names tell classes."""
    if CLASS_FOLDER in table.column_names:  # of a tar file's members
        found = table[CLASS_FOLDER][:]
    else:
        paths = list(map(folders_of, table[image][:]))
        divided = divide(paths)
        found = [folders[0] if folders else None for folders in (paths if divided is None else divided[1])]
    names = {name for name in found if name is not None}
    return [] if not names or tells_no_class(names) else found


def _repeating(table: Dataset, without: Collection[str | None]) -> list[str]:
    """Columns of text or whole numbers that may hold classes: values that come again, under a name of nothing else."""
    found, flags = [], []
    for name, kind in table.features.items():
        is_plain = isinstance(kind, Value) and kind.dtype.startswith(("string", "large_string", "int", "uint", "bool"))
        if not is_plain or name in without or not _NO_LABELS.isdisjoint(words_of(name)):
            continue
        values = [str(value) for value in table[name][:] if value is not None]
        are_measures = all("." in value and is_number(value) for value in values)
        if 2 <= len(set(values)) <= len(values) / 2 and not are_measures:
            (flags if set(values) <= {"0", "1"} else found).append(name)
    return found + flags if len(flags) < 2 else found  # several of 0 and 1 are several labels


def is_label_name(name: str) -> bool:
    """Whether a column is called like one of labels."""
    return plain_name(name) in _OTHER_LABEL_NAMES


def is_split_flag(name: str) -> bool:
    """Whether a column is called like one that marks the rows of a split: `is_valid`."""
    words = words_of(name)
    return len(words) == 2 and words[0] == "is" and split_in(words[1]) is not None


def plain_name(name: str) -> str:
    """A column's name in small letters, with one mark between words."""
    return re.sub(r"[\W_]+", "_", name.strip().lower()).strip("_")
