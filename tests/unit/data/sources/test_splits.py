from collections import Counter

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from hfft.data.sources.labels import label_array
from hfft.data.sources.reading import load_data
from hfft.data.sources.splits import plan_splits, split_rows
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec, SplitSpec
from hfft.recipe.values import Fold

SIZES = {"ant": 40, "bee": 20, "cat": 7, "dog": 2, "elk": 1}


@pytest.fixture
def uneven(touch):
    return touch(*[f"{label}/{number:02d}.png" for label, count in SIZES.items() for number in range(count)])


@pytest.fixture
def patients(touch):
    """30 patients with 1 to 9 scans each, of one or two classes."""
    rng = np.random.default_rng(0)
    files = []
    for patient in range(30):
        for scan in range(int(rng.integers(1, 10))):
            label = ("ill", "well")[patient % 2 if scan else 0]
            files.append(f"{label}/p{patient:02d}/{scan}.png")
    return touch(*files)


def load(folder, splits, seed=0, **fields):
    return load_data(DataSpec(source=str(folder), splits=splits, **fields), seed)


def files(data):
    return {split: list(rows["file"]) for split, rows in data.splits.items()}


def people(data):
    return {split: {file.split("/")[1] for file in names} for split, names in files(data).items()}


# Folds


@pytest.fixture
def several(touch):
    sizes = {label: count for label, count in SIZES.items() if count > 1}
    return touch(*[f"{label}/{number:02d}.png" for label, count in sizes.items() for number in range(count)])


def test_folds_hold_each_image_once(several):
    folds = [load(several, SplitSpec(validation=None, test=Fold(fold=k, of=4))) for k in range(4)]
    for data in folds:
        others = {file for other in folds if other is not data for file in files(other)["test"]}
        assert set(files(data)["train"]) == others
    tests = Counter(file for data in folds for file in files(data)["test"])
    assert sum(tests.values()) == len(tests) == 69


def test_a_class_of_one_image_has_no_folds(touch):
    folder = touch("ant/1.png", "ant/2.png", "bee/1.png", "cat/1.png")
    with pytest.raises(DataError, match="the class bee"):
        load(folder, SplitSpec(validation=None, test=Fold(fold=0, of=2)))


def test_folds_are_stratified_and_of_one_size(touch):
    folder = touch(*[f"{label}/{n}.png" for label, count in (("a", 41), ("b", 22), ("c", 9)) for n in range(count)])
    counts = [load(folder, SplitSpec(validation=None, test=Fold(fold=k, of=4))).counts("test") for k in range(4)]
    assert sorted(count["a"] for count in counts) == [10, 10, 10, 11]
    assert sorted(count["b"] for count in counts) == [5, 5, 6, 6]
    assert [sum(count.values()) for count in counts] == [18, 18, 18, 18]


def test_validation_beside_a_fold(several):
    data = load(several, SplitSpec(validation=0.25, test=Fold(fold=1, of=4)))
    names = files(data)
    assert not set(names["validation"]) & set(names["test"])
    assert sum(map(len, names.values())) == 69
    other = files(load(several, SplitSpec(validation=0.25, test=Fold(fold=1, of=4)), seed=1))
    assert other["test"] != names["test"]


# Groups


@pytest.mark.parametrize("seed", range(5))
def test_no_split_divides_a_group(patients, seed):
    data = load(patients, SplitSpec(validation=0.2, test=0.2), seed, group_column="parent_folder")
    found = people(data)
    assert not found["train"] & found["validation"]
    assert not found["train"] & found["test"]
    assert not found["validation"] & found["test"]
    sizes = {split: len(names) for split, names in files(data).items()}
    total = sum(sizes.values())
    assert sizes["validation"] / total == pytest.approx(0.2, abs=0.03)
    assert sizes["test"] / total == pytest.approx(0.2, abs=0.03)
    assert "group" not in data.splits["train"].column_names


def test_without_groups_they_are_divided(patients):
    found = people(load(patients, SplitSpec(validation=0.2, test=None)))
    assert found["train"] & found["validation"]


def test_folds_of_groups(patients):
    seen: list[str] = []
    for k in range(5):
        data = load(patients, SplitSpec(validation=None, test=Fold(fold=k, of=5)), group_column="parent_folder")
        found = people(data)
        assert not found["train"] & found["test"]
        seen += sorted(found["test"])
    assert sorted(seen) == [f"p{n:02d}" for n in range(30)]


def test_too_few_groups(touch):
    folder = touch(*[f"{label}/p/{n}.png" for label in ("a", "b") for n in range(10)])
    with pytest.raises(DataError, match=r"data.group_column: 1 groups"):
        load(folder, SplitSpec(validation=0.2, test=None), group_column="parent_folder")


def test_groups_that_are_the_class_folders(uneven):
    with pytest.raises(DataError, match="parent_folder needs folders"):
        load(uneven, SplitSpec(), group_column="parent_folder")
    with pytest.raises(DataError, match="class folders: parent_folder"):
        load(uneven, SplitSpec(), group_column="patient")


def test_splits_of_the_source_that_divide_a_group(touch):
    folder = touch("train/a/p1/1.png", "train/b/p2/1.png", "test/a/p1/2.png", "test/b/p3/1.png")
    with pytest.raises(DataError, match="1 groups have images in train and in test, the first is 'p1'"):
        load(folder, SplitSpec(validation=None), group_column="parent_folder")


# Few images per class


def test_fewer_training_images_leave_the_other_splits(uneven):
    splits = SplitSpec(validation=0.25, test=0.1)
    whole, few, fewer = (load(uneven, splits, max_per_class=most) for most in (None, 8, 3))
    assert few.counts("train") == {"ant": 8, "bee": 8, "cat": 4, "dog": 1, "elk": 1}
    assert fewer.counts("train") == {"ant": 3, "bee": 3, "cat": 3, "dog": 1, "elk": 1}
    for split in ("validation", "test"):
        assert files(few)[split] == files(fewer)[split] == files(whole)[split]
    assert set(files(fewer)["train"]) < set(files(few)["train"]) < set(files(whole)["train"])


# Multi-label


FREQUENCIES = np.array([0.5, 0.3, 0.1, 0.04, 0.02])  # of the labels, from frequent to rare


def draw(count, seed=0):
    return (np.random.default_rng(seed).random((count, len(FREQUENCIES))) < FREQUENCIES).astype(np.uint8)


def multi_label_rows(labels, groups=None):
    names = [f"c{k}" for k in range(labels.shape[1])]
    content = {"label": [np.flatnonzero(row).tolist() for row in labels], "file": [str(k) for k in range(len(labels))]}
    features = {"label": List(ClassLabel(names=names)), "file": Value("string")}
    if groups is not None:
        content["group"], features["group"] = groups, Value("string")
    return Dataset.from_dict(content, features=Features(features))


def split_multi_label(labels, groups=None, seed=0, **spec):
    plan = plan_splits(["train"], SplitSpec(**spec), "x")
    return split_rows({"train": multi_label_rows(labels, groups)}, plan, seed=seed, where="x")


@pytest.mark.parametrize("seed", range(5))
def test_every_label_has_its_share_in_every_split(seed):
    labels = draw(1000, seed)
    parts = split_multi_label(labels, seed=seed, validation=0.2, test=0.1)
    assert sum(map(len, parts.values())) == len({file for part in parts.values() for file in part["file"]}) == 1000
    for name, share in {"validation": 0.2, "test": 0.1}.items():
        assert abs(len(parts[name]) - 1000 * share) <= 5
        off = label_array(parts[name]).sum(axis=0) - share * labels.sum(axis=0)
        assert np.abs(off).max() <= 2  # images; a random split is off by about 6 of the most frequent label
    nothing = {name: int((label_array(part).sum(axis=1) == 0).sum()) for name, part in parts.items()}
    assert abs(nothing["validation"] - 0.2 * (labels.sum(axis=1) == 0).sum()) <= 15  # they fill what is left


def test_a_rare_label_is_in_training_and_in_validation():
    labels = np.zeros((100, 3), np.uint8)
    labels[:60, 0] = 1
    labels[[3, 70], 1] = 1
    labels[80, 2] = 1
    parts = split_multi_label(labels, validation=0.1, test=None)
    assert label_array(parts["validation"]).sum(axis=0)[1] == label_array(parts["train"]).sum(axis=0)[1] == 1
    assert label_array(parts["train"]).sum(axis=0)[2] == 1  # the only one there is


@pytest.mark.parametrize("seed", range(20))
def test_training_has_every_label_that_there_is(seed):
    labels = draw(60, seed)
    labels[-1] = 1
    assert label_array(split_multi_label(labels, seed=seed, validation=0.3, test=0.3)["train"]).any(axis=0).all()


def test_validation_depends_on_nothing_but_rows_and_seed():
    labels = draw(200)
    first, again, other = (
        split_multi_label(labels, seed=seed, validation=0.2, test=t) for seed, t in ((0, 0.1), (0, None), (1, None))
    )
    assert first["validation"]["file"][:] == again["validation"]["file"][:] != other["validation"]["file"][:]


def test_folds_share_the_labels_evenly():
    labels = draw(500)
    tests = [split_multi_label(labels, validation=None, test=Fold(fold=k, of=5))["test"] for k in range(5)]
    assert sorted(int(file) for part in tests for file in part["file"]) == list(range(500))
    counts = np.stack([label_array(part).sum(axis=0) for part in tests])
    assert (counts.max(axis=0) - counts.min(axis=0)).max() <= 2
    assert max(map(len, tests)) - min(map(len, tests)) <= 4


def test_groups_stay_together():
    labels, groups = draw(400), [f"g{k // 4}" for k in range(400)]
    parts = split_multi_label(labels, groups, validation=0.2, test=0.2)
    seen = {name: {int(file) // 4 for file in part["file"]} for name, part in parts.items()}
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]
    for name in ("validation", "test"):
        assert abs(len(parts[name]) - 80) <= 8
        assert np.abs(label_array(parts[name]).sum(axis=0) - 0.2 * labels.sum(axis=0)).max() <= 6


def test_images_of_none_of_the_labels_are_shared_out_too():
    labels = np.zeros((40, 2), np.uint8)
    labels[:20, 0] = labels[15:25, 1] = 1
    parts = split_multi_label(labels, validation=0.25, test=None)
    assert (label_array(parts["validation"]).sum(axis=1) == 0).sum() in (3, 4, 5)  # of 15
