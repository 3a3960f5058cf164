import importlib.util
import random
from pathlib import Path

import pytest
from datasets.data_files import DataFilesDict, get_data_patterns

from hfft.data.sources.folders import (
    SPLIT_NAMES,
    image_files,
    split_in,
    splits_of,
    subfolders,
    table_files,
    warn_of_left_out,
)
from hfft.data.sources.layout import find_layout


def names(folder, files):
    return [file.relative_to(folder).as_posix() for file in files]


# Images


def test_image_files_are_sorted_and_of_any_depth(touch):
    folder = touch("b/2.png", "b/1.JPG", "a/deep/er/3.tiff", "4.webp", "notes.txt", "a/5", ".6.png", "a/.trash/7.png")
    assert names(folder, image_files(folder)) == ["4.webp", "a/deep/er/3.tiff", "b/1.JPG", "b/2.png"]


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


# What is left out


@pytest.mark.parametrize(
    ("others", "left_out"),
    [
        (["ant/2.JXL"], "1 file that is not read as an image (.jxl 1)"),
        (
            ["ant/2.jxl", "bee/deep/3.jxl", "bee/4.svg", "5.dng"],
            "4 files that are not read as images (.dng 1, .jxl 2, .svg 1)",
        ),
        (["2.png"], "1 image beside the class folders"),
        (["2.png", "3.JPG"], "2 images beside the class folders"),
        (
            ["ant/2.nef", "bee/2.cr2", "2.png"],
            "2 files that are not read as images (.cr2 1, .nef 1) and 1 image beside the class folders",
        ),
    ],
)
def test_images_that_are_left_out_are_counted(others, left_out, touch, log):
    folder = touch("ant/1.png", "bee/1.png", *others)
    warn_of_left_out(folder, [folder])
    assert log() == [f"{folder}: left out {left_out}"]


def test_what_is_left_out_beside_split_folders_and_inside_of_them(touch, log):
    files = [f"{split}/{label}/1.png" for split in ("train", "test") for label in ("ant", "bee")]
    folder = touch(*files, "1.png", "train/2.png", "test/3.png", "test/ant/4.jxl")
    warn_of_left_out(folder, [root for roots in find_layout(folder).splits.values() for root in roots])
    left_out = "1 file that is not read as an image (.jxl 1) and 3 images beside the class folders"
    assert log() == [f"{folder}: left out {left_out}"]


def test_what_is_no_image_and_what_is_hidden_is_left_out_without_a_word(touch, log):
    others = ["notes.txt", "README.md", "labels.csv", "meta.json", "Thumbs.db", ".DS_Store", "LICENSE", "a.parquet"]
    hidden = [".1.png", ".2.jxl", ".trash/1.jxl", "__MACOSX/ant/1.jxl", "ant/.cache/1.jxl", "ant/.1.jxl"]
    folder = touch("ant/1.png", "bee/1.psd", *others, *[f"ant/{name}" for name in others], *hidden)
    warn_of_left_out(folder, [folder])
    assert log() == []


def test_photos_of_phones_are_images_where_the_plugin_is_installed(touch, log):
    folder = touch("ant/1.heic", "bee/1.png")
    warn_of_left_out(folder, [folder])
    if importlib.util.find_spec("pillow_heif"):
        assert names(folder, image_files(folder)) == ["ant/1.heic", "bee/1.png"]
        assert log() == []
    else:
        assert names(folder, image_files(folder)) == ["bee/1.png"]
        assert log() == [f"{folder}: left out 1 file that is not read as an image (.heic 1)"]


# Parquet files


def test_parquet_files_of_a_folder_without_images(touch):
    folder = touch(
        "b.parquet", "deep/a.PARQUET", "notes.txt", "c.csv", ".d.parquet", ".cache/e.parquet", ".cache/1.png"
    )
    assert names(folder, table_files(folder, (".parquet",))) == ["b.parquet", "deep/a.PARQUET"]


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
    found = splits_of(folder, table_files(folder, (".parquet",)))
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


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(("training_set", "train"), ("01_train", "train"), ("TrainImages", "train"), ("testset", "test")),
        *(("seg_pred", None), ("trains", None), ("contest", None), ("VAL-2", "validation"), ("dev.old", "validation")),
    ],
)
def test_the_split_in_a_name(name, split):
    assert split_in(name) == split
