import importlib.util
import random
from pathlib import Path

import pytest
from datasets.data_files import DataFilesDict, get_data_patterns

from hfft.data.sources.folders import (
    SPLIT_NAMES,
    divide,
    files_by_split,
    files_ending,
    find_layout,
    folders_of,
    image_files,
    split_in,
    split_names,
    subfolders,
    tells_no_class,
)


def names(folder, files):
    return [file.relative_to(folder).as_posix() for file in files]


def test_image_files_are_sorted_and_of_any_depth(touch):
    folder = touch("b/2.png", "b/1.JPG", "a/deep/er/3.tiff", "4.webp", "notes.txt", "a/5", ".6.png", "a/.trash/7.png")
    assert names(folder, image_files(folder)) == ["4.webp", "a/deep/er/3.tiff", "b/1.JPG", "b/2.png"]


def test_photos_of_phones_are_images_where_the_plugin_is_installed(touch):
    folder = touch("ant/1.heic", "bee/1.png")
    heic = ["ant/1.heic"] if importlib.util.find_spec("pillow_heif") else []
    assert names(folder, image_files(folder)) == [*heic, "bee/1.png"]


def test_a_folder_with_the_name_of_an_image_is_none(touch):
    folder = touch("ant.png/1.jpg")
    assert names(folder, image_files(folder)) == ["ant.png/1.jpg"]


def test_a_link_to_nowhere_is_listed_so_that_the_audit_names_it(touch):
    folder = touch("ant/1.png")
    (folder / "ant" / "2.png").symlink_to(folder / "nowhere.png")
    assert names(folder, image_files(folder)) == ["ant/1.png", "ant/2.png"]


def test_the_files_of_a_link_to_a_folder(touch, tmp_path):
    (tmp_path / "link").symlink_to(touch("1.png"))
    assert names(tmp_path / "link", image_files(tmp_path / "link")) == ["1.png"]


def test_subfolders_are_sorted_and_neither_hidden_nor_special(touch):
    folder = touch("b/1.png", "a/1.png", ".git/1.png", "__MACOSX/1.png", "c.png")
    assert names(folder, subfolders(folder)) == ["a", "b"]


# Links and runs


def test_linked_folders_below_are_followed_and_circles_are_not(touch, tmp_path):
    folder = touch("ant/1.png")
    (tmp_path / "more").mkdir()
    (tmp_path / "more/2.png").touch()
    (folder / "ant/linked").symlink_to(tmp_path / "more")
    (folder / "ant/circle").symlink_to(folder)
    assert names(folder, image_files(folder)) == ["ant/1.png", "ant/linked/2.png"]


def test_a_link_from_a_class_folder_to_a_folder_above_it(touch):
    folder = touch("ant/1.png", "bee/2.png")
    (folder / "ant/circle").symlink_to(folder)
    assert names(folder, image_files(folder / "ant")) == ["ant/1.png"]


def test_what_hfft_wrote_is_neither_a_class_nor_an_image(touch):
    run = [f"runs/{run}/{name}" for run in ("x", "y/fold-0") for name in ("recipe.yaml", "environment.json", "a.png")]
    folder = touch("ant/1.png", "bee/1.png", *run)
    assert names(folder, subfolders(folder)) == ["ant", "bee"]
    assert names(folder, image_files(folder)) == ["ant/1.png", "bee/1.png"]
    assert names(folder, image_files(folder / "runs/x")) == ["runs/x/a.png"]  # for who asks for it


# Splits and classes


def shown(folder, **options):
    """Split -> names of its class folders, what is left out, and whether the names can't be labels."""
    layout = find_layout(folder, **options)
    splits = {
        split: sorted({path.name for root in roots for path in subfolders(root)})
        for split, roots in layout.splits.items()
    }
    return splits, [path.relative_to(folder).as_posix() for path in layout.left_out], layout.problem is not None


def of(*splits):
    return [f"{split}/{label}/{split.replace('/', '')}1.png" for split in splits for label in ("ant", "bee")]


BOTH = ["ant", "bee"]
UNDERSTOOD = {
    "plain": (["ant/1.png", "bee/1.png"], {"train": BOTH}, []),
    "capitals": (of("Train", "Test", "Val"), {"Train": BOTH, "Test": BOTH, "Val": BOTH}, []),
    "sets": (of("training_set", "test_set"), {"train": BOTH, "test": BOTH}, []),
    "joined words": (of("trainset", "testImages"), {"train": BOTH, "test": BOTH}, []),
    "numbers": (of("01_train", "02_val", "03_test"), {"train": BOTH, "validation": BOTH, "test": BOTH}, []),
    "a common word": (of("seg_train", "seg_test"), {"train": BOTH, "test": BOTH}, []),
    "one split": (of("dataset-train"), {"train": BOTH}, []),
    "twice": (of("seg_train/seg_train", "seg_test/seg_test"), {"train": BOTH, "test": BOTH}, []),
    "predictions": (
        [*of("seg_train", "seg_test"), "seg_pred/seg_pred/1.png"],
        {"train": BOTH, "test": BOTH},
        ["seg_pred"],
    ),
    "a flat test folder": ([*of("train"), "test/1.png"], {"train": BOTH}, ["test"]),
    "flat folders with a folder": (
        [*of("train"), "val/images/1.png", "test/images/1.png"],
        {"train": BOTH},
        ["test", "val"],
    ),
    "parts": (of("part1", "part2"), {"train": BOTH}, []),
    "parts of a split": (of("train/part1", "train/part2", "test"), {"train": BOTH, "test": BOTH}, []),
    "one folder of all": (of("archive/train", "archive/val"), {"train": BOTH, "val": BOTH}, []),
    "beside empty folders": ([*of("images"), "annotations/a.xml"], {"train": BOTH}, []),
    "words of splits in classes": (
        ["training_shoes/1.png", "test_tube/1.png", "cat/1.png"],
        {"train": ["cat", "test_tube", "training_shoes"]},
        [],
    ),
    "these alone": (["test_pos/1.png", "test_neg/1.png"], {"train": ["test_neg", "test_pos"]}, []),
    "a class train": (["train/1.png", "car/1.png", "ship/1.png"], {"train": ["car", "ship", "train"]}, []),
    "numbers as classes": (["0/1.png", "1/1.png"], {"train": ["0", "1"]}, []),
    "letters as classes": (["A/1.png", "B/1.png"], {"train": ["A", "B"]}, []),
    "an image and none": (["image/1.png", "no image/1.png"], {"train": ["image", "no image"]}, []),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_layouts_that_are_understood(name, touch):
    files, splits, left_out = UNDERSTOOD[name]
    assert shown(touch(*files)) == (splits, left_out, False)


REFUSED = {
    "flat splits": ["train/1.png", "test/1.png"],
    "flat sets": ["training_set/1.png", "test_set/1.png"],
    "one flat split": ["train/1.png"],
    "flat splits in a folder": ["images/train/1.png", "images/val/1.png"],
    "a folder images in splits": ["train/images/1.png", "valid/images/1.png"],
    "parts": ["part1/1.png", "part2/1.png"],
    "parts with a common word": ["HAM10000_images_part_1/1.png", "HAM10000_images_part_2/2.png"],
    "shards": ["shard-00000/1.png", "shard-00001/1.png"],
    "images and masks": ["images/1.png", "masks/1.png"],
    "archives": ["a.tar/1.png", "b.tar/1.png"],
    "a class and split each": [f"{label}_{split}/1.png" for label in ("cat", "dog") for split in ("train", "test")],
    "splits in classes": [f"{label}/{split}/1.png" for label in ("cat", "dog") for split in ("train", "test")],
    "splits and something else": [*of("train", "test"), "holdout/ant/1.png"],
    "no folders": ["1.png", "2.png"],
    "nothing": ["notes.txt"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_layouts_that_are_refused(name, touch):
    assert shown(touch(*REFUSED[name]))[2]


@pytest.mark.parametrize("name", ["flat splits", "parts", "images and masks", "splits in classes"])
def test_folders_are_classes_where_that_is_asked_for(name, touch):
    folder = touch(*REFUSED[name])
    names = sorted({file.split("/")[0] for file in REFUSED[name]})
    assert shown(folder, by_folder=True) == ({"train": names}, [], False)


def test_two_folders_of_a_split_keep_their_names():
    assert split_names(["train_1", "train_2", "test"]) == {"train_1": "train_1", "train_2": "train_2", "test": "test"}
    assert split_names(["my_train", "my_test", "cat"]) == {"my_train": "train", "my_test": "test"}
    assert split_names(["training_shoes", "test_tube"]) == {}


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["images"], True),
        (["data", "Images_2"], True),
        (["PetImages"], False),
        (["batch_a", "batch_b"], True),
        (["spare_part", "whole"], False),
        (["class1", "class2"], False),
        (["real", "fake"], False),
    ],
)
def test_names_that_tell_no_class(names, told):
    assert tells_no_class(names) == told


def test_paths_through_folders_of_splits():
    paths = ["./train/ant/1.png", "train\\bee\\2.png", "test_set/ant/3.png"]
    splits, below = divide(list(map(folders_of, paths)))
    assert (splits, below) == (["train", "train", "test"], [["ant"], ["bee"], ["ant"]])
    for other in (["train/1.png", "2.png"], ["train/1.png", "ant/2.png"], ["1.png"], []):
        assert divide(list(map(folders_of, other))) is None


# Parquet files


def test_parquet_files_of_a_folder_without_images(touch):
    folder = touch(
        "b.parquet", "deep/a.PARQUET", "notes.txt", "c.csv", ".d.parquet", ".cache/e.parquet", ".cache/1.png"
    )
    assert names(folder, files_ending(folder, (".parquet",))) == ["b.parquet", "deep/a.PARQUET"]


BY_NAME = {
    "without names": {"train": ["a.parquet", "deep/b.parquet"]},
    "files": {"train": ["train.parquet"], "validation": ["x-val.parquet"], "test": ["test 2.parquet"]},
    "numbered": {"train": ["train0.parquet", "train_1.parquet"], "validation": ["dev_0.parquet"]},
    "folders": {"train": ["train/a.parquet"], "test": ["my-test/deep/b.parquet"]},
    "folders first": {"train": ["train/test_0.parquet"], "test": ["test/train_0.parquet"]},
    "parts of words": {"train": ["trains.parquet", "contest.parquet"]},
    "shards": {
        "train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        "hold_out": ["data/hold_out-00000-of-00001.parquet"],
    },
    "every name": {split: [f"{word}.parquet" for word in words] for split, words in SPLIT_NAMES.items()},
}


def splits(folder):
    found = files_by_split(folder, files_ending(folder, (".parquet",)))
    return {split: names(folder, files) for split, files in found.items()}


def by_datasets(folder):
    found = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
    return {split: sorted(set(names(folder, map(Path, files)))) for split, files in found.items()}


@pytest.mark.parametrize("name", BY_NAME)
def test_splits_of_parquet_files_are_those_of_datasets(name, touch, log):
    files = [file for group in BY_NAME[name].values() for file in group]
    random.Random(0).shuffle(files)
    folder = touch(*files)
    expected = {split: sorted(files) for split, files in BY_NAME[name].items()}
    assert splits(folder) == by_datasets(folder) == expected
    assert log() == []


def test_names_of_splits_in_capitals(touch):
    folder = touch("Train/a.parquet", "TEST/b.parquet")
    assert splits(folder) == {"train": ["Train/a.parquet"], "test": ["TEST/b.parquet"]}
    assert by_datasets(folder) == {"train": ["TEST/b.parquet", "Train/a.parquet"]}


def test_other_files_have_no_say_in_splits(touch):
    folder = touch("a.parquet", "test_notes.txt", "train/log.csv")
    assert splits(folder) == {"train": ["a.parquet"]}
    assert by_datasets(folder) == {"train": ["train/log.csv"]}


def test_parquet_files_whose_names_tell_no_split_where_others_do(touch, log):
    folder = touch("train.parquet", "test.parquet", "index.parquet", "more/a.parquet")
    assert splits(folder) == {"train": ["train.parquet"], "test": ["test.parquet"]}
    left_out = "left out 2 of 4 files, whose names tell no split: index.parquet, more/a.parquet"
    assert log() == [f"{folder}: {left_out}"]


def test_a_name_above_the_folder_tells_nothing(touch):
    folder = touch("test/a.parquet", "test/b.parquet") / "test"
    assert splits(folder) == {"train": ["a.parquet", "b.parquet"]}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(("training_set", "train"), ("01_train", "train"), ("TrainImages", "train"), ("testset", "test")),
        *(("seg_pred", None), ("trains", None), ("contest", None), ("VAL-2", "validation"), ("dev.old", "validation")),
    ],
)
def test_the_split_in_a_name(name, split):
    assert split_in(name) == split
