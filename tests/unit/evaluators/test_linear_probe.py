import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from hfft.evaluators.linear_probe import probe_logits

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, 240)
FEATURES = (RNG.normal(size=(240, 12)) + 1.5 * np.eye(12)[LABELS]).astype(np.float32)
KNOWN, ASKED = FEATURES[:180], FEATURES[180:]


def probe(labels, classes):
    return probe_logits(torch.from_numpy(KNOWN), labels, torch.from_numpy(ASKED), classes=classes, seed=0)


def test_it_answers_as_well_as_scikit_learn():
    scaler = StandardScaler().fit(KNOWN)
    judge = LogisticRegression(C=1 / (180 * 1e-2)).fit(scaler.transform(KNOWN), LABELS[:180])
    found = probe(LABELS[:180], 3)
    assert found.shape == (60, 3)
    assert np.mean(found.argmax(1) == judge.predict(scaler.transform(ASKED))) > 0.95


def test_labels_by_themselves():
    flags = np.stack([LABELS == 0, LABELS > 0], axis=1).astype(np.uint8)
    found = probe(flags[:180], 2)
    right = (found > 0) == flags[180:]
    assert right.mean() > 0.75
    np.testing.assert_allclose(found[:, 0], -found[:, 1], atol=1e-2)


@pytest.mark.parametrize("count", [2, 4])
def test_a_few_images_are_enough(count):
    features = torch.from_numpy(FEATURES[:count])
    found = probe_logits(features, np.arange(count) % 2, torch.from_numpy(ASKED), classes=2, seed=0)
    assert np.isfinite(found).all()
