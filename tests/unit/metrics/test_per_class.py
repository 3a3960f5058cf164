import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from hfft.metrics.per_class import class_scores, confusion, wilson

NAMES = ("ant", "bee", "cat", "dog")


def answers(images=200, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, images)  # no dog, though some are taken for one
    return np.where(rng.random(images) < 0.7, labels, rng.integers(0, 4, images)), labels


def test_scores_agree_with_scikit_learn():
    predicted, labels = answers()
    expected = precision_recall_fscore_support(labels, predicted, labels=range(4), zero_division=0)
    table = class_scores(predicted, labels, NAMES)
    for number, name in enumerate(NAMES):
        found = [table[name][key] for key in ("precision", "recall", "f1", "images")]
        assert found == pytest.approx([column[number] for column in expected])
    assert table["dog"]["predicted"] == np.sum(predicted == 3) > 0


@pytest.mark.parametrize(("hits", "trials"), [(0, 5), (5, 5), (1, 1), (37, 50), (999, 1000)])
def test_intervals_of_shares_are_those_of_scipy(hits, trials):
    expected = binomtest(hits, trials).proportion_ci(method="wilson")
    assert wilson(hits, trials) == pytest.approx((hits / trials, expected.low, expected.high), abs=1e-12)


def test_what_was_never_tried_may_be_anything():
    table = class_scores(np.array([0, 0]), np.array([0, 0]), ("ant", "bee"))
    bee = table["bee"]
    assert [(bee[f"{key}_low"], bee[f"{key}_high"]) for key in ("precision", "recall", "f1")] == [(0.0, 1.0)] * 3
    assert 0 < table["ant"]["recall_low"] < 0.5 < table["ant"]["recall_high"] == 1.0


@pytest.mark.parametrize(("images", "recall"), [(8, 0.8), (60, 0.5), (60, 0.95)])
def test_95_of_100_intervals_of_f1_contain_the_truth(images, recall):
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1], images)
    truth = recall  # both classes alike: as many false positives as false negatives
    hits = 0
    for _ in range(500):
        predicted = np.where(rng.random(len(labels)) < recall, labels, 1 - labels)
        found = class_scores(predicted, labels, ("a", "b"))["a"]
        hits += found["f1_low"] <= truth <= found["f1_high"]
    assert hits / 500 >= 0.92


def test_the_confusion_counts_every_image_once():
    predicted, labels = answers()
    found = confusion(predicted, labels, NAMES)
    matrix = confusion_matrix(labels, predicted, labels=range(4))
    assert [[found[row].get(column, 0) for column in NAMES] for row in NAMES] == matrix.tolist()
    assert found["dog"] == {}
    assert all(count > 0 for row in found.values() for count in row.values())
