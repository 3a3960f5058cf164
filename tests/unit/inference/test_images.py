import os
import socket
from pathlib import Path

import pytest
import web

from hfft.data.sources import folders
from hfft.errors import DataError
from hfft.inference import images
from hfft.inference.images import MAX_BYTES, RemoteImage, find_input_images

CONTENT = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    for file in ("a/2.png", "a/1.JPG", "a/deep/er/3.webp", "a/notes.txt", "a/.hidden/4.png", "b/5.png", "x[1].png"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)


def names(*words, **options):
    found = find_input_images(words, **options)
    found_names = [str(image) for image in found.images]
    assert found.count in (None, len(found_names))
    return found_names


def test_a_file_is_taken_whatever_it_is_called():
    assert names("a/notes.txt", "a/2.png") == ["a/notes.txt", "a/2.png"]


def test_a_folder_stands_for_the_images_below_it():
    assert names("a") == ["a/1.JPG", "a/2.png", "a/deep/er/3.webp"]


@pytest.mark.parametrize(
    ("glob", "files"),
    [
        ("a/*", ["a/1.JPG", "a/2.png"]),
        ("*/*.png", ["a/2.png", "b/5.png"]),
        ("a/**/*.*", ["a/1.JPG", "a/2.png", "a/deep/er/3.webp"]),
        ("a/[12].*", ["a/1.JPG", "a/2.png"]),
        ("a/?.png", ["a/2.png"]),
    ],
)
def test_a_glob_stands_for_the_images_it_matches(glob, files):
    assert names(glob) == files


def test_a_file_whose_name_looks_like_a_glob_is_that_file():
    assert names("x[1].png") == ["x[1].png"]


def test_words_keep_their_order_and_an_image_comes_once():
    assert names("b", "a/2.png", "a", "./b/../b/5.png") == ["b/5.png", "a/2.png", "a/1.JPG", "a/deep/er/3.webp"]
    assert names("a/2.png", os.path.abspath("a/2.png")) == ["a/2.png"]
    assert len(names("http://h/a.png", "http://h/b.png", "http://h/a.png", allow_url=True)) == 2


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("none.png", "none.png: no such file or folder"),
        ("a/.hidden/deeper", "a/.hidden/deeper: no such file or folder"),
        ("a/*.gif", r"a/\*.gif: no image file is called like that"),
        ("a/*.txt", r"a/\*.txt: no image file is called like that"),
        ("x" * 5000, "no such file or folder"),
        ("http://h/a.png", "http://h/a.png: a URL is fetched with --allow-url only"),
        ("HTTPS://me:secret@h/a.png", "^HTTPS://h/a.png: a URL is fetched with --allow-url only"),
        ("ftp://h/a.png", "ftp://h/a.png: found a URL that begins with ftp; allowed: http, https"),
        ("file:///etc/a.png", "found a URL that begins with file; allowed: http, https"),
    ],
)
def test_a_word_that_stands_for_nothing(word, reason):
    with pytest.raises(DataError, match=reason):
        find_input_images(["a", word])


def test_an_empty_folder():
    Path("empty").mkdir()
    with pytest.raises(DataError, match="empty: the folder holds no images"):
        find_input_images(["empty"])


def test_urls_when_they_are_allowed():
    found = find_input_images(["https://h/a.png", "a/2.png"], allow_url=True)
    assert list(found.images) == [RemoteImage("https://h/a.png"), Path("a/2.png")]
    with pytest.raises(DataError, match="allowed: http, https"):
        find_input_images(["ftp://h/a.png"], allow_url=True)


def test_a_list_is_taken_literally_and_line_by_line():
    taken = []

    def lines():
        for line in ("x[1].png\n", "\n", "a/none here.png\r\n", "b/5.png"):
            taken.append(line)
            yield line

    found = find_input_images(["b", "-"], listed=lines())
    assert found.count is None
    stream = iter(found.images)
    assert (next(stream), taken) == (Path("b/5.png"), [])
    assert (next(stream), len(taken)) == (Path("x[1].png"), 1)
    assert list(stream) == [Path("a/none here.png")]  # b/5.png was there before


def test_lists_that_hold_nothing_or_a_url():
    with pytest.raises(DataError, match="standard input: the list is empty"):
        list(find_input_images(["-"], listed=["\n"]).images)
    with pytest.raises(DataError, match="--allow-url only"):
        list(find_input_images(["-"], listed=["http://h/a.png\n"]).images)
    assert list(find_input_images(["-"], listed=["http://h/a.png\n"], allow_url=True).images) == [
        RemoteImage("http://h/a.png")
    ]


def test_a_list_that_is_no_text(tmp_path):
    (tmp_path / "list").write_bytes(b"a/2.png\n\xff\xfe.png\n")
    with (tmp_path / "list").open(encoding="utf-8") as lines:
        found = find_input_images(["-"], listed=lines)
        with pytest.raises(DataError, match="standard input: the list is not text"):
            list(found.images)


def test_images_that_are_not_read_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "endings", lambda: {".png": "PNG"})  # as without pillow-heif
    (tmp_path / "other").mkdir()
    for name in ("a.heic", "b.HEIC", "c.dcm"):
        (tmp_path / "other" / name).touch()
    with pytest.raises(DataError, match=r"\(\.dcm 1, \.heic 2\); HEIC"):
        find_input_images(["other"])


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
    for size, is_fetched in ((MAX_BYTES, True), (MAX_BYTES + 1, False)):
        with web.serving(bytes(size)) as (address, _):
            image = RemoteImage(f"{address}/image.png")
            if is_fetched:
                assert len(image.fetch()) == MAX_BYTES
            else:
                with pytest.raises(DataError, match="is larger than 64 MiB"):
                    image.fetch()


@pytest.fixture
def short_patience(monkeypatch):
    images._client.cache_clear()
    monkeypatch.setattr(images, "_SILENCE", 0.2)
    yield
    images._client.cache_clear()


def test_a_server_that_says_nothing_is_left(site, short_patience):
    with pytest.raises(DataError, match=r"can't be fetched: .*time"):
        RemoteImage(f"{site}/silent").fetch()


def test_an_image_that_never_ends_takes_limited_time(site, monkeypatch):
    monkeypatch.setattr(images, "_TIMEOUT", 0.0)
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
