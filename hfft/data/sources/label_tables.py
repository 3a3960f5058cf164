"""Tables of labels that lie beside loose images, as Kaggle and Roboflow have them: which image each row means.

A row names its image by a path, a file name, or an id without ending.
"""

import dataclasses
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from datasets import Dataset, Value, concatenate_datasets

from hfft.data.images.decoding import stored_path
from hfft.data.sources.advice import advice_for, check_header, check_paths, not_found
from hfft.data.sources.folders import endings, image_files, is_image, split_in, splits_of, visible_files, words_of
from hfft.data.sources.layout import ALLOWED, CLASS_FOLDER
from hfft.data.sources.loading import read_table
from hfft.data.sources.rows import Table
from hfft.data.sources.tables import Columns, NoColumnError, choose_columns, path_names
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec
from hfft.system.paths import expanded
from hfft.system.text import path_text

_SAMPLE = 200  # values of a column that are looked at to see whether it names images
_MOST = 1_000_000  # files that are looked through for the images of a table
_ASIDE = "hfft's own: the column that is replaced"
_UPLOADED = re.compile(r"^[0-9a-f]{8}-")  # what Label Studio puts in front of a file's name


class UndecidedError(DataError):
    """A table names images, and which of its columns holds their labels can't be told."""


@dataclass(frozen=True)
class Listed:
    """Tables that name the images of a folder and their labels.

    Attributes:
        tables: By split.
        words: What is left out.
        labels: Folders below that of the images, each with every label of its images.
        columns: That are used.
    """

    tables: dict[str, Table]
    words: tuple[str, ...]
    labels: frozenset[tuple[str, str]]
    columns: Columns

    def contradicts(self, folders: Collection[str]) -> bool:
        """Whether the labels of images in class folders are other classes than these, by any name."""
        names = {f"{folder}/": folder.rpartition("/")[2] for folder in folders}
        found = {
            (name, label)
            for place, label in self.labels
            for start, name in names.items()
            if f"{place}/".startswith(start)
        }
        return not len(found) == len({name for name, _ in found}) == len({label for _, label in found})


class _Names:
    """Image files below a folder, to be found by what a table calls them."""

    def __init__(self, root: Path, paths: Iterable[str]) -> None:
        self.root = root
        self._exact: dict[str, str] = {}
        self._last: dict[str, str] = {}
        self._others: dict[str, str] = {}  # the second image of a name
        for path in paths:
            name = path.rpartition("/")[2]
            for known, full in ((self._exact, path), (self._last, name)):
                full = unicodedata.normalize("NFC", full)  # macOS writes names in the other form
                for key in (full, full.rpartition(".")[0]):
                    if known.setdefault(key, path) != path:
                        self._others[key] = path

    def find(self, value: object, base: str) -> tuple[str, ...]:
        """The images that a value may mean: none, one or two.

        Args:
            value: Path, file name or id.
            base: The table's own folder, with a slash at its end; empty for that of the images.
        """
        text = unicodedata.normalize("NFC", str(value)).strip().replace("\\", "/")
        text = text.rpartition("?d=")[2].removeprefix("./")  # Label Studio's local files end in ?d=PATH
        parts = text.split("/")
        for path in (base + text, *("/".join(parts[place:]) for place in range(len(parts)))):
            if path in self._exact:
                return self._of(self._exact, path)
        stem, dot, ending = parts[-1].rpartition(".")
        keys = [parts[-1], _UPLOADED.sub("", parts[-1]), *([stem] if dot + ending.lower() in endings() else [])]
        return next((self._of(self._last, key) for key in keys if key in self._last), ())

    def _of(self, known: dict[str, str], key: str) -> tuple[str, ...]:
        return (known[key], self._others[key]) if key in self._others else (known[key],)


def read_label_tables(folder: Path, files: Sequence[Path], spec: DataSpec, problem: str) -> Listed:
    """The tables of a folder that name its images and hold their labels, by split.

    Args:
        folder: Holds images whose folders tell no classes.
        files: Tables below it.
        spec: For the columns that were asked for.
        problem: Why the folders tell no classes, for errors.

    Raises:
        UndecidedError: If a table names the images, and which column holds labels can't be told.
        DataError: If no table fits, or several.
    """
    images = [_stored(path, folder) for path in image_files(folder)]
    named, told = {}, []
    for file in files:
        if {"submission", "submissions"} & set(words_of(file.stem)):
            continue
        rows = read_table(file)
        shown = file.relative_to(folder).as_posix()
        told.append(f"{shown} ({', '.join(rows.column_names[:8])})")
        base = file.parent.relative_to(folder).as_posix()
        found = _with_paths(rows, _Names(folder, _meant(images, base, split_in(file.stem))), _slash(base), spec, file)
        if found is not None:
            named[file] = found
    if not named:
        tables = f"; no column of {', '.join(told)} names the images" if told else ""
        raise DataError(f"{problem}{tables}; {ALLOWED}{advice_for(visible_files(folder))}")
    labelled, labels, lacking, columns = {}, set(), {}, None
    for file, (rows, column) in named.items():
        try:
            columns = choose_columns(rows, dataclasses.replace(spec, image_column=column), str(file), of_files=True)
            labelled[file] = rows
            labels.update(_labels_by_folder(rows, columns))
        except NoColumnError as error:
            lacking[file] = error
        except DataError as error:
            raise UndecidedError(f"{problem}; a table names the images: {error}") from error
    if columns is None:
        raise UndecidedError(f"{problem}; a table names the images: {next(iter(lacking.values()))}")
    words = [f"{file}: left out, as it has no column of labels" for file in lacking]
    listed = {path for file, rows in labelled.items() for path in rows[named[file][1]][:]}
    missing = [path for path in images if path not in listed]
    if missing:
        shown = ", ".join(file.relative_to(folder).as_posix() for file in labelled)
        count = "1 image" if len(missing) == 1 else f"{len(missing):,} images"
        words.append(f"{folder}: left out {count} without a label in {shown}, the first is {missing[0]}")
    return Listed(_by_split(folder, labelled, columns.image), tuple(words), frozenset(labels), columns)


def _labels_by_folder(rows: Dataset, columns: Columns) -> set[tuple[str, str]]:
    folders = [str(path).rpartition("/")[0] for path in rows[columns.image][:]]
    if columns.label == CLASS_FOLDER:
        return {(folder, folder) for folder in folders}
    names = [columns.label] if isinstance(columns.label, str) else columns.label
    values = map(str, zip(*(rows[name][:] for name in names), strict=True))
    return set(zip(folders, values, strict=True))


def find_images(rows: Dataset, base: Path, spec: DataSpec, file: Path) -> tuple[Dataset, DataSpec]:
    """A table whose paths lead nowhere, with the images below its folder that are called so; else the table as it is.

    Raises:
        DataError: If several images are called the same.
    """
    check_header(rows.column_names, str(file))
    names = path_names(rows, spec)
    if names is None or not base.is_dir() or _exist(names[:3], base):
        return rows, spec
    try:
        files = list(islice(visible_files(base), _MOST))
    except DataError:  # it may be the root of a file system
        return rows, spec
    images = [_stored(path, base) for path in files if is_image(path)]
    found = _with_paths(rows, _Names(base, images), "", spec, file)
    if found is not None:
        return found[0], dataclasses.replace(spec, image_column=found[1])
    check_paths(names, f"{file}: image_column: a column")
    has_endings = any(Path(name).suffix.lower() in endings() for name in names)
    if names and not _exist(names, base) and (images or advice_for(files) or not has_endings):
        raise not_found(base / names[0], str(file))
    return rows, spec


def _exist(names: Sequence[str], base: Path) -> bool:
    return any(os.path.exists(base / expanded(name.replace("\\", "/"))) for name in names)


def _stored(path: Path, folder: Path) -> str:
    return stored_path(path_text(path.relative_to(folder).as_posix()))


def _slash(base: str) -> str:
    return "" if base == "." else f"{base}/"


def _meant(images: Sequence[str], base: str, split: str | None) -> Sequence[str]:
    """The images that a table may be about: those beside it, and those of its split."""
    images = [path for path in images if path.startswith(_slash(base))] or images
    own = [path for path in images if split and any(split_in(part) == split for part in path.split("/")[:-1])]
    return own or images


def _with_paths(rows: Dataset, names: _Names, base: str, spec: DataSpec, file: Path) -> tuple[Dataset, str] | None:
    """Rows with the path of each image, and the column that holds it; None where no column names images."""
    kinds = {name: getattr(kind, "dtype", "") for name, kind in rows.features.items() if isinstance(kind, Value)}
    texts = [name for name, kind in kinds.items() if kind.startswith(("string", "large_string", "int", "uint"))]
    counts = {}
    for column in [name for name in texts if name == spec.image_column] or texts:
        sample = {value for value in rows[column][:_SAMPLE] if value is not None}
        found = [names.find(value, base) for value in sample]
        counts[column] = len(set().union(*found)) if sum(map(bool, found)) * 2 > len(sample) else 0
    column = max(counts, key=lambda name: counts[name], default=None)
    if column is None or counts[column] == 0:
        return None
    check_header([column], str(file), is_row=bool(names.find(column, base)) and column[:1].isdigit())
    values = rows[column][:]
    paths: list[str | None] = []
    for value in values:
        found = () if value is None else names.find(value, base)
        if len(found) > 1:
            first, second = sorted(found)[:2]
            raise DataError(
                f"{file}: {value} may be {first} or {second}; name the folder of its images: data.source={file} "
                f"data.image_folder={(names.root / second).parent}"
            )
        paths.append(next(iter(found), None if value is None else f"{base}{value}"))
    order = rows.column_names
    rows = rows.rename_column(column, _ASIDE).add_column(column, paths, feature=Value("string"))
    return rows.select_columns(order), column


def _by_split(folder: Path, labelled: dict[Path, Dataset], image: str) -> dict[str, Table]:
    """Tables of one split become one, where they are alike and tell of different images."""
    tables = {}
    for split, files in splits_of(folder, list(labelled)).items():
        parts = [labelled[file] for file in files]
        names = [name for rows in parts if image in rows.column_names for name in rows[image][:]]
        if any(rows.features != parts[0].features for rows in parts) or (
            len(set(names)) < len(names) and len(parts) > 1
        ):
            shown = " and ".join(file.relative_to(folder).as_posix() for file in files)
            raise UndecidedError(f"{folder}: {shown} have labels; name one: data.source={files[0]}")
        tables[split] = Table(concatenate_datasets(parts), folder)
    return tables
