import os

import pytest

from hfft.system.text import path_text, printable, printable_path

NAMES = {
    "a\x1b[31m": "a\\x1b[31m",
    "b\nc\td\r": "b\\x0ac\\x09d\\x0d",
    "\x00\x7f\x85\x9b": "\\x00\\x7f\\x85\\x9b",
    "\u2028\u202e\u2066": "\\u2028\\u202e\\u2066",
    "caf\udce9": "caf\\xe9",
    "\ud800": "\\ud800",
    "Straße é 猫 👩\u200d🚀 \u200c\u00a0": "Straße é 猫 👩\u200d🚀 \u200c\u00a0",  # joiners are part of words
}


@pytest.mark.parametrize(("name", "shown"), NAMES.items(), ids=ascii)
def test_what_a_console_takes(name, shown):
    assert printable(name) == shown
    assert printable(shown) == shown


def test_characters_that_stay():
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def test_a_path_is_its_bytes(monkeypatch):
    assert path_text("é") == "é"
    assert printable_path(b"caf\xe9/\xc3\xa9") == "caf\\xe9/é"
    monkeypatch.setattr(os, "fsencode", lambda path: path.encode("latin-1"))  # as where the system says so
    assert printable_path("caf\xc3\xa9") == "café"
