import io
import os
from collections import Counter
from pathlib import Path

import finished
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PillowImage

from hfft.data.sources import table_files
from hfft.data.sources.reading import images_of_run, load_data, load_rows
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec, SplitSpec

NO_CARVING = SplitSpec(validation=None, test=None)


def load(folder, splits=NO_CARVING, seed=0, **fields):
    return load_data(DataSpec(source=str(folder), splits=splits, **fields), seed)


def found(data):
    """Split -> file -> class name."""
    return {
        split: {row["file"]: data.labels[row["label"]] for row in rows} for split, rows in sorted(data.splits.items())
    }


# Folders


def test_class_folders_without_splits(touch):
    folder = touch("bee/1.png", "ant/1.png", "ant/2.jpg")
    data = load(folder)
    assert data.labels == ("ant", "bee")
    assert found(data) == {"train": {"ant/1.png": "ant", "ant/2.jpg": "ant", "bee/1.png": "bee"}}
    assert data.counts("train") == {"ant": 2, "bee": 1}
    row = data.splits["train"][0]
    assert row["image"] == {"path": str(folder / "ant/1.png"), "bytes": None}
    assert data.splits["train"].features == Features(
        {"image": Image(decode=False), "label": ClassLabel(names=["ant", "bee"]), "file": Value("string")}
    )


SPLIT_FOLDERS = [
    ("train", "validation", "test"),
    ("train", "val", "test"),
    ("train", "valid", "eval"),
    ("training", "dev", "testing"),
    ("Train", "Val", "Test"),
    ("TRAIN", "VALIDATION", "EVALUATION"),
]


@pytest.mark.parametrize("names", SPLIT_FOLDERS, ids="-".join)
def test_split_folders(names, touch):
    train, validation, test = names
    files = [f"{split}/{label}/{number}.png" for split in names for label in ("ant", "bee") for number in range(2)]
    data = load(touch(*files), SplitSpec())
    assert found(data) == {
        "test": {file: file.split("/")[1] for file in files if file.startswith(f"{test}/")},
        "train": {file: file.split("/")[1] for file in files if file.startswith(f"{train}/")},
        "validation": {file: file.split("/")[1] for file in files if file.startswith(f"{validation}/")},
    }


def test_a_split_folder_of_its_own_is_split_further(touch):
    folder = touch(*[f"train/{label}/{number}.png" for label in ("ant", "bee") for number in range(10)])
    data = load(folder, SplitSpec(validation=0.2, test=None))
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 16, "validation": 4}
    assert data.labels == ("ant", "bee")


def test_class_folders_whose_names_hold_split_words(touch):
    files = ["training_shoes/1.png", "training_shoes/2.png", "test_tube/1.png", "cat/1.png"]
    folder = touch(*files)
    assert found(load(folder)) == {"train": {file: file.split("/")[0] for file in files}}


@pytest.mark.parametrize("name", ["train", "test", "val", "dev"])
def test_a_class_that_is_called_like_a_split(name, touch):
    files = [f"{name}/1.png", f"{name}/2.png", "car/1.png", "ship/1.png"]
    data = load(touch(*files))
    assert data.labels == tuple(sorted([name, "car", "ship"]))
    assert found(data) == {"train": {file: file.split("/")[0] for file in files}}


def test_two_classes_that_are_called_train_and_test(touch):
    folder = touch("train/1.png", "train/2.png", "test/1.png")
    with pytest.raises(DataError, match=r"data\.label_column=class_folder"):
        load(folder)
    data = load(folder, label_column="class_folder")
    assert found(data) == {"train": {"train/1.png": "train", "train/2.png": "train", "test/1.png": "test"}}


def test_a_class_called_train_inside_of_split_folders(touch):
    files = ["train/train/1.png", "train/ship/1.png", "test/train/2.png", "test/ship/2.png"]
    data = load(touch(*files), SplitSpec(validation=None))
    assert data.labels == ("ship", "train")
    assert found(data) == {
        "train": {"train/train/1.png": "train", "train/ship/1.png": "ship"},
        "test": {"test/train/2.png": "train", "test/ship/2.png": "ship"},
    }


def test_split_folders_beside_a_folder_that_is_none(touch):
    folder = touch("train/ant/1.png", "train/bee/1.png", "test/ant/1.png", "holdout/ant/1.png")
    with pytest.raises(DataError) as caught:
        load(folder)
    message = str(caught.value)
    assert message.startswith(
        f"{folder}: test, train look like splits and holdout do not; allowed: class folders alone"
    )
    assert "train, training, validation, valid, val, dev, test, testing, eval, evaluation" in message


def test_split_folders_without_train(touch):
    folder = touch("val/ant/1.png", "val/bee/1.png", "test/ant/1.png")
    with pytest.raises(DataError, match="found: test, val"):
        load(folder)


def test_two_folders_for_one_split(touch):
    folder = touch(*[f"{split}/{label}/1.png" for split in ("train", "val", "dev") for label in ("ant", "bee")])
    with pytest.raises(DataError, match="'validation': dev, val"):
        load(folder, SplitSpec(test=None))
    data = load(folder, SplitSpec(validation="val", test="dev"))
    assert set(found(data)["validation"]) == {"val/ant/1.png", "val/bee/1.png"}
    assert set(found(data)["test"]) == {"dev/ant/1.png", "dev/bee/1.png"}


def test_images_below_nested_folders_belong_to_the_class_folder(touch):
    data = load(touch("ant/2019/may/1.png", "ant/2020/1.png", "bee/1.png"))
    assert found(data) == {
        "train": {"ant/2019/may/1.png": "ant", "ant/2020/1.png": "ant", "bee/1.png": "bee"},
    }


def test_endings_in_any_case_and_other_files(touch):
    kept = ["ant/1.JPG", "ant/2.Png", "ant/3.tiff", "ant/4.webp", "ant/5.avif", "bee/ü & [1].jpeg"]
    data = load(touch(*kept, "ant/notes.txt", "ant/Thumbs.db", "bee/labels.csv", "README.md"))
    assert list(found(data)["train"]) == kept


def test_hidden_files_and_folders_are_left_out(touch):
    kept = ["ant/1.png", "bee/1.png"]
    folder = touch(*kept, "ant/._1.png", "ant/.thumbnails/1.png", ".trash/1.png", "__MACOSX/ant/1.png")
    assert list(found(load(folder))["train"]) == kept


def test_a_class_folder_that_is_a_link(touch, tmp_path):
    folder = touch("ant/1.png", "bee/1.png")
    (folder / "bee").rename(tmp_path / "elsewhere")
    (folder / "bee").symlink_to(tmp_path / "elsewhere")
    assert list(found(load(folder))["train"]) == ["ant/1.png", "bee/1.png"]


def test_what_is_left_out_is_said_before_an_error(touch, log):
    folder = touch("ant/1.jxl", "ant/2.jxl", "bee/1.jxl")
    with pytest.raises(DataError, match="the class folder holds no images"):
        load(folder)
    assert log() == [f"{folder}: left out 3 files that are not read as images (.jxl 3)"]


def test_a_hidden_folder_on_the_way_to_the_source(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / ".cache" / "photos" / name).mkdir(parents=True)
        (tmp_path / ".cache" / "photos" / name / "1.png").touch()
    assert set(found(load(tmp_path / ".cache" / "photos"))["train"]) == {"ant/1.png", "bee/1.png"}


def test_a_class_folder_without_images(touch):
    folder = touch("ant/1.png", "bee/notes.txt")
    with pytest.raises(DataError, match="the class folder holds no images") as caught:
        load(folder)
    assert str(folder / "bee") in str(caught.value)


def test_an_empty_class_folder_of_one_split(touch, log):
    folder = touch("train/ant/1.png", "train/bee/1.png", "test/ant/1.png", "test/bee/.keep")
    assert load(folder, SplitSpec(validation=None)).counts("test") == {"ant": 1, "bee": 0}
    assert log() == [f"{folder / 'test' / 'bee'}: the class folder holds no images"]
    touch("train/cat/.keep")
    with pytest.raises(DataError, match="the class folder holds no images") as caught:
        load(folder, SplitSpec(validation=None))
    assert str(folder / "train" / "cat") in str(caught.value)


def test_split_folders_without_images_are_left_out_with_a_word(touch, log):
    folder = touch("train/ant/1.png", "train/bee/1.png", "val/ant/notes.txt", "val/bee/notes.txt")
    (folder / "test").mkdir()
    assert list(load(folder).splits) == ["train"]
    assert log() == [f"{folder / name}: left out the split, which holds no images" for name in ("test", "val")]


def test_a_folder_that_begins_with_two_underscores_is_said(touch, log):
    folder = touch("ant/1.png", "bee/1.png", "__background/1.png", "__MACOSX/1.png")
    assert load(folder).labels == ("ant", "bee")
    (line,) = log()
    assert line.endswith("(__background)")


@pytest.mark.parametrize(("inner", "count"), [(("cat", "dog"), 1), (("2019", "2020"), 0), (("cat", "only"), 0)])
def test_classes_that_hold_the_same_folders(inner, count, touch, log):
    files = [f"{site}/{name}/1.png" for site in ("north", "south") for name in inner]
    folder = touch(*files, f"south/{inner[1]}/2.png")
    if "only" in inner:
        (folder / "north/only").rename(folder / "north/other")
    assert load(folder).labels == ("north", "south")
    assert len(log()) == count
    load(folder, label_column="class_folder")
    load(folder, group_column="parent_folder")
    assert len(log()) == count


def test_a_table_beside_images_and_a_folder_of_something_else(touch):
    folder = touch("1.png", "2.png", "notes/readme.txt")
    (folder / "t.csv").write_text("id,label\n1,a\n2,b\n")
    assert load(folder).labels == ("a", "b")


@pytest.mark.parametrize(
    "files", [("recipe.yaml", "environment.json", "predictions.parquet"), ("config.json", "preprocessor_config.json")]
)
def test_output_of_hfft_as_a_source(files, touch):
    with pytest.raises(DataError, match="holds a run or a model, and no images"):
        load(touch(*files))


def test_a_class_folder_with_the_word_of_a_split_and_a_table_of_its_own(touch):
    folder = touch(*[f"{name}/{n}.png" for name in ("test_tube", "cat") for n in range(2)])
    (folder / "test_tube/metadata.csv").write_text("file_name,label\n0.png,x\n1.png,y\n")
    assert load(folder).labels == ("cat", "test_tube")


def test_lists_of_splits_beside_class_folders_are_said(touch, log):
    folder = touch(*[f"images/{name}/{n}.png" for name in ("ant", "bee") for n in range(2)])
    touch("meta/train.txt", "meta/test.txt", "meta/classes.txt")
    assert load(folder).labels == ("ant", "bee")
    (line,) = log()
    assert "not read: meta/test.txt, meta/train.txt; write a table" in line
    (folder / "split.csv").write_text("path,split\nant/0,train\nant/1,test\nbee/0,train\nbee/1,test\n")
    assert load(folder, SplitSpec(validation=None)).counts("test") == {"ant": 1, "bee": 1}


def test_folders_that_hold_one_folder(touch):
    folder = touch("flowers/flowers/rose/1.png", "flowers/flowers/tulip/1.png")
    with pytest.raises(DataError, match=r"\(rose, tulip\), say data.source=.*flowers/flowers$"):
        load(folder)


def test_a_folder_that_is_called_almost_so(touch, monkeypatch):
    monkeypatch.chdir(touch("photos/ant/1.png", "t.csv"))
    with pytest.raises(DataError, match=r"'phots'; did you mean 'photos'\?"):
        load("phots")
    with pytest.raises(DataError, match=r"data.image_folder: .*t.csv is no folder"):
        load("t.csv", image_folder="t.csv")


def test_a_saved_data_set_below_the_folder(tmp_path):
    DatasetDict(train=table([0, 1], ANIMALS)).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"a saved data set lies in .*saved; name that folder"):
        load(tmp_path)


def test_a_folder_without_class_folders(touch):
    folder = touch("1.png", "2.png")
    with pytest.raises(DataError, match="found no class folders; allowed: ") as caught:
        load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("source", ["/no/such/folder", "./images", "../images", "~/no-such-images", "a/b/c"])
def test_a_missing_folder(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        load(source)
    message = str(caught.value)
    assert message.startswith(f"data.source: the folder {os.path.expanduser(source)} does not exist; looked for ")
    assert str(Path(source).expanduser().absolute()) in message


def test_a_missing_folder_that_is_called_almost_so(touch):
    folder = touch("photos/ant/1.png")
    with pytest.raises(DataError, match=f"{folder} holds no 'photo'"):
        load(folder / "photo" / "ant")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("https://example.org/photos.zip", "a folder or file on this machine"),
        ("hf://datasets/owner/name/data", "the Hub id alone, owner/name"),
        ("labels.csv", "looked for "),
    ],
)
def test_what_is_no_source(source, told):
    with pytest.raises(DataError, match=told):
        load(source)


@pytest.mark.parametrize(
    ("file", "told"),
    [("a.zip", "unpack it"), ("a.tar.gz", "unpack it"), ("a.json", "Label Studio"), ("a.xlsx", "csv")],
)
def test_files_that_hold_images_in_another_way(file, told, touch):
    for source in (touch(file), touch(file) / file):
        with pytest.raises(DataError, match=told):
            load(source)


def test_a_file_is_no_source(touch):
    file = touch("1.png") / "1.png"
    with pytest.raises(DataError, match=r"is a .png file; allowed: a folder, a table \(.csv, .tsv"):
        load(file)


def test_a_hub_name_without_network():
    with pytest.raises(DataError, match=r"data.source: nobody/no-such-images can't"):
        load("nobody/no-such-images")


def test_a_single_class(touch):
    with pytest.raises(DataError, match="the class ant"):
        load(touch("ant/1.png", "ant/2.png"))


def test_a_single_folder_of_class_folders(touch):
    folder = touch("PetImages/cat/1.png", "PetImages/dog/1.png")
    with pytest.raises(DataError, match=f"data.source={folder}/PetImages"):
        load(folder)


def test_a_class_without_training_images(touch):
    folder = touch("train/ant/1.png", "train/bee/1.png", "test/cat/1.png")
    with pytest.raises(DataError, match="the class cat"):
        load(folder, SplitSpec(validation=None))


def test_a_split_that_is_not_there(touch):
    folder = touch("train/ant/1.png", "train/bee/1.png")
    with pytest.raises(DataError, match="no split 'holdout'"):
        load(folder, SplitSpec(validation=None, test="holdout"))


# Carved splits

SIZES = {"ant": 40, "bee": 20, "cat": 7, "dog": 2, "elk": 1}


@pytest.fixture
def uneven(touch):
    return touch(*[f"{label}/{number:02d}.png" for label, count in SIZES.items() for number in range(count)])


def carved(folder, seed=0, **splits):
    return {split: list(files) for split, files in found(load(folder, SplitSpec(**splits), seed)).items()}


def test_carved_splits_are_disjoint_and_complete(uneven):
    parts = carved(uneven, validation=0.25, test=0.1)
    together = Counter(file for files in parts.values() for file in files)
    assert together == Counter(f"{label}/{n:02d}.png" for label, count in SIZES.items() for n in range(count))
    assert set(parts) == {"train", "validation", "test"}


def test_which_splits_were_carved_is_told(uneven, touch):
    assert load(uneven, SplitSpec(validation=None)).carved == ("test",)
    names = [
        f"photos/{split}/{label}/{n}.png" for split in ("train", "test") for label in ("ant", "bee") for n in "12"
    ]
    folder = touch(*names) / "photos"
    assert load(folder, SplitSpec(validation=0.5)).carved == ("validation",)
    assert load(folder, SplitSpec(validation=None)).carved == ()
    assert load(folder, SplitSpec()).carved == ("validation",)


def test_carved_splits_are_stratified_and_a_rare_class_keeps_an_image(uneven):
    data = load(uneven, SplitSpec(validation=0.25, test=0.1))
    assert data.counts("validation") == {"ant": 10, "bee": 5, "cat": 2, "dog": 1, "elk": 0}
    assert data.counts("test") == {"ant": 4, "bee": 2, "cat": 1, "dog": 0, "elk": 0}
    assert data.counts("train") == {"ant": 26, "bee": 13, "cat": 4, "dog": 1, "elk": 1}


def test_a_greedy_fraction_never_takes_the_last_image(uneven):
    counts = load(uneven, SplitSpec(validation=0.97, test=None)).counts("train")
    assert counts == {"ant": 1, "bee": 1, "cat": 1, "dog": 1, "elk": 1}


def test_carved_splits_follow_the_seed_alone(uneven):
    first, again, other = (carved(uneven, seed=seed, validation=0.25, test=0.1) for seed in (3, 3, 4))
    assert first == again
    assert first["validation"] != other["validation"]
    assert [len(files) for files in first.values()] == [len(files) for files in other.values()]


def test_validation_stays_the_same_whatever_test_is(uneven):
    alone = carved(uneven, validation=0.25, test=None)["validation"]
    assert carved(uneven, validation=0.25, test=0.1)["validation"] == alone
    assert carved(uneven, validation=0.25, test=0.3)["validation"] == alone


def test_a_carved_split_is_no_run_of_neighbours(uneven):
    files = [file for file in carved(uneven, validation=0.25, test=None)["validation"] if file.startswith("ant")]
    assert files == sorted(files)
    assert files not in ([f"ant/{n:02d}.png" for n in range(10)], [f"ant/{n:02d}.png" for n in range(30, 40)])


def test_what_the_source_has_is_not_carved(touch):
    files = [f"{split}/{label}/{n}.png" for split in ("train", "test") for label in ("ant", "bee") for n in range(10)]
    data = load(touch(*files), SplitSpec())  # auto: 15 % of 10 images are 1.5, so 2 of each class
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 16, "validation": 4, "test": 20}
    assert all(file.startswith("train/") for file in found(data)["validation"])


def test_fraction_and_named_split_together(touch):
    files = [f"{split}/{label}/{n}.png" for split in ("train", "val") for label in ("ant", "bee") for n in range(10)]
    data = load(touch(*files), SplitSpec(validation=0.1, test="validation"))
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 18, "validation": 2, "test": 20}
    assert all(file.startswith("val/") for file in found(data)["test"])


def test_a_carved_split_that_would_be_empty(touch):
    with pytest.raises(DataError, match="the split 'validation' holds no images"):
        load(touch("ant/1.png", "bee/1.png"), SplitSpec(validation=0.5, test=None))


# Tables: Parquet folders and data sets in memory


def picture(number):
    pixels = np.random.default_rng(number).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return PillowImage.fromarray(pixels)


def table(labels, feature, image="image", label="label"):
    columns = {image: [picture(number) for number in range(len(labels))], label: labels}
    return Dataset.from_dict(columns, features=Features({image: Image(), label: feature}))


ANIMALS = ClassLabel(names=["dog", "ant", "cat"])  # not in alphabetical order


@pytest.fixture
def parquet(tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    table([0, 1, 2, 0], ANIMALS).to_parquet(folder / "train.parquet")
    table([2, 1], ANIMALS).to_parquet(folder / "test.parquet")
    return folder


def test_a_folder_of_parquet_files(parquet):
    data = load(parquet, SplitSpec(validation=None))
    assert data.labels == ("dog", "ant", "cat")
    assert data.shards == 2
    assert data.splits["train"]["label"][:] == [0, 1, 2, 0]
    assert data.splits["test"]["label"][:] == [2, 1]
    assert data.splits["train"]["file"][:] == ["train/0", "train/1", "train/2", "train/3"]
    image = PillowImage.open(io.BytesIO(data.splits["train"][2]["image"]["bytes"]))
    assert np.array_equal(np.asarray(image), np.asarray(picture(2)))


def test_a_folder_of_parquet_files_with_text_labels(tmp_path):
    table(["10", "9", "b", "a"], Value("string"), "photo", "category").to_parquet(tmp_path / "train.parquet")
    data = load(tmp_path)
    assert data.labels == ("9", "10", "a", "b")  # numbers by value, then words
    assert data.splits["train"]["label"][:] == [1, 0, 3, 2]
    assert set(data.splits["train"].column_names) == {"image", "label", "file"}


@pytest.mark.parametrize("stray", ["meta.parquet", "ant/meta.parquet", ".cache/train.parquet"])
def test_class_folders_with_a_parquet_file_among_them(stray, touch):
    folder = touch("ant/1.png", "bee/1.png", stray)
    assert found(load(folder)) == {"train": {"ant/1.png": "ant", "bee/1.png": "bee"}}


def test_hidden_parquet_files_are_left_out(parquet):
    (parquet / ".cache").mkdir()
    for hidden in (".train.parquet", ".cache/train.parquet"):
        (parquet / hidden).write_bytes(b"no parquet")
    assert len(load(parquet, SplitSpec(validation=None)).splits["train"]) == 4


def test_a_folder_whose_only_parquet_files_are_hidden(touch):
    folder = touch(".cache/train.parquet", "notes.txt")
    with pytest.raises(DataError, match="found no class folders"):
        load(folder)


def test_parquet_files_in_the_minority(parquet):
    for name in ("train_a.csv", "train_b.csv", "validation_notes.txt", "c.json"):
        (parquet / name).write_text("words")
    data = load(parquet, SplitSpec(validation=None))
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 4, "test": 2}


@pytest.mark.parametrize("source", ["photos [1] *", ".cache/train"])
def test_the_name_of_the_folder_does_not_matter(source, tmp_path):
    (tmp_path / source).mkdir(parents=True)
    table([0, 1, 2, 0], ANIMALS).to_parquet(tmp_path / source / "train.parquet")
    table([1, 2], ANIMALS).to_parquet(tmp_path / source / "test.parquet")
    data = load(tmp_path / source, SplitSpec(validation=None))
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 4, "test": 2}


def test_a_split_of_the_hub_with_a_name_of_its_own(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "hold_out"):
        table([0, 1, 2], ANIMALS).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    data = load(tmp_path, SplitSpec(validation=None, test="hold_out"))
    assert {split: len(part) for split, part in data.splits.items()} == {"train": 3, "test": 3}


CARD = """---
configs:
- config_name: small
  data_files: [{split: train, path: small.parquet}]
- config_name: large
  data_files: [{split: train, path: large.parquet}]
---
"""


def test_a_folder_of_parquet_files_with_a_card(tmp_path):
    table([0, 1, 2], ANIMALS).to_parquet(tmp_path / "small.parquet")
    table([0, 1, 2] * 2, ANIMALS).to_parquet(tmp_path / "large.parquet")
    (tmp_path / "README.md").write_text(CARD)
    assert len(load(tmp_path, config="large").splits["train"]) == 6
    with pytest.raises(DataError, match="Config name is missing"):
        load(tmp_path)
    (tmp_path / "README.md").write_text(CARD.replace("]", ""))
    with pytest.raises(DataError, match="can't be loaded as a data set"):
        load(tmp_path)
    (tmp_path / "README.md").write_text("# Animals\n")
    assert len(load(tmp_path).splits["train"]) == 9


def test_a_damaged_parquet_file(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="can't be loaded as a data set") as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_parquet_file_with_damaged_rows(tmp_path):
    table([0, 1, 2] * 99, ANIMALS).to_parquet(tmp_path / "train.parquet")
    content = bytearray((tmp_path / "train.parquet").read_bytes())
    content[4:600] = bytes(596)  # after the magic number, and far before the footer
    (tmp_path / "train.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"can't be loaded as a data set: .*deserialize"):
        load(tmp_path)


def in_memory(source, splits=NO_CARVING, **fields):
    return load_data(DataSpec(source="unused", splits=splits, **fields), 0, source)


def test_a_data_set_in_memory():
    data = in_memory(DatasetDict(train=table([0, 1, 2], ANIMALS), val=table([1], ANIMALS)), SplitSpec(test=None))
    assert data.labels == ("dog", "ant", "cat")
    assert {split: rows["label"][:] for split, rows in data.splits.items()} == {"train": [0, 1, 2], "validation": [1]}


FORMATS = {
    "transform": lambda rows: rows.with_transform(lambda batch: {"pixel_values": batch["image"]}),
    "torch": lambda rows: rows.with_format("torch"),
    "numpy": lambda rows: rows.with_format("numpy", columns=["label"]),
    "another column": lambda rows: rows.with_format("numpy", columns=["image"]),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("labels", [[0, 1, 2], ["dog", "ant", "cat"]], ids=["numbers", "texts"])
def test_a_data_set_in_memory_with_a_format_of_its_own(name, labels):
    rows = table(labels, ANIMALS if labels[0] == 0 else Value("string"))
    source = DatasetDict(train=FORMATS[name](rows))
    before = source["train"].format
    data, plain_data = in_memory(source), in_memory(DatasetDict(train=rows))
    assert data.labels == plain_data.labels
    assert data.splits["train"][:] == plain_data.splits["train"][:]
    assert source["train"].format == before


def test_numbers_as_labels():
    data = in_memory(DatasetDict(train=table([10, 2, 1, 10], Value("int64"))))
    assert data.labels == ("1", "2", "10")
    assert data.splits["train"]["label"][:] == [2, 1, 0, 2]


def test_an_exact_split_name_goes_before_another_name_of_it():
    rows = {"train": [0, 1, 2], "eval": [0], "test": [1, 2]}
    data = in_memory(
        DatasetDict({name: table(labels, ANIMALS) for name, labels in rows.items()}), SplitSpec(validation=None)
    )
    assert data.splits["test"]["label"][:] == [1, 2]


def test_splits_that_number_their_classes_differently():
    other = ClassLabel(names=["ant", "cat", "dog"])
    data = in_memory(
        DatasetDict(train=table([0, 1, 2], ANIMALS), test=table([0, 1, 2], other)), SplitSpec(validation=None)
    )
    assert data.labels == ("dog", "ant", "cat")
    assert [data.labels[label] for label in data.splits["test"]["label"]] == ["ant", "cat", "dog"]


def test_columns_that_are_named():
    rows = table([0, 1, 2], ANIMALS).add_column("size", [1, 0, 1], feature=ClassLabel(names=["small", "large"]))
    with pytest.raises(DataError, match=r"label_column: several fit \(label, size\)"):
        in_memory(DatasetDict(train=rows))
    data = in_memory(DatasetDict(train=rows), label_column="size")
    assert (data.labels, data.splits["train"]["label"][:]) == (("small", "large"), [1, 0, 1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_column": "lable"}, "data: label_column: found 'lable'; allowed: image, label"),
        ({"image_column": "img"}, "data: image_column: found 'img'; allowed: image, label"),
        ({"image_column": "label"}, "data: label_column: none fits; name one of image, label"),
        ({"image_column": "label", "label_column": "label"}, "data: image_column: the column 'label' holds"),
    ],
)
def test_columns_that_do_not_fit(fields, message):
    with pytest.raises(DataError) as caught:
        in_memory(DatasetDict(train=table([0, 1], ANIMALS)), **fields)
    assert str(caught.value).startswith(message)


def test_no_column_that_fits():
    with pytest.raises(DataError, match="label_column: none fits"):
        in_memory(DatasetDict(train=table(["s", "l"], Value("string"), label="size")))
    with pytest.raises(DataError, match="image_column: none fits"):
        in_memory(DatasetDict(train=Dataset.from_dict({"label": [0, 1]})))


@pytest.mark.parametrize(
    ("labels", "feature"),
    [(["a", None, "b", None], Value("string")), ([0, None, 1, None], ANIMALS), ([0, -1, 1, -1], ANIMALS)],
)
def test_rows_without_a_label(labels, feature):
    with pytest.raises(DataError, match="split 'train': no label in 2 of 4 rows, the first is row 1"):
        in_memory(DatasetDict(train=table(labels, feature)))


def test_an_unlabelled_split_matters_only_when_it_is_used():
    source = DatasetDict(train=table([0, 1, 2] * 3, ANIMALS), test=table([-1, -1], ANIMALS))
    data = in_memory(source, SplitSpec(validation=None, test=0.3))
    assert {split: len(rows) for split, rows in data.splits.items()} == {"train": 6, "test": 3}
    with pytest.raises(DataError, match="split 'test': no label in 2 of 2 rows, the first is row 0"):
        in_memory(source, SplitSpec(validation=None))


def test_classes_that_no_image_of_the_splits_has_are_left_out(log):
    source = DatasetDict(train=table([1, 2, 1, 2], ANIMALS), test=table([-1, -1], Value("int64")))
    data = in_memory(source)
    assert (data.labels, data.splits["train"]["label"][:]) == (("ant", "cat"), [0, 1, 0, 1])
    assert log() == [
        "data: not used: test (2 rows)",
        "data: left out classes that no image of the splits has: dog, -1",
    ]


def test_a_class_of_another_split_alone_is_left_out_where_that_split_is_not_used(touch):
    folder = touch("train/ant/1.png", "train/bee/1.png", "test/images/1.png", "val/ant/1.png", "val/cat/1.png")
    assert load(folder).labels == ("ant", "bee")
    with pytest.raises(DataError, match="the class cat"):
        load(folder, SplitSpec(test=None))


def test_several_labels_where_one_is_asked_for():
    several = DatasetDict(train=table([[0], [0, 1]], List(Value("int64"))))
    with pytest.raises(DataError, match=r"row 1 \(train/1\) holds \[0, 1\]; allowed for data.task single_label: one"):
        in_memory(several, label_column="label", task="single_label")


def test_splits_with_other_columns():
    source = DatasetDict(train=table([0, 1, 2], ANIMALS), test=table([0], ANIMALS, label="species"))
    with pytest.raises(DataError, match="columns: image, species"):
        in_memory(source)


def test_nothing_in_memory():
    with pytest.raises(DataError, match="data: holds no splits"):
        in_memory(DatasetDict())


# Rows for a model that exists


def test_load_rows_numbers_labels_as_the_model_does(touch):
    folder = touch("ant/1.png", "bee/1.png", "cat/1.png")
    rows = load_rows(DataSpec(source=str(folder)), ("cat", "zebra", "bee", "ant"))
    assert dict(zip(rows["file"], rows["label"], strict=True)) == {"ant/1.png": 3, "bee/1.png": 2, "cat/1.png": 0}
    assert rows.features["label"].names == ["cat", "zebra", "bee", "ant"]


def test_load_rows_takes_all_splits_or_one(touch):
    folder = touch("train/ant/1.png", "train/bee/1.png", "val/ant/2.png", "val/bee/2.png")
    spec = DataSpec(source=str(folder))
    assert len(load_rows(spec, ("ant", "bee"))) == 4
    assert load_rows(spec, ("ant", "bee"), "validation")["file"][:] == ["val/ant/2.png", "val/bee/2.png"]
    with pytest.raises(DataError, match="found: train, val"):
        load_rows(spec, ("ant", "bee"), "test")


def test_load_rows_of_all_splits_says_so(touch, log):
    folder = touch("train/ant/1.png", "train/ant/2.png", "test/ant/3.png")
    spec = DataSpec(source=str(folder))
    load_rows(spec, ("ant", "bee"), "train")
    assert log() == []
    load_rows(spec, ("ant", "bee"))
    assert log() == [f"{folder}: takes all splits together: test 1, train 2; name one to have it alone"]


def test_load_rows_asks_for_the_classes_of_the_split_alone(touch):
    folder = touch("train/ant/1.png", "train/yak/1.png", "test/ant/2.png", "test/bee/2.png")
    spec = DataSpec(source=str(folder))
    assert load_rows(spec, ("bee", "ant"), "test")["label"][:] == [1, 0]
    with pytest.raises(DataError, match="yak; it knows bee, ant"):
        load_rows(spec, ("bee", "ant"))


def test_load_rows_of_a_test_folder_alone(touch):
    folder = touch("test/ant/1.png", "test/bee/1.png")
    rows = load_rows(DataSpec(source=str(folder)), ("bee", "ant"))
    assert dict(zip(rows["file"], rows["label"], strict=True)) == {"test/ant/1.png": 1, "test/bee/1.png": 0}


def test_load_rows_of_parquet_keeps_the_pixels(parquet):
    rows = load_rows(DataSpec(source=str(parquet)), ("ant", "cat", "dog"), "train")
    assert rows["label"][:] == [2, 0, 1, 2]
    image = PillowImage.open(io.BytesIO(rows[1]["image"]["bytes"]))
    assert np.array_equal(np.asarray(image), np.asarray(picture(1)))


def test_load_rows_refuses_classes_that_the_model_does_not_know(touch):
    folder = touch("ant/1.png", "bee/1.png", "yak/1.png")
    with pytest.raises(DataError) as caught:
        load_rows(DataSpec(source=str(folder)), ("ant", "cat"))
    assert str(caught.value) == f"{folder}: the model does not know the classes bee, yak; it knows ant, cat"


def test_load_rows_refuses_rows_without_a_label(tmp_path):
    table([0, -1, 1, 2], ANIMALS).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match="split 'train': no label in 1 of 4 rows, the first is row 1"):
        load_rows(DataSpec(source=str(tmp_path)), ("ant", "cat", "dog"))


# A run's own images


def test_a_folder_that_has_moved_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    source = {"kind": "local", "name": "photos", "revision": None}
    run = finished.make_run(
        tmp_path / "run", origin={"checkpoint": source, "data": source}, data={"source": "somebody/photos"}
    )
    monkeypatch.setattr(table_files, "hub_problem", lambda *_: pytest.fail("the Hub is asked"))
    with pytest.raises(
        DataError, match=r"data.source of .*run: the folder somebody/photos does not exist; looked for"
    ):
        images_of_run(run)


def test_images_that_the_run_left_out_are_left_out(tmp_path, photos):
    run = finished.make_run(tmp_path / "run", data={"source": str(photos()), "splits": {"test": 0.2}})
    whole = images_of_run(run)
    gone = whole.splits["train"]["file"][0]
    (run / "data.json").write_text(f'{{"skipped": [{{"file": "{gone}"}}]}}')
    files = [file for rows in images_of_run(run).splits.values() for file in rows["file"][:]]
    assert gone not in files
    assert len(files) == sum(map(len, whole.splits.values())) - 1
