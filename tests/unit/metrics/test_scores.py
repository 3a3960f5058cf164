import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value

from hfft.metrics.multilabel import sigmoid
from hfft.metrics.scores import SetScores, logits_of, measured
from hfft.metrics.selective import describe_confidence
from hfft.metrics.thresholds import choose_thresholds

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
    assert isinstance(found, SetScores)
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
