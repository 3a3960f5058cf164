import socket

import pytest
import web

from hfft.errors import DataError
from hfft.inference import urls
from hfft.inference.urls import MOST_BYTES, RemoteImage

CONTENT = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def site():
    with web.serving(CONTENT) as (address, _):
        yield address


@pytest.mark.parametrize("path", ["image.png", "moved"])
def test_the_bytes_are_those_of_the_server(path, site):
    assert RemoteImage(f"{site}/{path}").fetch() == CONTENT


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("missing", r"can't be fetched: the server answered 404 Not Found"),
        ("page", r"is a web page \(text/html\) and no image"),
        ("huge", r"is larger than 64 MiB"),
        ("endless", r"is larger than 64 MiB"),
        ("circle", r"can't be fetched: .*redirect"),
        ("elsewhere", r"can't be fetched: .*protocol"),
        ("cut", r"can't be fetched: "),
    ],
)
def test_what_the_server_may_do(path, reason, site):
    with pytest.raises(DataError, match=reason):
        RemoteImage(f"{site}/{path}").fetch()


def test_the_largest_image_is_fetched_and_one_byte_more_is_not():
    for size, is_fetched in ((MOST_BYTES, True), (MOST_BYTES + 1, False)):
        with web.serving(bytes(size)) as (address, _):
            image = RemoteImage(f"{address}/image.png")
            if is_fetched:
                assert len(image.fetch()) == MOST_BYTES
            else:
                with pytest.raises(DataError, match="is larger than 64 MiB"):
                    image.fetch()


@pytest.fixture
def short_patience(monkeypatch):
    urls._client.cache_clear()
    monkeypatch.setattr(urls, "_PAUSE", 0.2)
    yield
    urls._client.cache_clear()


def test_a_server_that_says_nothing_is_left(site, short_patience):
    with pytest.raises(DataError, match=r"can't be fetched: .*time"):
        RemoteImage(f"{site}/silent").fetch()


def test_an_image_that_never_ends_takes_limited_time(site, monkeypatch):
    monkeypatch.setattr(urls, "_LONGEST", 0.0)
    with pytest.raises(DataError, match="not complete after 0 s"):
        RemoteImage(f"{site}/endless").fetch()


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DataError, match=r"can't be fetched: .*refused"):
        RemoteImage(f"http://127.0.0.1:{port}/a.png").fetch()


@pytest.mark.parametrize("url", ["http://", "http://[::1", "http://a b/c", "http://\x00/a.png"])
def test_what_is_no_url(url):
    with pytest.raises(DataError, match="can't be fetched"):
        RemoteImage(url).fetch()


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://me:secret@host/a.png", "https://host/a.png"),
        ("https://token@host:8080/a@b.png", "https://host:8080/a@b.png"),
        ("https://host/a@b.png?c=d@e", "https://host/a@b.png?c=d@e"),
        ("http://[broken", "http://[broken"),
    ],
)
def test_a_password_is_not_part_of_the_name(url, name):
    assert RemoteImage(url).name == name
