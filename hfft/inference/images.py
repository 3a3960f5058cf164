"""Words of a command line -> images: files, folders, globs, URLs, and a list on standard input; opens none of them."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from hfft.data.sources.folders import UNREAD, endings, image_files, visible_files
from hfft.errors import DataError
from hfft.inference.urls import SCHEMES, RemoteImage

STDIN = "-"
_GLOB = frozenset("*?[")


@dataclass(frozen=True)
class Found:
    """What the words stand for.

    Attributes:
        images: In the order of the words, each once, at its first place; to be gone through once.
        count: How many they are; None where a list is still to be read.
    """

    images: Iterable[Path | RemoteImage]
    count: int | None


def find_images(words: Sequence[str], *, allow_url: bool = False, listed: Iterable[str] = ()) -> Found:
    """Look up every word, before any image is read.

    A folder stands for all files at any depth below it that are called like images, and a glob (`**` for any depth)
    for those that it matches, both sorted. `-` stands for a list of one file or URL per line, taken literally, which
    is read as the images are needed.

    Args:
        words: Files, folders, globs, URLs, or `-`.
        allow_url: Whether URLs may be fetched.
        listed: Lines of the list.

    Raises:
        DataError: If a word stands for no image, or for a URL that may not be fetched; while the images are gone
            through, if a line of the list does.
    """
    groups = [
        _of_list(listed, allow_url=allow_url) if word == STDIN else _of_word(word, allow_url=allow_url)
        for word in words
    ]
    images = _once(chain.from_iterable(groups))
    if STDIN in words:
        return Found(images, None)
    known = list(images)
    return Found(known, len(known))


def _of_word(word: str, *, allow_url: bool) -> list[Path] | list[RemoteImage]:
    if "://" in word:
        return [_remote(word, allow_url=allow_url)]
    if os.path.isdir(word):
        files = image_files(Path(word))
        if not files:
            raise DataError(f"{word}: the folder holds no images{_unread(Path(word))}")
        return files
    if os.path.exists(word):
        return [Path(word)]
    if _GLOB.isdisjoint(word):
        raise DataError(f"{word}: no such file or folder")
    files = sorted(path for path in map(Path, glob.iglob(word, recursive=True)) if _is_image(path))
    if not files:
        raise DataError(f"{word}: no image file is called like that")
    return files


def _unread(folder: Path) -> str:
    """Which other images a folder holds, as far as their names tell."""
    found = Counter(path.suffix.lower() for path in visible_files(folder) if path.suffix.lower() in UNREAD)
    if not found:
        return ""
    way_out = "; HEIC is read with pip install pillow-heif" if not found.keys().isdisjoint((".heic", ".heif")) else ""
    return f" that are read ({', '.join(f'{ending} {count}' for ending, count in sorted(found.items()))}){way_out}"


def _of_list(lines: Iterable[str], *, allow_url: bool) -> Iterator[Path | RemoteImage]:
    is_empty = True
    try:
        for word in (line.rstrip("\r\n") for line in lines):
            if word:
                is_empty = False
                yield _remote(word, allow_url=allow_url) if "://" in word else Path(word)
    except UnicodeDecodeError as error:
        raise DataError(f"standard input: the list is not text: {error.reason}") from error
    if is_empty:
        raise DataError("standard input: the list is empty; allowed: a file or URL per line")


def _remote(word: str, *, allow_url: bool) -> RemoteImage:
    image, scheme = RemoteImage(word), word.partition("://")[0].lower()
    if scheme not in SCHEMES:
        raise DataError(f"{image.name}: found a URL that begins with {scheme}; allowed: {', '.join(SCHEMES)}")
    if not allow_url:
        raise DataError(f"{image.name}: a URL is fetched with --allow-url only")
    return image


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in endings() and path.is_file()


def _once(images: Iterable[Path | RemoteImage]) -> Iterator[Path | RemoteImage]:
    seen: set[str] = set()
    for image in images:
        place = image.url if isinstance(image, RemoteImage) else os.path.abspath(image)
        if place not in seen:
            seen.add(place)
            yield image
