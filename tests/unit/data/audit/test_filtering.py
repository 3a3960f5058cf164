import hostile
import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Image, Value
from datasets import Features as DatasetFeatures
from PIL import Image as PillowImage

from hfft.data.audit.filtering import Skip, check_images, fingerprint_of, readable_rows
from hfft.data.sources.reading import choose_splits, load_rows, read_source
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec, SplitSpec

SPLITS = SplitSpec(validation=None, test=None)


def check(folder, seed=0, source=None, **fields):
    spec = DataSpec(source=str(folder), **fields)
    found = read_source(spec, source)
    return check_images(found, choose_splits(found, spec, seed), spec, seed)


def spoil(folder, *names):
    for name in names:
        (folder / name).write_bytes(b"words")


def files(checked, split):
    return checked.images.splits[split]["file"][:]


def test_what_can_not_be_read_is_gone_before_anything_is_split(photos, tmp_path, log):
    folder, without = photos({"ant": 20, "bee": 20}), photos({"ant": 20, "bee": 20}, "without")
    names = ["ant/003.png", "ant/017.png", "bee/000.png"]
    spoil(folder, *names)
    for name in names:
        (without / name).unlink()
    checked, expected = check(folder), check(without)
    assert [skip.file for skip in checked.skipped] == names
    assert checked.skipped[0] == Skip("ant/003.png", "ant", "not an image in any format that hfft reads")
    for split in ("train", "validation", "test"):
        assert files(checked, split) == files(expected, split)
    assert checked.fingerprints == expected.fingerprints
    assert [finding.kind for finding in checked.findings] == ["broken"] * 3
    assert (expected.skipped, expected.findings) == ((), ())
    (message,) = log()
    first, *lines = message.splitlines()
    assert first == f"{folder}: left out: 3 files are no readable image:"
    assert [line.strip().partition(":")[0] for line in lines] == names


def test_stop_lists_them(photos):
    folder = photos({"ant": 30, "bee": 4})
    spoil(folder, *(f"ant/{number:03d}.png" for number in range(13)))
    with pytest.raises(DataError) as caught:
        check(folder, bad_images="stop", splits=SPLITS)
    first, *lines, last = str(caught.value).splitlines()
    assert first == f"{folder}: 13 files are no readable image; repair or remove:"
    assert (len(lines), last) == (10, "  and 3 more")


@pytest.mark.parametrize(("bad", "refused"), [(2, False), (3, True), (4, True)])
def test_half_of_a_class_may_go_and_no_more(bad, refused, photos):
    folder = photos({"ant": 4, "bee": 9})
    spoil(folder, *(f"ant/{number:03d}.png" for number in range(bad)))
    if not refused:
        assert len(check(folder, splits=SPLITS).skipped) == bad
        return
    with pytest.raises(DataError, match=rf"ant \({bad} of 4\)"):
        check(folder, splits=SPLITS)


def test_few_images_of_a_class_are_filled_up_from_others_that_can_be_read(photos):
    folder = photos({"ant": 30, "bee": 30})
    spec = {"splits": SPLITS, "max_per_class": 6}
    first = check(folder, **spec)
    chosen = [file for file in files(first, "train") if file.startswith("ant")]
    spoil(folder, *chosen[:2])
    checked = check(folder, **spec)
    assert checked.images.counts("train") == {"ant": 6, "bee": 6}
    assert {skip.file for skip in checked.skipped} >= set(chosen[:2])
    assert not {skip.file for skip in checked.skipped} & set(files(checked, "train"))
    assert set(checked.fingerprints) == {"train"}


def test_tables_in_memory():
    rng = np.random.default_rng(0)
    images = [PillowImage.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)) for _ in range(8)]
    column = [*images[:3], None, {"bytes": b"words", "path": None}, *images[3:]]
    features = DatasetFeatures({"image": Image(), "label": Value("string")})
    table = Dataset.from_dict({"image": column, "label": ["a", "b"] * 5}, features=features)
    checked = check("unused", source=DatasetDict(train=table), splits=SPLITS)
    assert [(skip.file, skip.label) for skip in checked.skipped] == [("train/3", "b"), ("train/4", "a")]
    assert files(checked, "train") == [f"train/{row}" for row in (0, 1, 2, 5, 6, 7, 8, 9)]


def leak(folder):
    hostile.make_clean(folder)
    content = (folder / "train" / "ant" / "003.jpg").read_bytes()
    (folder / "test" / "ant" / "seen.jpg").write_bytes(content)
    return folder


def test_leaks_are_warned_of_and_stay(tmp_path, log):
    checked = check(leak(tmp_path / "photos"))
    assert "test/ant/seen.jpg" in files(checked, "test")
    assert [finding.kind for finding in checked.findings] == ["leak"]
    (message,) = log()
    assert "2 images are the same in two splits, so that scores will be too good" in message
    assert "leak (train and test): train/ant/003.jpg, test/ant/seen.jpg" in message


def test_leaks_can_stop(tmp_path):
    with pytest.raises(DataError, match=r"the same in two splits.*data.leaks=warn"):
        check(leak(tmp_path / "photos"), leaks="stop")


def test_contradictions_are_warned_of(tmp_path, log):
    folder = hostile.make_clean(tmp_path / "photos")
    (folder / "train" / "bee" / "x.jpg").write_bytes((folder / "train" / "ant" / "003.jpg").read_bytes())
    check(folder)
    (message,) = log()
    assert "two labels (ant and bee): train/ant/003.jpg, train/bee/x.jpg" in message


def test_notes_are_counted_in_one_line(tmp_path, log):
    folder = hostile.make_clean(tmp_path / "photos")
    for number in range(2):
        (folder / "train" / "bee" / f"x{number}.jpg").write_bytes((folder / "train/bee/003.jpg").read_bytes())
    PillowImage.new("RGB", (90, 90)).save(folder / "train" / "bee" / "black.png")
    check(folder)
    (message,) = log()
    assert message.endswith("also found: duplicate 1, blank 1; data.json and `hfft check-data` name them")


@pytest.mark.parametrize(("count", "images"), [(1, "1 image has"), (3, "3 images have")])
def test_deep_images_are_warned_of(count, images, tmp_path, log):
    folder = hostile.make_clean(tmp_path / "photos")
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 65536, (40, 40), dtype=np.uint16)
        PillowImage.fromarray(pixels).save(folder / "train" / "ant" / f"deep{number}.png")
    check(folder)
    (message,) = log()
    assert message.startswith(f"{folder}: {images} more than 8 bits per channel")
    assert "hfft.Classifier" in message


def test_without_an_audit_nothing_is_looked_at(tmp_path, log):
    hostile.make_hostile(tmp_path / "photos", {**hostile.ODD, "text": hostile.BROKEN["text"]})
    checked = check(tmp_path / "photos" / "train", audit="off")
    assert (checked.skipped, checked.findings) == ((), ())
    assert not any("also found" in message for message in log())


def test_a_quick_audit_finds_copies_and_no_likeness(tmp_path):
    expected = hostile.make_hostile(tmp_path / "photos", hostile.ODD)
    kinds = {finding.kind for finding in check(tmp_path / "photos", audit="quick").findings}
    assert {"leak", "two labels", "duplicate", "wrong ending", "tiny", "huge"} <= kinds
    assert not kinds & {"near leak", "near duplicate", "blank", "deep"}
    assert kinds < {kind for kind, _ in expected}


def test_rows_of_new_data(photos):
    folder = photos({"ant": 4, "bee": 4})
    spoil(folder, "bee/001.png")
    spec = DataSpec(source=str(folder))
    rows = load_rows(spec, ("ant", "bee", "cat"))
    kept = readable_rows(rows, ("ant", "bee", "cat"), spec)
    assert kept["file"][:] == [file for file in rows["file"][:] if file != "bee/001.png"]
    (folder / "bee" / "001.png").unlink()
    assert fingerprint_of(kept) == fingerprint_of(load_rows(spec, ("ant", "bee", "cat")))
