import os

import hostile
import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PillowImage

from hfft.data.audit import audit as audit_module
from hfft.data.audit.audit import DEEP, audit
from hfft.data.sources.reading import load_data
from hfft.recipe.spec import DataSpec, SplitSpec


def rows_of(folder):
    return load_data(DataSpec(source=str(folder), splits=SplitSpec(validation=None, test=None)), 0).splits["train"]


def broken(found):
    return {found.files[row]: problem for row, problem in sorted(found.problems.items())}


def fingerprint(folder):
    found = audit(rows_of(folder))
    assert found.problems == {}
    return found.fingerprint()


def test_broken_files_are_named_with_the_reason(photos):
    folder = photos({"ant": 4, "bee": 4})
    (folder / "ant" / "001.png").write_text("words")
    (folder / "ant" / "003.png").write_bytes(b"")
    whole = (folder / "bee" / "000.png").read_bytes()
    (folder / "bee" / "000.png").write_bytes(whole[: len(whole) // 2])
    rows = rows_of(folder)
    (folder / "bee" / "002.png").unlink()
    reasons = broken(audit(rows))
    assert list(reasons) == ["ant/001.png", "ant/003.png", "bee/000.png", "bee/002.png"]
    assert reasons["ant/001.png"] == "not an image in any format that hfft reads"
    assert reasons["ant/003.png"] == "the file is empty"
    assert "truncated" in reasons["bee/000.png"]
    assert reasons["bee/002.png"] == "no such file"


def test_images_inside_of_a_table():
    good = PillowImage.new("RGB", (4, 4), "red")
    columns = {"image": [good, None, {"bytes": b"words", "path": None}, good], "label": ["a", "a", "b", "b"]}
    table = Dataset.from_dict(columns, features=Features({"image": Image(), "label": Value("string")}))
    spec = DataSpec(source="unused", splits=SplitSpec(validation=None, test=None))
    rows = load_data(spec, 0, DatasetDict(train=table)).splits["train"]
    assert broken(audit(rows)) == {
        "train/1": "the row holds no image",
        "train/2": "not an image in any format that hfft reads",
    }


def test_deep_images_are_counted(photos):
    folder = photos({"ant": 4, "bee": 4})
    values = np.arange(20, dtype=np.uint16).reshape(4, 5) * 3000
    PillowImage.fromarray(values).save(folder / "ant" / "000.png")
    PillowImage.fromarray(values).save(folder / "ant" / "001.png", "TIFF")
    PillowImage.frombytes("I;16B", (5, 4), values.astype(">u2").tobytes()).save(folder / "ant" / "002.png", "TIFF")
    PillowImage.fromarray(values.astype(np.int32)).save(folder / "bee" / "000.png", "TIFF")
    PillowImage.fromarray(values.astype(np.float32)).save(folder / "bee" / "001.png", "TIFF")
    PillowImage.fromarray(np.full((4, 5), np.nan, np.float32)).save(folder / "bee" / "002.png", "TIFF")
    PillowImage.fromarray(values.astype(np.uint8)).convert("P").save(folder / "bee" / "003.png")
    found = audit(rows_of(folder))
    assert (((found.records["traits"] & DEEP) > 0).sum(), list(broken(found))) == (5, ["bee/002.png"])


def test_the_fingerprint_stays_when_nothing_changes(photos):
    folder = photos({"ant": 3, "bee": 3})
    first = fingerprint(folder)
    os.utime(folder / "ant" / "000.png", (0, 0))
    assert fingerprint(folder) == first
    assert fingerprint(folder.rename(folder.with_name("moved"))) == first


def one_byte(folder):
    path = folder / "ant" / "000.png"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in the checksum of the last chunk, which no pixel depends on
    path.write_bytes(content)


def a_label(folder):
    (folder / "ant" / "000.png").rename(folder / "bee" / "003.png")


def a_name(folder):
    (folder / "ant" / "002.png").rename(folder / "ant" / "003.png")


def one_more(folder):
    (folder / "bee" / "003.png").write_bytes((folder / "bee" / "000.png").read_bytes())


def one_less(folder):
    (folder / "bee" / "002.png").unlink()


def two_swapped(folder):
    first, second = folder / "ant" / "000.png", folder / "ant" / "001.png"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


@pytest.mark.parametrize("change", [one_byte, a_label, a_name, one_more, one_less, two_swapped])
def test_the_fingerprint_changes_with(change, photos):
    folder = photos({"ant": 3, "bee": 3})
    before = fingerprint(folder)
    change(folder)
    assert audit(rows_of(folder)).fingerprint() != before


def test_the_fingerprint_sees_a_label_alone(photos):
    rows = rows_of(photos({"ant": 2, "bee": 2}))
    relabelled = rows.remove_columns("label").add_column("label", [0, 1, 1, 1], feature=rows.features["label"])
    assert audit(relabelled.select_columns(rows.column_names)).fingerprint() != audit(rows).fingerprint()


def test_a_fingerprint_of_some_rows_is_that_of_these_rows_alone(photos):
    rows = rows_of(photos({"ant": 4, "bee": 4}))
    some = rows.select([6, 1, 2])
    found = audit(rows)
    assert found.fingerprint(found.numbers(some)) == audit(some).fingerprint()


def everything(found):
    return (
        found.records.tolist(),
        np.asarray(found.thumbnails).tolist(),
        dict(found.problems),
        dict(found.remarks),
        found.fingerprint(),
    )


def hostile_rows(tmp_path, name="photos"):
    hostile.make_hostile(tmp_path / name, {**hostile.BROKEN, **hostile.ODD})
    return rows_of(tmp_path / name / "train")


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_number_of_threads_changes_nothing(threads, tmp_path, monkeypatch):
    rows = hostile_rows(tmp_path)
    expected = everything(audit(rows))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(threads)))
    assert everything(audit(rows)) == expected


def test_files_that_stay_the_same_are_not_decoded_again(tmp_path, monkeypatch):
    rows = hostile_rows(tmp_path)
    monkeypatch.setattr(audit_module, "HF_HOME", str(tmp_path / "home"))
    look = {"cached_for": "photos"}
    first = everything(audit(rows, **look))
    decoded = []
    examine = audit_module.examine_content
    monkeypatch.setattr(audit_module, "examine_content", lambda *args: decoded.append(1) or examine(*args))
    assert everything(audit(rows, **look)) == first
    assert decoded == []
    changed = tmp_path / "photos" / "train" / "ant" / "000.jpg"
    changed.write_bytes(hostile.encoded(hostile.picture(12345)))
    again = audit(rows, **look)
    assert len(decoded) == 1
    assert everything(again) == everything(audit(rows))
    assert everything(again) != first


def test_other_settings_are_cached_apart(tmp_path, monkeypatch):
    rows = hostile_rows(tmp_path)
    monkeypatch.setattr(audit_module, "HF_HOME", str(tmp_path / "home"))
    for options in ({}, {"level": "quick"}, {"background": (9, 9, 9)}):
        alone = everything(audit(rows, **options))
        cached = [everything(audit(rows, **options, cached_for="photos")) for _ in range(2)]
        assert cached == [alone, alone]


@pytest.mark.parametrize("damage", ["records.npy", "thumbnails.npy", "texts.json"])
def test_a_damaged_cache_is_ignored(damage, photos, tmp_path, monkeypatch):
    rows = rows_of(photos({"ant": 3, "bee": 3}))
    monkeypatch.setattr(audit_module, "HF_HOME", str(tmp_path / "home"))
    expected = everything(audit(rows, cached_for="photos"))
    (path,) = (tmp_path / "home").rglob(damage)
    path.write_bytes(path.read_bytes()[:7])
    assert everything(audit(rows, cached_for="photos")) == expected


def test_a_cache_that_can_not_be_written_is_no_error(photos, tmp_path, monkeypatch):
    (tmp_path / "home").write_text("a file")
    monkeypatch.setattr(audit_module, "HF_HOME", str(tmp_path / "home"))
    assert audit(rows_of(photos({"ant": 3, "bee": 3})), cached_for="photos").problems == {}


def test_a_quick_audit_reads_headers_alone(tmp_path):
    found = audit(hostile_rows(tmp_path), "quick")
    assert "ant/empty.jpg" in broken(found)
    assert "ant/text.png" in broken(found)
    assert "cat/cut.jpg" not in broken(found)
    place = found.files.index("ant/wall.jpg")
    assert (found.records["width"][place], found.records["height"][place]) == (8000, 6400)
    assert not found.thumbnails.any()


def test_the_audit_that_is_off_still_reads_the_files(tmp_path):
    rows = hostile_rows(tmp_path)
    found = audit(rows, "off")
    assert set(broken(found)) == {"ant/pipe.jpg", "bee/gone.jpg", "cat/loop.png"}  # whose bytes can't be read
    assert found.fingerprint() == audit(rows).fingerprint()
