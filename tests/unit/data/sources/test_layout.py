import pytest

from hfft.data.sources.layout import divide, find_layout, folders_of, split_names, tells_no_class


def shown(folder, **options):
    """Split -> names of its class folders, what is left out, and whether the names can't be labels."""
    layout = find_layout(folder, **options)
    splits = {split: sorted({path.name for path in layout.class_folders(split)}) for split in layout.splits}
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
