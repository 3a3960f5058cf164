import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, List, Value

from hfft.data.sources.labels import labels_of
from hfft.data.sources.splits import split_rows
from hfft.data.sources.stratifying import carve_sets
from hfft.recipe.spec import SplitSpec
from hfft.recipe.values import Fold

SHARES = np.array([0.5, 0.3, 0.1, 0.04, 0.02])  # of the labels, from frequent to rare


def draw(count, seed=0):
    return (np.random.default_rng(seed).random((count, len(SHARES))) < SHARES).astype(np.uint8)


def rows_of(labels, groups=None):
    names = [f"c{k}" for k in range(labels.shape[1])]
    content = {"label": [np.flatnonzero(row).tolist() for row in labels], "file": [str(k) for k in range(len(labels))]}
    features = {"label": List(ClassLabel(names=names)), "file": Value("string")}
    if groups is not None:
        content["group"], features["group"] = groups, Value("string")
    return Dataset.from_dict(content, features=Features(features))


def split(labels, groups=None, seed=0, **spec):
    return split_rows({"train": rows_of(labels, groups)}, SplitSpec(**spec), seed=seed, where="x")


@pytest.mark.parametrize("seed", range(5))
def test_every_label_has_its_share_in_every_split(seed):
    labels = draw(1000, seed)
    parts = split(labels, seed=seed, validation=0.2, test=0.1)
    assert sum(map(len, parts.values())) == len({file for part in parts.values() for file in part["file"]}) == 1000
    for name, share in {"validation": 0.2, "test": 0.1}.items():
        assert abs(len(parts[name]) - 1000 * share) <= 5
        off = labels_of(parts[name]).sum(axis=0) - share * labels.sum(axis=0)
        assert np.abs(off).max() <= 2  # images; a random split is off by about 6 of the most frequent label
    nothing = {name: int((labels_of(part).sum(axis=1) == 0).sum()) for name, part in parts.items()}
    assert abs(nothing["validation"] - 0.2 * (labels.sum(axis=1) == 0).sum()) <= 15  # they fill what is left


def test_a_rare_label_is_in_training_and_in_validation():
    labels = np.zeros((100, 3), np.uint8)
    labels[:60, 0] = 1
    labels[[3, 70], 1] = 1
    labels[80, 2] = 1
    parts = split(labels, validation=0.1, test=None)
    assert labels_of(parts["validation"]).sum(axis=0)[1] == labels_of(parts["train"]).sum(axis=0)[1] == 1
    assert labels_of(parts["train"]).sum(axis=0)[2] == 1  # the only one there is


@pytest.mark.parametrize("seed", range(20))
def test_training_has_every_label_that_there_is(seed):
    labels = draw(60, seed)
    labels[-1] = 1
    assert labels_of(split(labels, seed=seed, validation=0.3, test=0.3)["train"]).any(axis=0).all()


def test_validation_depends_on_nothing_but_rows_and_seed():
    labels = draw(200)
    first, again, other = (
        split(labels, seed=seed, validation=0.2, test=t) for seed, t in ((0, 0.1), (0, None), (1, None))
    )
    assert first["validation"]["file"][:] == again["validation"]["file"][:] != other["validation"]["file"][:]


def test_folds_share_the_labels_evenly():
    labels = draw(500)
    tests = [split(labels, validation=None, test=Fold(fold=k, of=5))["test"] for k in range(5)]
    assert sorted(int(file) for part in tests for file in part["file"]) == list(range(500))
    counts = np.stack([labels_of(part).sum(axis=0) for part in tests])
    assert (counts.max(axis=0) - counts.min(axis=0)).max() <= 2
    assert max(map(len, tests)) - min(map(len, tests)) <= 4


def test_groups_stay_together():
    labels, groups = draw(400), [f"g{k // 4}" for k in range(400)]
    parts = split(labels, groups, validation=0.2, test=0.2)
    seen = {name: {int(file) // 4 for file in part["file"]} for name, part in parts.items()}
    assert not seen["train"] & seen["validation"]
    assert not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]
    for name in ("validation", "test"):
        assert abs(len(parts[name]) - 80) <= 8
        assert np.abs(labels_of(parts[name]).sum(axis=0) - 0.2 * labels.sum(axis=0)).max() <= 6


def test_images_of_none_of_the_labels_are_shared_out_too():
    labels = np.zeros((40, 2), np.uint8)
    labels[:20, 0] = labels[15:25, 1] = 1
    parts = carve_sets(labels, {"validation": 0.25}, 0)
    assert (labels[parts["validation"]].sum(axis=1) == 0).sum() in (3, 4, 5)  # of 15
