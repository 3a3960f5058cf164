"""The one solver of linear heads: exact, deterministic, and true to the loss that it is given."""

from functools import partial

import numpy as np
import pytest
import torch
from accelerate import PartialState
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

from hfft.training import logistic
from hfft.training.logistic import head_path, held_out_logits
from hfft.training.losses import ImageLoss, LabelSetLoss, prior_shifts

PartialState()  # which loggers ask
CLASSES = 4
GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(120, 12, generator=GENERATOR) * torch.logspace(-3, 3, 12) + torch.linspace(-50, 50, 12)
STANDARD = (INPUTS.double() - INPUTS.double().mean(dim=0)) / INPUTS.double().std(dim=0, correction=0)
HARD = (STANDARD[:, :CLASSES] + torch.randn(120, CLASSES, generator=GENERATOR)).argmax(dim=1)
SOFT = torch.softmax(torch.randn(120, CLASSES, generator=GENERATOR), dim=1)
SETS = (torch.rand(120, CLASSES, generator=GENERATOR) < 0.4).float()
DECAYS = (1.0, 0.1, 0.01, 0.001)


def solve(labels=HARD, **options):
    return list(head_path(INPUTS, labels, **{"classes": CLASSES, "weight_decays": DECAYS, **options}))


def test_the_heads_are_those_of_scikit_learn():
    for head in solve():
        other = LogisticRegression(C=1 / (len(INPUTS) * head.weight_decay), tol=1e-9, max_iter=10_000)
        expected = other.fit(STANDARD.numpy(), HARD.numpy()).predict_proba(STANDARD.numpy())
        assert np.abs(head.logits(INPUTS).softmax(dim=1).numpy() - expected).max() < 1e-4
        assert head.slope < 1e-6


@pytest.mark.parametrize(
    ("labels", "loss"),
    [
        (HARD, ImageLoss(0.1, class_weights=(0.5, 1.0, 2.0, 3.0))),
        (HARD, ImageLoss(shifts=prior_shifts([10, 20, 30, 60], 1.0))),
        (SOFT, ImageLoss(0.1)),
        (SOFT * torch.linspace(0.1, 1.9, 120)[:, None], ImageLoss()),  # images with weights
        (SETS, LabelSetLoss(0.1, class_weights=(0.5, 1.0, 2.0, 3.0))),
    ],
    ids=["weights", "logit adjustment", "soft", "weighted images", "label sets"],
)
def test_no_head_near_it_has_less_loss(labels, loss):
    """A brute-force look around the answer, at the loss that a phase of steps has."""
    (head,) = solve(labels, loss=loss, weight_decays=[0.01])
    deviation = INPUTS.double().std(dim=0, correction=0)

    def objective(weight, bias):
        value = loss({"logits": INPUTS.double() @ weight.T + bias}, labels)
        return float(value + 0.005 * (weight * deviation).square().sum())

    least = objective(head.weight, head.bias)
    for _ in range(50):
        weight = head.weight + 1e-2 * torch.randn(head.weight.shape, generator=GENERATOR) / deviation
        bias = head.bias + 1e-2 * torch.randn(CLASSES, generator=GENERATOR)
        assert objective(weight, bias) > least


def test_the_path_is_warm_and_each_answer_its_own():
    together, alone = solve()[-1], solve(weight_decays=DECAYS[-1:])[0]
    torch.testing.assert_close(together.logits(INPUTS), alone.logits(INPUTS), atol=1e-3, rtol=1e-3)


def test_it_is_the_same_bit_for_bit_and_draws_no_random_number():
    state = torch.get_rng_state()
    first, second = solve(), solve()
    assert all(
        torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias) for a, b in zip(first, second, strict=True)
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_parts_and_float32_come_to_the_same(monkeypatch):
    expected = solve(weight_decays=[0.1])[0].logits(INPUTS)
    monkeypatch.setattr(logistic, "_LOGITS_AT_ONCE", 7 * CLASSES)
    torch.testing.assert_close(solve(weight_decays=[0.1])[0].logits(INPUTS), expected)
    monkeypatch.setattr(logistic, "_MOST_DOUBLES", 1)
    (single,) = solve(weight_decays=[0.1])
    assert single.weight.dtype == torch.float32
    torch.testing.assert_close(single.logits(INPUTS).double(), expected, atol=1e-2, rtol=1e-2)


def test_held_out_images_are_asked_of_the_heads_of_other_folds():
    folds, views = torch.arange(120) % 5, [INPUTS, INPUTS + 1]
    path = partial(head_path, classes=CLASSES, weight_decays=DECAYS)
    found = held_out_logits(views, HARD, folds, path)
    for fold in range(5):
        inside = folds != fold
        inputs, labels = torch.cat([view[inside] for view in views]), torch.cat([HARD[inside]] * 2)
        *_, head = path(inputs, labels)
        torch.testing.assert_close(found[-1, ~inside], head.logits(INPUTS[~inside]))


def test_features_that_say_nothing_get_no_weight():
    inputs = torch.cat([INPUTS, torch.full((120, 1), 1e4), torch.zeros(120, 1)], dim=1)
    (head,) = head_path(inputs, HARD, classes=CLASSES, weight_decays=[0.1])
    assert not head.weight[:, -2:].any()
    torch.testing.assert_close(head.logits(inputs), solve(weight_decays=[0.1])[0].logits(INPUTS))


def test_a_class_without_images_gets_a_low_share():
    (head,) = solve(classes=CLASSES + 1, weight_decays=[0.1])
    assert head.logits(INPUTS).softmax(dim=1)[:, CLASSES].max() < 0.01


def test_an_end_that_is_not_reached_is_said(monkeypatch, caplog):
    monkeypatch.setattr(logistic, "_MOST_STEPS", 2)
    with caplog.at_level("WARNING", "hfft"):
        (head,) = solve(weight_decays=[1e-4])
    assert head.steps == 2
    assert "not at its end after 2 steps" in caplog.text


def test_gradients_are_those_of_the_loss_in_float64():
    logits = torch.randn(8, CLASSES, dtype=torch.float64, generator=GENERATOR)
    assert ImageLoss()({"logits": logits}, HARD[:8]) == functional.cross_entropy(logits, HARD[:8])
