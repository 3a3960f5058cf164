"""Which folders and files are splits, and which folders are classes, by their names.

A name tells no class when nothing remains of it without the words of splits, parts and archives: `train`, `test_set`,
`images`, `part_2`; or when the same remains of all of them: `seg_train`, `seg_test`.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hfft.data.sources.folders import filled_subfolders, holds_loose_images, subfolders
from hfft.system.distributed import warn

# Names under which folders and data sets on the Hub keep a split, by the name used here.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_WORDS = tuple(name for names in SPLIT_NAMES.values() for name in names)
CLASS_FOLDER = "class_folder"  # stands for the folder of an image, as a label_column
ALLOWED = (
    "allowed: class folders alone, or folders of class folders that are called "
    f"{', '.join(SPLIT_WORDS)}; or one of the folders (data.source); or "
    "a table of labels with the images (path,label); or data.label_column=class_folder, which takes the folders' "
    "names as classes all the same"
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
_Listing = Callable[[Path], list[Path]]  # subfolders with images; each folder is listed once


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
    rests: dict[tuple[str, ...], set[str]] = {}
    for name in set(names):
        if split_in(name) is not None:
            rests.setdefault(_rest(name), set()).add(name)
    found = [name for rest, group in rests.items() if not rest or len(set(map(split_in, group))) > 1 for name in group]
    counts = Counter(map(split_in, found))
    return {
        name: str(name if name.lower() in SPLIT_WORDS or counts[split_in(name)] > 1 else split_in(name))
        for name in sorted(found)
    }


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
        shown = ", ".join(path.relative_to(folder).as_posix() for path in nameless[:3])
        warn(f"{folder}: left out {len(nameless)} of {len(files)} files, whose names tell no split: {shown}")
    return dict(splits)


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


@dataclass(frozen=True)
class FolderLayout:
    """What the folders below a folder of images are.

    Attributes:
        splits: Name of each split to the folders that hold its class folders.
        left_out: Folders whose images have no label, and split folders without images.
        problem: Why the folders' names can't be labels, or None.
    """

    splits: Mapping[str, tuple[Path, ...]]
    left_out: tuple[Path, ...] = ()
    problem: str | None = None

    @property
    def roots(self) -> list[Path]:
        """The folders that hold class folders, of all splits."""
        return [root for roots in self.splits.values() for root in roots]

    def class_folders(self, split: str) -> list[Path]:
        """The class folders of a split; several may be of one class."""
        return [child for root in self.splits[split] for child in subfolders(root)]


def find_layout(folder: Path, *, by_folder: bool = False) -> FolderLayout:
    """Tell splits from classes.

    Args:
        folder: Holds images.
        by_folder: The names of the folders are classes, whatever they look like.
    """
    filled = cache(filled_subfolders)
    top = _unwrapped(folder, filled)
    children = filled(top)
    if not children:
        is_empty = subfolders(top) and not holds_loose_images(top)  # class folders to be filled
        return FolderLayout({"train": (top,)}, problem=None if is_empty else f"{folder}: found no class folders")
    splits = split_names(path.name for path in children)
    found = [path for path in children if path.name in splits]
    others = [path for path in children if path.name not in splits]
    unlabelled = [path for path in others if not _UNLABELLED.isdisjoint(words_of(path.name))]
    nested = any(filled(path) and not holds_loose_images(path) for path in found)
    if found and (len(others) == len(unlabelled) or len(set(map(split_in, splits))) > 1 or nested):
        empty = [path for path in subfolders(top) if split_in(path.name) and path not in children]
        layout = _split_layout(folder, found, [*unlabelled, *empty], filled)
        others = [path for path in others if path not in unlabelled]
        if not others:
            return FolderLayout({"train": (top,)}) if by_folder and layout.problem else layout
        if not by_folder:
            named, rest = (", ".join(path.name for path in paths) for paths in (found, others))
            return FolderLayout(layout.splits, problem=f"{folder}: {named} look like splits and {rest} do not")
    if by_folder:
        return FolderLayout({"train": (top,)})
    return _class_layout(folder, top, filled)


def _class_layout(folder: Path, top: Path, filled: _Listing) -> FolderLayout:
    """Class folders of one split; with a problem where they hold split folders, or their names tell no class."""
    roots, problem, children = _class_roots(top, filled), None, filled(top)
    if all(_are_splits(filled(path)) and not holds_loose_images(path) for path in children):
        shown = ", ".join(path.relative_to(folder).as_posix() for path in filled(children[0]))
        problem = f"{folder}: the folders of classes hold those of splits: {shown}"
    elif tells_no_class(path.name for root in roots for path in filled(root)):
        problem = _no_classes(folder, children)
    return FolderLayout({"train": roots}, problem=problem)


def _are_splits(folders: Collection[Path]) -> bool:
    """Whether folders are two or more splits."""
    names = split_names(path.name for path in folders)
    return len(names) == len(folders) and len(set(map(split_in, names))) > 1


def _unwrapped(folder: Path, filled: _Listing) -> Path:
    """The folder within that holds everything, where its name tells nothing: `images/`, `data/`."""
    children = filled(folder)
    if len(children) != 1 or holds_loose_images(folder) or split_in(children[0].name):
        return folder
    is_wrapper = tells_no_class([children[0].name]) or _are_splits(filled(children[0]))
    return _unwrapped(children[0], filled) if is_wrapper and filled(children[0]) else folder


def _class_roots(folder: Path, filled: _Listing) -> tuple[Path, ...]:
    """The folders that hold the class folders: `folder`, or what lies in the parts that it was divided into."""
    children = filled(folder)
    if not children or holds_loose_images(folder) or not all(map(filled, children)):
        return (folder,)
    if len(children) == 1:
        is_part = children[0].name == folder.name or tells_no_class([children[0].name])
    else:
        alike = {tuple(word for word in words_of(path.name) if len(word) > 1) for path in children}
        is_part = len(alike) == 1 and tells_no_class(path.name for path in children)
    return tuple(root for path in children for root in _class_roots(path, filled)) if is_part else (folder,)


def _split_layout(
    folder: Path, found: Collection[Path], unlabelled: Collection[Path], filled: _Listing
) -> FolderLayout:
    """Split folders, those without class folders left out; with a problem where these are all, or train is one."""
    roots = {path: _class_roots(path, filled) for path in found}
    classes = {path: {child.name for root in roots[path] for child in filled(root)} for path in found}
    known = {name for path in found if split_in(path.name) == "train" for name in classes[path]}
    flat = [
        path
        for path in found
        if not classes[path]
        or classes[path] == {path.name}
        or (tells_no_class(classes[path]) and (split_in(path.name) == "train" or not classes[path] <= known))
    ]
    names = split_names(path.name for path in found)
    splits = {names[path.name]: roots[path] for path in found if path not in flat}
    rests = {_rest(path.name) for path in found}
    problem = None
    if len(rests) > 1 or len(flat) == len(found) or any(split_in(path.name) == "train" for path in flat):
        problem = _no_classes(folder, found)
    return FolderLayout(splits, left_out=(*flat, *unlabelled), problem=problem)


def _no_classes(folder: Path, found: Collection[Path]) -> str:
    names = ", ".join(path.relative_to(folder).as_posix() for path in found)
    return f"{folder}: names of splits, parts or archives are no labels, and no class folders are in them: {names}"
