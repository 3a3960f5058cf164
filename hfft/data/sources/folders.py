"""The files of a folder, and which of its folders are splits and which are classes, by their names; opens none.

A name tells no class when nothing remains of it without the words of splits, parts and archives: `train`, `test_set`,
`images`, `part_2`; or when the same remains of all of them: `seg_train`, `seg_test`.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

from hfft.data.images.formats import formats
from hfft.errors import DataError
from hfft.recipe.loading import RECIPE
from hfft.runs.record import ENVIRONMENT, SUMMARY
from hfft.system.distributed import warn

# Endings of images that are not read, or with a plugin only.
UNREAD = frozenset(
    (
        *(".arw", ".cr2", ".cr3", ".dcm", ".dng", ".nef", ".orf", ".raw", ".rw2"),
        *(".exr", ".heic", ".heif", ".jxl", ".svg", ".eps", ".qoi", ".sgi", ".fits", ".wmf", ".emf"),
    )
)
# Names under which folders and data sets on the Hub keep a split, by the name used here.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_WORDS = tuple(name for names in SPLIT_NAMES.values() for name in names)
CLASS_FOLDER = "class_folder"  # stands for the folder of an image, as a label_column
ALLOWED = (
    f"allowed: class folders alone, or folders of class folders that are called {', '.join(SPLIT_WORDS)}; or one of "
    "the folders (data.source); or a table of labels with the images (path,label); or data.label_column=class_folder, "
    "which takes the folders' names as classes all the same"
)
_OUTPUT = (  # files of a run, of a cross-validation, of a model
    (RECIPE, ENVIRONMENT),
    (SUMMARY, f"fold-0/{RECIPE}"),
    ("config.json", "preprocessor_config.json"),
)
# How `Dataset.push_to_hub` names files; the split may have any name.
_SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}.*")
# `trainset` and its like: two words in one.
_JOINED = re.compile(rf"^({'|'.join(SPLIT_WORDS)})(sets?|data|images?|imgs?|files?)$")
_UNLABELLED = frozenset(("pred", "preds", "predict", "prediction", "predictions", "unlabeled", "unlabelled"))
_NO_CLASS = _UNLABELLED.union(
    SPLIT_WORDS,
    ("all", "data", "dataset", "datasets", "dir", "file", "files", "folder", "folders", "set", "sets", "split"),
    ("splits", "image", "images", "img", "imgs", "jpg", "jpeg", "pic", "pics", "picture", "pictures", "photo"),
    ("photos", "png", "archive", "batch", "batches", "chunk", "chunks", "fold", "folds", "part", "parts", "shard"),
    ("shards", "tar", "zip", "annotation", "annotations", "labels", "mask", "masks", "segmentation"),
    ("segmentations", "unknown"),
)


# Files


@cache
def endings() -> dict[str, str]:
    """Endings of image files that are read, in small letters and with their dot, to the format that they promise."""
    read = formats()
    return {ending: name for ending, name in Image.registered_extensions().items() if name in read}


def is_image_file(path: Path) -> bool:
    """Whether a file is called like an image that is read here."""
    return path.suffix.lower() in endings()


def image_files(folder: Path) -> list[Path]:
    """Files at any depth below a folder that are called like images, sorted."""
    return files_ending(folder, endings())


def files_ending(folder: Path, endings: Collection[str]) -> list[Path]:
    """Files at any depth below a folder with these endings, in any case, sorted."""
    return sorted(path for path in visible_files(folder) if path.suffix.lower() in endings)


def holds_images(folder: Path) -> bool:
    """Whether an image lies in a folder, at any depth."""
    return any(map(is_image_file, visible_files(folder)))


def files_in(folder: Path) -> list[Path]:
    """The files directly in a folder, sorted; hidden ones are left out."""
    return sorted(path for path in folder.iterdir() if path.name[0] != "." and path.is_file())


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder; hidden ones, those that begin with two underscores and those of runs are left out."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith((".", "__")) and _is_folder(entry)]
    return [path for path in (Path(folder, name) for name in sorted(names)) if not _holds_output(path)]


def filled_subfolders(folder: Path) -> list[Path]:
    """Those of `subfolders` that hold images."""
    return list(filter(holds_images, subfolders(folder)))


def visible_files(folder: Path, above: Sequence[Path] = ()) -> Iterator[Path]:
    """Files at any depth below a folder, in no order; links are followed.

    Hidden files and folders are left out, and so are run folders. `above` are the folders that led to this one.

    Raises:
        DataError: If a folder can't be listed.
    """
    above = (*above, folder)
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                path = Path(folder, entry.name)
                if entry.name[0] == ".":
                    continue
                if not _is_folder(entry):
                    yield path
                elif not is_output(path) and not (entry.is_symlink() and _leads_up(path, above)):
                    yield from visible_files(path, above)
    except OSError as error:
        raise DataError(f"{folder}: the folder can't be read: {error.strerror or error}") from error


def _leads_up(link: Path, above: Sequence[Path]) -> bool:
    """Whether a link leads to one of the folders that it lies in."""
    return any(os.path.samefile(link, folder) for folder in (*above, *above[0].resolve().parents))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one; asks the file system about links alone."""
    return os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()


def is_output(folder: Path) -> bool:
    """Whether a folder is a run's, a cross-validation's, or a model."""
    return any(all((folder / name).is_file() for name in names) for names in _OUTPUT)


def _holds_output(folder: Path) -> bool:
    """Whether a folder is a run's, or holds runs and no images: hfft's output, never a class."""
    below = [folder] if holds_images(folder) else (Path(parent) for parent, _, _ in os.walk(folder))
    return any(map(is_output, below))


# Splits, by name


def words_of(name: str) -> list[str]:
    """The words of a file's or folder's name, in small letters: `01_trainImages` holds `train` and `images`."""
    words = re.split(r"[\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    return [part for word in words if word for part in _JOINED.sub(r"\1 \2", word).split()]


def split_in(name: str) -> str | None:
    """The split that a name has a word of: `train`, `validation`, `test`, or None.

    These are the rules of datasets 5.2 (data_files.py), in any case of letters; and `trainset`, `TestImages`.
    """
    words = set(words_of(name))
    return next((split for split, names in SPLIT_NAMES.items() if not words.isdisjoint(names)), None)


def split_names(names: Iterable[str]) -> dict[str, str]:
    """The names among those of folders that are splits, and what each is called as a split.

    A name is one when it has a split's word and no other (`train`, `01_test`, `val_images`), or the same others as
    another split (`seg_train`, `seg_test`).
    """
    rests: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for name in names:
        if split_in(name) is not None:
            rests[_rest(name)].add(name)
    found = [name for rest, group in rests.items() if not rest or _are_several(group) for name in group]
    counts = Counter(map(split_in, found))
    return {
        name: str(name if name.lower() in SPLIT_WORDS or counts[split_in(name)] > 1 else split_in(name))
        for name in sorted(found)
    }


def _are_several(names: Iterable[str]) -> bool:
    """Whether names with a split's word are of two splits or more."""
    return len(set(map(split_in, names))) > 1


def files_by_split(folder: Path, files: Collection[Path]) -> dict[str, list[Path]]:
    """Files below a folder by split: by a word in a folder's name, else in the file's.

    All files are `train` when no name has a split's word. Names above the folder count for nothing.
    """
    splits: dict[str, list[Path]] = defaultdict(list)
    nameless = []
    for file in files:
        path = file.relative_to(folder)
        shard = _SHARD.fullmatch(path.as_posix())
        split = shard[1] if shard else split_in(path.parent.as_posix()) or split_in(path.stem)
        (nameless if split is None else splits[split]).append(file)
    if not splits:
        return {"train": nameless}
    if nameless:
        shown = paths_below(folder, nameless[:3])
        warn(f"{folder}: left out {len(nameless)} of {len(files)} files, whose names tell no split: {shown}")
    return dict(splits)


def paths_below(folder: Path, paths: Iterable[Path]) -> str:
    """Paths below a folder, for a message."""
    return ", ".join(path.relative_to(folder).as_posix() for path in paths)


def folders_of(path: object) -> list[str]:
    """The folders that a path in a table leads through."""
    return str(path).replace("\\", "/").removeprefix("./").split("/")[:-1]


def divide(paths: Sequence[Sequence[str]]) -> tuple[list[str], list[Sequence[str]]] | None:
    """The split of each path by its first folder, and the folders below it; None where not all begin with a split."""
    known = split_names(folders[0] for folders in paths if folders)
    if not known or not all(folders and folders[0] in known for folders in paths):
        return None
    return [known[folders[0]] for folders in paths], [folders[1:] for folders in paths]


def tells_no_class(names: Iterable[str]) -> bool:
    """Whether names of folders are those of splits, parts or archives: all of them."""
    names = set(names)
    rests = set(map(_rest, names))
    is_plain = all(not _NO_CLASS.isdisjoint(words_of(name)) for name in names)
    return is_plain and (rests == {()} or (len(names) > 1 and len(rests) == 1))


def _rest(name: str) -> tuple[str, ...]:
    """The words of a name that may tell a class."""
    return tuple(word for word in words_of(name) if word not in _NO_CLASS and len(word) > 1)


# Splits and classes


@dataclass(frozen=True)
class FolderLayout:
    """What the folders below a folder of images are."""

    splits: Mapping[str, Sequence[Path]]  # the folders that hold class folders
    left_out: Sequence[Path] = ()  # folders whose images have no label, and split folders without images
    problem: str | None = None  # why the folders' names can't be labels

    @property
    def roots(self) -> list[Path]:
        """The folders that hold class folders, of all splits."""
        return [root for roots in self.splits.values() for root in roots]


def find_layout(folder: Path, *, by_folder: bool = False) -> FolderLayout:
    """Tell splits from classes; `by_folder` takes the folders' names for classes, whatever they look like."""
    top = _unwrapped(folder)
    children = filled_subfolders(top)
    if not children:
        is_empty = subfolders(top) and not _holds_loose_images(top)  # class folders to be filled
        return FolderLayout({"train": [top]}, problem=None if is_empty else f"{folder}: found no class folders")
    splits = split_names(path.name for path in children)
    found = [path for path in children if path.name in splits]
    others = [path for path in children if path.name not in splits]
    unlabelled = [path for path in others if not _UNLABELLED.isdisjoint(words_of(path.name))]
    is_nested = any(filled_subfolders(path) and not _holds_loose_images(path) for path in found)
    if found and (len(others) == len(unlabelled) or _are_several(splits) or is_nested):
        empty = [path for path in subfolders(top) if split_in(path.name) and path not in children]
        layout = _split_layout(folder, found, [*unlabelled, *empty])
        rest = [path.name for path in others if path not in unlabelled]
        if not rest:
            return FolderLayout({"train": [top]}) if by_folder and layout.problem else layout
        if not by_folder:
            named = ", ".join(path.name for path in found)
            problem = f"{folder}: {named} look like splits and {', '.join(rest)} do not"
            return FolderLayout(layout.splits, problem=problem)
    return FolderLayout({"train": [top]}) if by_folder else _class_layout(folder, top)


def _holds_loose_images(folder: Path) -> bool:
    return any(is_image_file(path) and path.name[0] != "." and path.is_file() for path in folder.iterdir())


def _class_layout(folder: Path, top: Path) -> FolderLayout:
    """Class folders of one split; with a problem where they hold split folders, or their names tell no class."""
    roots, problem, children = _class_roots(top), None, filled_subfolders(top)
    if all(_are_splits(filled_subfolders(path)) and not _holds_loose_images(path) for path in children):
        shown = paths_below(folder, filled_subfolders(children[0]))
        problem = f"{folder}: the folders of classes hold those of splits: {shown}"
    elif tells_no_class(path.name for root in roots for path in filled_subfolders(root)):
        problem = _no_classes(folder, children)
    return FolderLayout({"train": roots}, problem=problem)


def _are_splits(folders: Collection[Path]) -> bool:
    """Whether folders are two or more splits."""
    names = split_names(path.name for path in folders)
    return len(names) == len(folders) and _are_several(names)


def _unwrapped(folder: Path) -> Path:
    """The folder within that holds everything, where its name tells nothing: `images/`, `data/`."""
    children = filled_subfolders(folder)
    if len(children) != 1 or _holds_loose_images(folder) or split_in(children[0].name):
        return folder
    below = filled_subfolders(children[0])
    is_wrapper = tells_no_class([children[0].name]) or _are_splits(below)
    return _unwrapped(children[0]) if is_wrapper and below else folder


def _class_roots(folder: Path) -> list[Path]:
    """The folders that hold the class folders: `folder`, or what lies in the parts that it was divided into."""
    children = filled_subfolders(folder)
    if not children or _holds_loose_images(folder) or not all(map(filled_subfolders, children)):
        return [folder]
    if len(children) == 1:
        is_part = children[0].name == folder.name or tells_no_class([children[0].name])
    else:
        alike = {tuple(word for word in words_of(path.name) if len(word) > 1) for path in children}
        is_part = len(alike) == 1 and tells_no_class(path.name for path in children)
    return [root for path in children for root in _class_roots(path)] if is_part else [folder]


def _split_layout(folder: Path, found: Collection[Path], unlabelled: Collection[Path]) -> FolderLayout:
    """Split folders, those without class folders left out; with a problem where these are all, or train is one."""
    roots = {path: _class_roots(path) for path in found}
    classes = {path: {child.name for root in roots[path] for child in filled_subfolders(root)} for path in found}
    train = [path for path in found if split_in(path.name) == "train"]
    known = {name for path in train for name in classes[path]}
    flat = [
        path
        for path in found
        if not classes[path]
        or classes[path] == {path.name}
        or (tells_no_class(classes[path]) and (path in train or not classes[path] <= known))
    ]
    names = split_names(path.name for path in found)
    splits = {names[path.name]: roots[path] for path in found if path not in flat}
    has_rests = len({_rest(path.name) for path in found}) > 1
    is_flat = len(flat) == len(found) or not set(train).isdisjoint(flat)
    return FolderLayout(splits, [*flat, *unlabelled], _no_classes(folder, found) if has_rests or is_flat else None)


def _no_classes(folder: Path, found: Collection[Path]) -> str:
    names = paths_below(folder, found)
    return f"{folder}: names of splits, parts or archives are no labels, and no class folders are in them: {names}"
