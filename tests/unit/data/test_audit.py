import os

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PillowImage

from hfft.data.audit import Audit, audit, refuse_broken
from hfft.data.sources import load_data
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec, SplitSpec


def rows_of(folder):
    return load_data(DataSpec(source=str(folder), splits=SplitSpec(validation=None, test=None)), 0).splits["train"]


def fingerprint(folder):
    found = audit(rows_of(folder), "checking")
    assert found.broken == {}
    return found.fingerprint


def test_broken_files_are_named_with_the_reason(photos):
    folder = photos({"ant": 4, "bee": 4})
    (folder / "ant" / "001.png").write_text("words")
    (folder / "ant" / "003.png").write_bytes(b"")
    whole = (folder / "bee" / "000.png").read_bytes()
    (folder / "bee" / "000.png").write_bytes(whole[: len(whole) // 2])
    rows = rows_of(folder)
    (folder / "bee" / "002.png").unlink()
    broken = audit(rows, "checking").broken
    assert list(broken) == ["ant/001.png", "ant/003.png", "bee/000.png", "bee/002.png"]
    assert broken["ant/001.png"] == broken["ant/003.png"] == "not an image in any format that hfft reads"
    assert "truncated" in broken["bee/000.png"]
    assert broken["bee/002.png"] == "No such file or directory"


def test_images_inside_of_a_table():
    good = PillowImage.new("RGB", (4, 4), "red")
    columns = {"image": [good, None, {"bytes": b"words", "path": None}, good], "label": ["a", "a", "b", "b"]}
    table = Dataset.from_dict(columns, features=Features({"image": Image(), "label": Value("string")}))
    spec = DataSpec(source="unused", splits=SplitSpec(validation=None, test=None))
    rows = load_data(spec, 0, DatasetDict(train=table)).splits["train"]
    assert audit(rows, "checking").broken == {
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
    found = audit(rows_of(folder), "checking")
    assert (found.deep, list(found.broken)) == (5, ["bee/002.png"])


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
    assert audit(rows_of(folder), "checking").fingerprint != before


def test_the_fingerprint_sees_a_label_alone(photos):
    rows = rows_of(photos({"ant": 2, "bee": 2}))
    relabelled = rows.remove_columns("label").add_column("label", [0, 1, 1, 1], feature=rows.features["label"])
    assert audit(relabelled.select_columns(rows.column_names), "x").fingerprint != audit(rows, "x").fingerprint


def audits(*counts):
    return {
        f"split{number}": Audit("0", {f"split{number}/{place:02d}.png": f"reason {place}" for place in range(count)})
        for number, count in enumerate(counts)
    }


def test_nothing_broken_is_no_error():
    assert refuse_broken(audits(0, 0), "photos") is None


def test_one_broken_file():
    with pytest.raises(DataError) as caught:
        refuse_broken(audits(0, 1), "photos")
    assert str(caught.value) == ("photos: 1 file is no readable image; repair or remove:\n  split1/00.png: reason 0")


def test_ten_broken_files_are_all_listed():
    with pytest.raises(DataError) as caught:
        refuse_broken(audits(4, 6), "photos")
    first, *lines = str(caught.value).splitlines()
    assert first == "photos: 10 files are no readable image; repair or remove:"
    assert lines == [f"  split0/0{n}.png: reason {n}" for n in range(4)] + [
        f"  split1/0{n}.png: reason {n}" for n in range(6)
    ]


def test_more_than_ten_broken_files_are_counted():
    with pytest.raises(DataError) as caught:
        refuse_broken(audits(7, 8), "photos")
    first, *lines, last = str(caught.value).splitlines()
    assert first.startswith("photos: 15 files are no readable image")
    assert len(lines) == 10
    assert last == "  and 5 more"


@pytest.mark.parametrize(("deep", "images"), [((0, 1), "1 image has"), ((3, 2), "5 images have")])
def test_deep_images_warn_once(deep, images, log):
    refuse_broken({str(place): Audit("0", {}, deep=count) for place, count in enumerate(deep)}, "photos")
    (message,) = log()
    assert message.startswith(f"photos: {images} more than 8 bits per channel")
    assert 'pipeline("image-classification")' in message
    assert "hfft.Classifier" in message


def test_images_of_8_bits_do_not_warn(photos, log):
    refuse_broken({"train": audit(rows_of(photos({"ant": 2, "bee": 2})), "checking")}, "photos")
    assert log() == []
