import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from hfft.metrics.intervals import wilson
from hfft.metrics.probabilities import sigmoid
from hfft.metrics.scores import LabelScores, Scores, class_scores, logits_of, measured
from hfft.metrics.thresholds import choose_thresholds, describe_confidence

NAMES = ("ant", "bee", "cat")


def rows(truth):
    features = Features({"label": Sequence(ClassLabel(names=list(NAMES))), "file": Value("string")})
    content = [{"label": np.flatnonzero(row).tolist(), "file": f"{number}.png"} for number, row in enumerate(truth)]
    return Dataset.from_list(content, features=features)


def sure(images=120, seed=0):
    """Logits of up to 30 in size, some of them wrong, and the truth."""
    rng = np.random.default_rng(seed)
    truth = (rng.random((images, 3)) < 0.4).astype(np.uint8)
    signs = np.where(rng.random(truth.shape) < 0.9, 2.0 * truth - 1, 1 - 2.0 * truth)
    return (signs * rng.uniform(15, 30, truth.shape)).astype(np.float32), truth


def test_sure_labels_are_scored_by_their_logits():
    logits, truth = sure()
    found = measured(logits, rows(truth), NAMES)
    assert isinstance(found, LabelScores)
    expected = np.logaddexp(0, np.where(truth, -logits, logits)).mean()
    assert found.metrics["log_loss"]["value"] == pytest.approx(expected, rel=1e-6)
    told = describe_confidence({"validation": found})
    grid = np.geomspace(1, 20, 2000)
    losses = [np.logaddexp(0, np.where(truth, -logits, logits) / one).mean() for one in grid]
    assert told["temperature"] == pytest.approx(grid[np.argmin(losses)], rel=0.01)
    assert told["before"]["log_loss"] == pytest.approx(expected, rel=1e-6)
    assert told["after"]["log_loss"] == pytest.approx(min(losses), rel=1e-3)


def test_a_threshold_may_lie_between_sure_answers():
    logits, truth = np.array([[24.0], [26.0], [28.0], [30.0]]), np.array([[0], [0], [1], [1]])
    limits = choose_thresholds(sigmoid(logits), truth)
    assert 0 < limits[0] < 1
    found = sigmoid(logits) >= limits
    assert found[:, 0].tolist() == [False, False, True, True]


def test_a_table_keeps_logits_and_older_ones_are_read(tmp_path):
    logits, truth = sure()
    table = measured(logits, rows(truth), NAMES).table("test")
    table.to_parquet(tmp_path / "predictions.parquet", index=False)
    again = pd.read_parquet(tmp_path / "predictions.parquet")
    assert np.array_equal(logits_of(again, NAMES), logits)
    assert again["probability bee"].to_numpy() == pytest.approx(sigmoid(logits)[:, 1], abs=1e-6)
    older = again[[name for name in again.columns if not name.startswith("logit ")]]
    assert (np.sign(logits_of(older, NAMES)) == np.sign(logits)).all()
    assert logits_of(older, NAMES).max() == pytest.approx(17.3, abs=0.1)  # float32 tells no more of a sure label


CLASSES = ("ant", "bee", "cat", "dog")


def answers(images=200, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, images)  # no dog, though some are taken for one
    return np.where(rng.random(images) < 0.7, labels, rng.integers(0, 4, images)), labels


def test_scores_agree_with_scikit_learn():
    predicted, labels = answers()
    expected = precision_recall_fscore_support(labels, predicted, labels=range(4), zero_division=0)
    table = class_scores(predicted, labels, CLASSES)
    for number, name in enumerate(CLASSES):
        found = [table[name][key] for key in ("precision", "recall", "f1", "images")]
        assert found == pytest.approx([column[number] for column in expected])
    assert table["dog"]["predicted"] == np.sum(predicted == 3) > 0


@pytest.mark.parametrize(("hits", "trials"), [(0, 5), (5, 5), (1, 1), (37, 50), (999, 1000)])
def test_intervals_of_shares_are_those_of_scipy(hits, trials):
    expected = binomtest(hits, trials).proportion_ci(method="wilson")
    assert wilson(np.array(hits), np.array(trials)) == pytest.approx((expected.low, expected.high), abs=1e-12)


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
    found = Scores(CLASSES, (), labels, np.eye(4)[predicted], {}, {}).confusion
    matrix = confusion_matrix(labels, predicted, labels=range(4))
    assert [[found[row].get(column, 0) for column in CLASSES] for row in CLASSES] == matrix.tolist()
    assert found["dog"] == {}
    assert all(count > 0 for row in found.values() for count in row.values())
