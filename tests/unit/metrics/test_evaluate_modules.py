"""The metrics as modules of evaluate, and what the Trainer gets from them."""

import math
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest
import sklearn.metrics as sk
import torch

from hfft.errors import TrainingError
from hfft.metrics.evaluate_modules import ProbabilityMetric, validating
from hfft.metrics.multilabel import LABEL_METRICS

PROBABILITIES = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.3, 0.7], [0.2, 0.8]])
LABELS = torch.tensor([0, 0, 0, 1])
EXPECTED = {
    "accuracy": 3 / 4,
    "balanced_accuracy": (2 / 3 + 1) / 2,
    "macro_f1": (4 / 5 + 2 / 3) / 2,
    "log_loss": -math.log(0.9 * 0.6 * 0.3 * 0.8) / 4,
}


def through(logits, labels, batch=3, **options):
    """Batch by batch, as the Trainer does it."""
    reduce, compute = validating(logits.shape[1], **options)
    kept = torch.cat([reduce(logits[n : n + batch], labels[n : n + batch]) for n in range(0, len(logits), batch)])
    return kept, compute(SimpleNamespace(predictions=kept.numpy(), label_ids=labels.numpy()))


def test_metrics_from_two_numbers_per_image():
    kept, found = through(PROBABILITIES.log(), LABELS)
    assert kept.shape == (4, 2)
    assert found == pytest.approx(EXPECTED, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_many_classes(dtype):
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.randint(0, 1000, (50,), generator=torch.Generator().manual_seed(1))
    labels[:20] = logits.argmax(1)[:20]
    kept, found = through(logits, labels)
    assert kept.shape == (50, 2)
    truth, answers = labels.numpy(), logits.argmax(1).numpy()
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(truth, answers))
    every = np.arange(1000)
    assert found["macro_f1"] == pytest.approx(
        sk.f1_score(truth, answers, labels=every, average="macro", zero_division=0)
    )
    shares = logits.double().softmax(1).numpy()
    assert found["log_loss"] == pytest.approx(sk.log_loss(truth, shares, labels=every), rel=1e-5)


def test_models_that_return_more_than_logits():
    reduce, _ = validating(2)
    logits = PROBABILITIES.log()
    assert reduce((logits, torch.zeros(4, 7)), LABELS).equal(reduce(logits, LABELS))


@pytest.mark.parametrize("spoilt", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("is_multi_label", [False, True])
def test_logits_that_are_no_numbers_are_an_error(spoilt, is_multi_label):
    logits = PROBABILITIES.log()
    logits[2, 0] = spoilt
    labels = torch.eye(2)[LABELS] if is_multi_label else LABELS
    with pytest.raises(TrainingError, match="lower the learning rate"):
        through(logits, labels, is_multi_label=is_multi_label)


def test_of_images_with_any_number_of_labels():
    logits = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    labels = (torch.rand(20, 3, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    _, found = through(logits, labels, is_multi_label=True)
    assert list(found) == list(LABEL_METRICS)
    expected = sk.average_precision_score(labels.numpy(), logits.numpy())
    assert found["mean_average_precision"] == pytest.approx(expected)


def test_they_are_modules_of_evaluate_that_combine_and_stream():
    combined = evaluate.combine([ProbabilityMetric(name) for name in EXPECTED])
    for part in (slice(0, 3), slice(3, 4)):
        combined.add_batch(predictions=PROBABILITIES.numpy()[part], references=LABELS.numpy()[part])
    assert combined.compute() == pytest.approx(EXPECTED, abs=1e-6)
