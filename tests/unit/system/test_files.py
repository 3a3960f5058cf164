import json

import pytest

from hfft.system.files import publish_folder, read_json, write_file, write_folder, write_json, write_text


class Interrupted(Exception):
    pass


def visible(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_write_text_makes_and_replaces_a_file(tmp_path):
    path = tmp_path / "x.txt"
    write_text(path, "häuser\n")
    assert path.read_bytes() == b"h\xc3\xa4user\n"
    write_text(path, "")
    assert path.read_bytes() == b""
    assert list(tmp_path.iterdir()) == [path]


def test_text_that_cannot_be_written_leaves_the_older_file(tmp_path):
    path = tmp_path / "x.txt"
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \ud800 surrogate")
    assert visible(tmp_path) == []
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new " * 10_000 + "\ud800")
    assert path.read_text() == "old"


def test_write_json_is_readable_by_people_and_machines(tmp_path):
    content = {"größe": [1, 2.5, None, True], "a": {"b": "c"}}
    write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert "größe" in text
    assert text.count("\n") > 5
    assert text.endswith("}\n")
    assert read_json(tmp_path / "x.json") == content


def test_a_value_that_is_no_json_leaves_the_older_file(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(TypeError):
        write_json(path, {"a": {1, 2}})
    assert visible(tmp_path) == []
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": 2, "b": object()})
    assert read_json(path) == {"a": 1}


def half_a_file(aside):
    aside.write_text("half")
    raise Interrupted


def half_a_folder(aside):
    (aside / "first").write_text("new")
    raise Interrupted


def test_a_file_whose_writer_fails_is_absent_or_the_older_one(tmp_path):
    path = tmp_path / "x.bin"
    with pytest.raises(Interrupted):
        write_file(path, half_a_file)
    assert visible(tmp_path) == []
    path.write_text("old")
    with pytest.raises(Interrupted):
        write_file(path, half_a_file)
    assert path.read_text() == "old"
    write_file(path, lambda aside: aside.write_text("whole"))  # what the failure left is no obstacle
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_file_is_there_while_the_new_one_is_written(tmp_path):
    path = tmp_path / "x.bin"
    path.write_text("old")
    seen = []

    def write(aside):
        aside.write_text("new")
        seen.append(path.read_text())
        assert aside.parent == path.parent  # a rename is atomic within a file system only

    write_file(path, write)
    assert seen == ["old"]
    assert path.read_text() == "new"


def test_a_folder_whose_writer_fails_is_absent_or_the_older_one(tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(Interrupted):
        write_folder(folder, half_a_folder)
    assert visible(tmp_path) == []
    folder.mkdir()
    (folder / "first").write_text("old")
    (folder / "second").write_text("old")
    with pytest.raises(Interrupted):
        write_folder(folder, half_a_folder)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"first": "old", "second": "old"}


def test_a_new_folder_replaces_the_older_one_whole(tmp_path):
    folder = tmp_path / "deep" / "model"
    write_folder(folder, lambda aside: (aside / "old").write_text("old"))
    with pytest.raises(Interrupted):
        write_folder(folder, half_a_folder)

    def write(aside):
        assert list(aside.iterdir()) == []  # nothing of the failed attempt
        (aside / "sub").mkdir()
        (aside / "sub" / "new").write_text("new")

    write_folder(folder, write)
    assert [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))] == ["sub", "sub/new"]
    assert list(folder.parent.iterdir()) == [folder]


def test_publish_folder_renames(tmp_path):
    aside, folder = tmp_path / "aside", tmp_path / "checkpoint-1"
    aside.mkdir()
    (aside / "weights").write_text("w")
    publish_folder(aside, folder)
    assert list(tmp_path.iterdir()) == [folder]
    assert (folder / "weights").read_text() == "w"
