"""Images on the web, fetched when they are asked for: http and https, of a limited size, in a limited time."""

import re
import time
from dataclasses import dataclass
from functools import cache

import httpx2

from hfft._version import __version__
from hfft.errors import DataError

SCHEMES = ("http", "https")
MOST_BYTES = 64 * 2**20  # of one image, as it is stored
_PAUSE = 10.0  # seconds to connect, and between two pieces of an answer
_LONGEST = 60.0  # seconds for one image
_REDIRECTS = 5
_USER = re.compile(r"^(\w+://)[^/?#]*@")


@dataclass(frozen=True)
class RemoteImage:
    """An image that is fetched when it is read.

    Attributes:
        url: Where it is, http or https.
    """

    url: str

    @property
    def name(self) -> str:
        """The URL without user name and password."""
        return _USER.sub(r"\1", self.url)

    def fetch(self) -> bytes:
        """Its encoded bytes.

        Raises:
            DataError: If they can't be had; the message holds the reason, the caller knows the name.
        """
        try:
            with _client().stream("GET", self.url) as response:
                _check(response)
                return _content(response)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise DataError(f"can't be fetched: {str(error) or type(error).__name__}") from error


@cache
def _client() -> httpx2.Client:
    """One for all threads, so that connections are kept."""
    return httpx2.Client(
        follow_redirects=True,
        max_redirects=_REDIRECTS,
        timeout=_PAUSE,
        headers={"user-agent": f"hfft/{__version__}"},
    )


def _check(response: httpx2.Response) -> None:
    if not response.is_success:
        raise DataError(f"can't be fetched: the server answered {response.status_code} {response.reason_phrase}")
    kind = response.headers.get("content-type", "")
    if kind.startswith("text/html"):
        raise DataError("is a web page (text/html) and no image")
    length = response.headers.get("content-length", "")
    if length.isdecimal() and int(length) > MOST_BYTES:
        raise _too_large()


def _content(response: httpx2.Response) -> bytes:
    parts, size, begun = [], 0, time.monotonic()
    for part in response.iter_bytes():
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            raise _too_large()
        if time.monotonic() - begun > _LONGEST:
            raise DataError(f"can't be fetched: not complete after {_LONGEST:g} s")
    return b"".join(parts)


def _too_large() -> DataError:
    return DataError(f"is larger than {MOST_BYTES // 2**20} MiB, the most that is fetched")
