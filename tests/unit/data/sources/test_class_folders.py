import importlib.util

import pytest

from hfft.data.sources.reading import read_source
from hfft.recipe.spec import DataSpec


@pytest.mark.parametrize(
    ("others", "left_out"),
    [
        (["ant/2.JXL"], "1 file that is not read as an image (.jxl 1)"),
        (
            ["ant/2.jxl", "bee/deep/3.jxl", "bee/4.svg", "5.dng"],
            "4 files that are not read as images (.dng 1, .jxl 2, .svg 1)",
        ),
        (["2.png"], "1 image outside the class folders"),
        (["2.png", "3.JPG"], "2 images outside the class folders"),
        (
            ["ant/2.nef", "bee/2.cr2", "2.png"],
            "2 files that are not read as images (.cr2 1, .nef 1) and 1 image outside the class folders",
        ),
    ],
)
def test_images_that_are_left_out_are_counted(others, left_out, touch, log):
    folder = touch("ant/1.png", "bee/1.png", *others)
    read_source(DataSpec(source=str(folder)))
    assert log() == [f"{folder}: left out {left_out}"]


def test_what_is_left_out_beside_split_folders_and_inside_of_them(touch, log):
    files = [f"{split}/{label}/1.png" for split in ("train", "test") for label in ("ant", "bee")]
    folder = touch(*files, "1.png", "train/2.png", "test/3.png", "test/ant/4.jxl")
    read_source(DataSpec(source=str(folder)))
    left_out = "1 file that is not read as an image (.jxl 1) and 3 images outside the class folders"
    assert log() == [f"{folder}: left out {left_out}"]


def test_what_is_no_image_and_what_is_hidden_is_left_out_without_a_word(touch, log):
    others = ["notes.txt", "README.md", "labels.csv", "meta.json", "Thumbs.db", ".DS_Store", "LICENSE"]
    hidden = [".1.png", ".2.jxl", ".trash/1.jxl", "__MACOSX/ant/1.jxl", "ant/.cache/1.jxl", "ant/.1.jxl"]
    folder = touch("ant/1.png", "bee/1.psd", *others, *[f"ant/{name}" for name in [*others, "a.parquet"]], *hidden)
    read_source(DataSpec(source=str(folder)))
    assert log() == []


def test_photos_of_phones_are_left_out_except_where_the_plugin_is_installed(touch, log):
    folder = touch("ant/1.heic", "bee/1.png", "bee/2.png")
    read_source(DataSpec(source=str(folder)))
    heic = [f"{folder}: left out 1 file that is not read as an image (.heic 1)"]
    assert log() == ([] if importlib.util.find_spec("pillow_heif") else heic)
