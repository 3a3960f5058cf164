"""Every verb prints on any console: of any encoding, closed, or one whose reader leaves."""

import io
import json
import os
import sys

import pytest

from hfft.cli import main
from hfft.cli.printing import (
    ConsoleError,
    format_interval,
    open_console,
    print_error,
    print_line,
    print_metrics,
    print_table,
)

LINE = "Straße 猫 caf\udce9 \x1b[31m"
NAMES = ("Straße", "ant\\x1b[31m", "b\\x0ac", "caf\\xe9", "猫")
FOLDERS = (b"ant\x1b[31m", b"caf\xe9", b"b\nc", "Straße".encode(), "猫".encode())


def stream(encoding):
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


def written(monkeypatch, encoding, work, name="stdout"):
    monkeypatch.setattr(sys, name, stream(encoding))
    open_console()
    work()
    getattr(sys, name).flush()
    return getattr(sys, name).buffer.getvalue().decode(encoding)


@pytest.fixture
def odd_photos(photos):
    """Class folders, and images in them, with names that no console takes."""
    folder = photos({f"{n}": 8 for n in range(len(FOLDERS))})
    for number, name in enumerate(FOLDERS):
        os.rename(folder / str(number) / "000.png", os.fsencode(folder / str(number)) + b"/\xff\x07.png")
        os.rename(folder / str(number), os.fsencode(folder) + b"/" + name)
    return folder


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8", "utf-16"])
def test_a_console_of_any_encoding(encoding, monkeypatch):
    shown = (
        LINE.replace("\udce9", "\\xe9").replace("\x1b", "\\x1b").encode(encoding, "backslashreplace").decode(encoding)
    )
    assert written(monkeypatch, encoding, lambda: print_line(LINE)) == f"{shown}\n"
    assert written(monkeypatch, encoding, lambda: print_error(LINE), "stderr") == f"{shown}\n"
    assert shown in written(monkeypatch, encoding, lambda: print_table([LINE], [[LINE]]))


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_verb_with_names_that_no_console_takes(encoding, odd_photos, monkeypatch):
    text = written(monkeypatch, encoding, lambda: main(["check-data", str(odd_photos)]))
    assert not {character for character in text if ord(character) < 32} - {"\n"}
    classes = [line.split()[0] for line in text.split("class ")[1].splitlines()[1:6]]
    assert classes == [name.encode(encoding, "backslashreplace").decode(encoding) for name in NAMES]


def test_json_is_json_on_any_console(odd_photos, monkeypatch):
    text = written(monkeypatch, "ascii", lambda: main(["check-data", str(odd_photos), "--json"]))
    assert set(json.loads(text)["splits"]["train"]["counts"]) == {
        "Straße",
        "ant\\x1b[31m",
        "b\\x0ac",
        "caf\\xe9",
        "猫",
    }


def test_a_list_of_names_as_the_system_has_them(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9.png\n\xc3\xa9.png\n"), encoding="ascii"))
    open_console()
    assert list(map(os.fsencode, sys.stdin)) == [b"caf\xe9.png\n", b"\xc3\xa9.png\n"]


def test_streams_that_were_closed(odd_photos, monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert main(["check-data", str(odd_photos)]) == 0
    assert main(["check-data", "no/such/folder"]) == 2


def test_a_reader_that_leaves(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w", encoding="utf-8"))
    print_line("a")
    print_table(["b"], [["c"]])
    sys.stdout.close()  # what Python does at its end


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_stream_that_is_full(monkeypatch):
    monkeypatch.setattr(sys, "stdout", os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", encoding="utf-8"))
    with pytest.raises(ConsoleError, match="can't be written"):
        print_line("a")
    sys.stdout.close()


def test_words_with_control_characters(capsys):
    with pytest.raises(SystemExit):
        main(["check-data", "photos", "--\x1b[31m"])
    assert "unknown option --\\x1b[31m" in capsys.readouterr().err


def test_a_source_whose_name_is_no_text(capsys):
    assert main(["check-data", "caf\udce9"]) == 2
    assert "caf\\xe9 is no UTF-8 text" in capsys.readouterr().err


def test_too_few_images_are_said_in_the_place_of_an_interval(capsys):
    known = {"value": 0.5, "low": 0.25, "high": 0.75}
    unknown = {"value": 0.5, "low": None, "high": None}
    print_metrics({"test": {"accuracy": known, "log_loss": unknown}})
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["test", "accuracy", "0.5000", "0.2500", "to", "0.7500"]
    assert lines[2].split() == ["test", "log", "loss", "0.5000", "too", "few", "images"]
    assert format_interval(unknown, "+") == "+0.5000 (too few images)"
