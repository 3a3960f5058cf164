import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from hfft.evaluators import baselines
from hfft.evaluators.baselines import class_frequencies, nearest_neighbours

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, 150)
KNOWN = (RNG.normal(size=(150, 8)) + 2 * np.eye(8)[LABELS]).astype(np.float32)
ASKED = RNG.normal(size=(40, 8)).astype(np.float32)


def votes():
    """Shares of the votes, as scikit-learn counts them by cosine distance."""

    def weigh(distances):
        return np.exp((1 - distances) / 0.07)

    judge = KNeighborsClassifier(20, metric="cosine", weights=weigh).fit(KNOWN, LABELS)
    return judge.predict_proba(ASKED)


def test_neighbours_vote_as_in_scikit_learn():
    found = nearest_neighbours(KNOWN, LABELS, ASKED, classes=3)
    np.testing.assert_allclose(found, (20 * votes() + class_frequencies(LABELS, 3)) / 21, atol=1e-5)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-6)


def test_the_memory_at_hand_changes_nothing(monkeypatch):
    expected = nearest_neighbours(KNOWN, LABELS, ASKED, classes=3)
    monkeypatch.setattr(baselines, "_NUMBERS_AT_ONCE", 450)  # three images at once
    np.testing.assert_allclose(nearest_neighbours(KNOWN, LABELS, ASKED, classes=3), expected, atol=1e-6)


def test_fewer_images_than_neighbours_all_vote():
    found = nearest_neighbours(KNOWN[:3], np.array([0, 1, 1]), KNOWN[:1], classes=4)
    assert found.argmax() == 0
    assert found[0, 2] == found[0, 3] == 0  # classes that no training image has


def test_frequencies_are_those_of_the_training_images():
    assert class_frequencies(np.array([1, 1, 0, 2]), 4).tolist() == [0.25, 0.5, 0.25, 0.0]
    assert class_frequencies(np.array([[1, 0], [1, 1]]), 2).tolist() == [1.0, 0.5]


@pytest.mark.parametrize("labels", [[0, 0, 1], [2]])
def test_frequencies_sum_to_1(labels):
    assert class_frequencies(np.array(labels), 3).sum() == pytest.approx(1)
