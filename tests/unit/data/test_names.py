"""Names on disk that are no text, or hold what no console takes: read, and shown as escapes."""

import os

import numpy as np
import pytest
from pictures import make_photos
from shards import write_tar

from hfft.commands.check_data import check_data
from hfft.data.images.decoding import decode_row, part_of, read_content, stored_path
from hfft.data.sources.reading import load_data, read_source
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec, SplitSpec
from hfft.system.text import path_text

ALL = SplitSpec(validation=None, test=None)
NAMES = {b"caf\xe9.png": "caf\\xe9.png", b"a\x1b[31m.png": "a\\x1b[31m.png", b"b\n.png": "b\\x0a.png"}


@pytest.fixture
def folder(tmp_path):
    root = make_photos(tmp_path / "photos", {"ant": 3, "bee": 3})
    for label in ("ant", "bee"):
        for number, name in enumerate(NAMES):
            os.rename(root / label / f"{number:03d}.png", os.fsencode(root / label) + b"/" + name)
    return root


def load(source, splits=ALL, **fields):
    return load_data(DataSpec(source=str(source), splits=splits, **fields), 0)


def test_files_of_class_folders(folder):
    data = load(folder)
    rows = data.splits["train"]
    assert set(rows["file"][:]) == {f"{label}/{name}" for label in ("ant", "bee") for name in NAMES.values()}
    assert {np.asarray(decode_row(row)).shape for row in rows} == {(44, 40, 3)}
    assert {finding.kind for finding in check_data(str(folder)).findings} == {"rare class"}


def test_folders_of_classes_and_splits(tmp_path):
    root = make_photos(tmp_path / "photos", {"train/ant": 2, "train/bee": 2, "test/ant": 2, "test/bee": 2})
    for split in ("train", "test"):
        os.rename(root / split / "ant", os.fsencode(root / split) + b"/caf\xe9\x1b")
    data = load(root, SplitSpec(validation=None))
    assert data.labels == ("bee", "caf\\xe9\\x1b")
    assert {split: data.counts(split)["bee"] for split in data.splits} == {"train": 2, "test": 2}
    assert len([decode_row(row) for row in data.splits["test"]]) == 4


def test_a_table_in_a_folder_whose_name_is_no_text(folder, tmp_path):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    os.rename(folder, odd)
    os.rename(os.fsencode(odd) + b"/ant/a\x1b[31m.png", os.fsencode(odd) + "/ant/é.png".encode())
    with open(os.path.join(odd, "t.jsonl"), "w", encoding="utf-8") as stream:
        stream.write('{"path": "ant/é.png", "label": "a"}\n{"path": "bee/b\\n.png", "label": "b"}\n')
    rows = load(os.path.join(odd, "t.jsonl")).splits["train"]
    assert rows["file"][:] == ["ant/é.png", "bee/b\\x0a.png"]
    assert len([decode_row(row) for row in rows]) == 2


def test_members_of_a_tar_file(folder, tmp_path):
    content = (folder / "ant" / "b\n.png").read_bytes()
    names = [f"{'ab'[number]}/{os.fsdecode(name)}" for number in range(2) for name in NAMES]
    members = [(name, content) for name in names] + [(f"{name[:-4]}.cls", name[:1].encode()) for name in names]
    write_tar(tmp_path / "x.tar", sorted(members))
    data = load(tmp_path / "x.tar")
    assert data.counts("train") == {"a": 3, "b": 3}
    assert set(data.splits["train"]["file"][:]) == {f"x.tar/{k}/{name}" for k in "ab" for name in NAMES.values()}
    assert {read_content(row["image"]) for row in data.splits["train"]} == {content}


def test_a_name_that_holds_the_characters_that_stand_for_bytes(tmp_path):
    stored = stored_path(path_text(os.fsencode(tmp_path) + b"/caf\xe9"))
    (tmp_path / "plain").write_bytes(b"content")
    with open(os.fsencode(tmp_path) + b"/caf\xe9", "wb") as stream:
        stream.write(b"of bytes")
    assert read_content({"bytes": None, "path": stored}) == b"of bytes"
    with open(stored, "wb") as stream:
        stream.write(b"of characters")
    assert read_content({"bytes": None, "path": stored}) == b"of characters"
    assert read_content({"bytes": None, "path": part_of(tmp_path / "plain", 2, 3)}) == b"nte"


def test_names_of_splits(tmp_path):
    rows = "1.png,a,train\n2.png,b,train\n3.png,a,\x1b[31m\n"
    (tmp_path / "t.csv").write_text(f"path,label,part\n{rows}")
    assert list(read_source(DataSpec(source=str(tmp_path / "t.csv"), split_column="part")).splits) == [
        "train",
        "\\x1b[31m",
    ]
    with pytest.raises(DataError, match=r"found: train, \\x1b\[31m"):
        load(tmp_path / "t.csv", SplitSpec(validation=None, test="test"), split_column="part")
