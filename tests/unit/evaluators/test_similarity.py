import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from hfft.evaluators.similarity import agreement, cosine_drift, kl_divergence, knn_accuracy, linear_cka


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_cka_is_1_up_to_rotation_scale_and_shift(rng):
    features = rng.normal(size=(50, 8))
    turned, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    assert linear_cka(features, features) == pytest.approx(1)
    assert linear_cka(features, 3 * features @ turned + 5) == pytest.approx(1)


def test_cka_of_unrelated_features_is_near_0_even_with_many_dimensions(rng):
    """The biased estimate of these is about 0.95."""
    assert abs(linear_cka(rng.normal(size=(100, 2000)), rng.normal(size=(100, 2000)))) < 0.1


def test_cka_lies_in_between_when_half_of_the_features_stay(rng):
    shared, one, other = (rng.normal(size=(400, 20)) for _ in range(3))
    mixed = linear_cka(np.hstack([shared, one]), np.hstack([shared, other]))
    assert mixed == pytest.approx(0.5, abs=0.05)  # of the squared covariance, half is shared


def test_cka_says_nothing_of_constant_features_or_three_images(rng):
    assert linear_cka(np.ones((9, 4)), rng.normal(size=(9, 4))) is None
    assert linear_cka(*rng.normal(size=(2, 3, 4))) is None


def test_cosine_drift():
    before = np.array([[1.0, 0], [0, 2]])
    assert cosine_drift(before, before) == 0
    assert cosine_drift(before, np.array([[0, 5.0], [0, 1]])) == pytest.approx(0.5)  # a right angle, and none
    assert cosine_drift(before, -before) == pytest.approx(2)
    assert cosine_drift(np.zeros((2, 2)), before) == pytest.approx(1)


def test_knn_accuracy_is_scikit_learns_with_each_image_left_out(rng):
    labels = rng.integers(0, 2, 81)
    features = rng.normal(size=(81, 5)) + labels[:, None]
    right = []
    for left_out in range(81):
        kept = np.arange(81) != left_out
        knn = KNeighborsClassifier(9, metric="cosine").fit(features[kept], labels[kept])  # the square root of 81
        right.append(knn.predict(features[[left_out]])[0] == labels[left_out])
    assert knn_accuracy(features, labels) == pytest.approx(np.mean(right))


def test_knn_accuracy_of_clusters_and_of_lonely_images():
    features = np.array([[1, 0], [1, 0.1], [0.9, 0], [0, 1], [0.1, 1], [0, 0.9]])
    assert knn_accuracy(features, np.array([0, 0, 0, 7, 7, 7])) == 1
    assert knn_accuracy(features[2:], np.array([5, 7, 7, 7])) == 1  # the lonely one doesn't count
    assert knn_accuracy(features, np.arange(6)) is None


def test_agreement_and_divergence_of_answers(rng):
    before, after = rng.normal(size=(2, 30, 4))
    assert agreement(before, before + 1) == 1
    assert agreement(np.eye(4), np.eye(4)[[0, 1, 3, 2]]) == 0.5
    expected = torch.nn.functional.kl_div(
        torch.tensor(after).log_softmax(1), torch.tensor(before).softmax(1), reduction="batchmean"
    )
    assert kl_divergence(before, after) == pytest.approx(float(expected))
    assert kl_divergence(before, before + 1) == pytest.approx(0, abs=1e-12)
