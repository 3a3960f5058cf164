"""Words of a command line -> image files and URLs, found before any of them is opened."""

import glob
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

import httpx2

from hfft._version import __version__
from hfft.data.sources.folders import UNREAD, image_files, is_image_file, visible_files
from hfft.errors import DataError

STDIN = "-"
MAX_BYTES = 64 * 2**20  # of one remote image, as it is stored
_GLOB = frozenset("*?[")
_SCHEMES = ("http", "https")
_SILENCE = 10.0  # seconds to connect, and between two pieces of a response
_TIMEOUT = 60.0  # seconds for one image
_REDIRECTS = 5
_CREDENTIALS = re.compile(r"^(\w+://)[^/?#]*@")


@dataclass(frozen=True)
class RemoteImage:
    """An image behind an http or https URL, downloaded when it is read."""

    url: str

    @property
    def name(self) -> str:
        """The URL without user name and password."""
        return _CREDENTIALS.sub(r"\1", self.url)

    def fetch(self) -> bytes:
        """Download the encoded image.

        Raises:
            DataError: If that fails, takes more than 60 seconds, or gives more than 64 MiB; names no URL.
        """
        try:
            with _client().stream("GET", self.url) as response:
                _check_headers(response)
                return _content(response)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise DataError(f"can't be fetched: {str(error) or type(error).__name__}") from error


@dataclass(frozen=True)
class InputImages:
    """The images that the words name, in their order, without repetitions."""

    images: Iterable[Path | RemoteImage]  # can be iterated once
    count: int | None  # None where a list on standard input is still to be read


def find_input_images(words: Sequence[str], *, allow_url: bool = False, listed: Iterable[str] = ()) -> InputImages:
    """Look up words: files, folders, globs, URLs, or `-` for `listed`, lines of one file or URL each.

    A folder gives the image files at any depth below it, and a glob (`**` for any depth) the image files that it
    matches, both sorted. Lines are taken literally and read lazily.

    Raises:
        DataError: If a word gives no image, or a URL that may not be fetched; for a line, when it is read.
    """
    groups = [
        _listed_images(listed, allow_url=allow_url) if word == STDIN else _images_of(word, allow_url=allow_url)
        for word in words
    ]
    images = _without_repetitions(chain.from_iterable(groups))
    if STDIN in words:
        return InputImages(images, None)
    known = list(images)
    return InputImages(known, len(known))


def _images_of(word: str, *, allow_url: bool) -> list[Path] | list[RemoteImage]:
    if "://" in word:
        return [_remote_image(word, allow_url=allow_url)]
    if os.path.isdir(word):
        files = image_files(Path(word))
        if not files:
            raise DataError(f"{word}: the folder holds no images{_unread_formats(Path(word))}")
        return files
    if os.path.exists(word):
        return [Path(word)]
    if _GLOB.isdisjoint(word):
        raise DataError(f"{word}: no such file or folder")
    found = map(Path, glob.iglob(word, recursive=True))
    files = sorted(path for path in found if is_image_file(path) and path.is_file())
    if not files:
        raise DataError(f"{word}: no image file is called like that")
    return files


def _unread_formats(folder: Path) -> str:
    found = Counter(path.suffix.lower() for path in visible_files(folder) if path.suffix.lower() in UNREAD)
    counts = ", ".join(f"{ending} {count}" for ending, count in sorted(found.items()))
    hint = "; HEIC is read with pip install pillow-heif" if found.keys() & {".heic", ".heif"} else ""
    return f" that are read ({counts}){hint}" if found else ""


def _listed_images(lines: Iterable[str], *, allow_url: bool) -> Iterator[Path | RemoteImage]:
    is_empty = True
    try:
        for word in (line.rstrip("\r\n") for line in lines):
            if word:
                is_empty = False
                yield _remote_image(word, allow_url=allow_url) if "://" in word else Path(word)
    except UnicodeDecodeError as error:
        raise DataError(f"standard input: the list is not text: {error.reason}") from error
    if is_empty:
        raise DataError("standard input: the list is empty; allowed: a file or URL per line")


def _remote_image(word: str, *, allow_url: bool) -> RemoteImage:
    image, scheme = RemoteImage(word), word.partition("://")[0].lower()
    if scheme not in _SCHEMES:
        raise DataError(f"{image.name}: found a URL that begins with {scheme}; allowed: {', '.join(_SCHEMES)}")
    if not allow_url:
        raise DataError(f"{image.name}: a URL is fetched with --allow-url only")
    return image


def _without_repetitions(images: Iterable[Path | RemoteImage]) -> Iterator[Path | RemoteImage]:
    seen: set[str] = set()
    for image in images:
        key = image.url if isinstance(image, RemoteImage) else os.path.abspath(image)
        if key not in seen:
            seen.add(key)
            yield image


@cache
def _client() -> httpx2.Client:
    """One for all threads, so that connections are kept."""
    headers = {"user-agent": f"hfft/{__version__}"}
    return httpx2.Client(follow_redirects=True, max_redirects=_REDIRECTS, timeout=_SILENCE, headers=headers)


def _check_headers(response: httpx2.Response) -> None:
    if not response.is_success:
        raise DataError(f"can't be fetched: the server answered {response.status_code} {response.reason_phrase}")
    if response.headers.get("content-type", "").startswith("text/html"):
        raise DataError("is a web page (text/html) and no image")
    length = response.headers.get("content-length", "")
    _check_length(int(length) if length.isdecimal() else 0)


def _content(response: httpx2.Response) -> bytes:
    content, start = bytearray(), time.monotonic()
    for part in response.iter_bytes():
        content += part
        _check_length(len(content))
        if time.monotonic() - start > _TIMEOUT:
            raise DataError(f"can't be fetched: not complete after {_TIMEOUT:g} s")
    return bytes(content)


def _check_length(length: int) -> None:
    if length > MAX_BYTES:
        raise DataError(f"is larger than {MAX_BYTES // 2**20} MiB, the most that is fetched")
