from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from hfft.training.losses import ImageLoss, LabelSetLoss, prior_shifts

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(8, 5, generator=GENERATOR)
HARD = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
SETS = (torch.rand(8, 5, generator=torch.Generator().manual_seed(1)) < 0.4).float()
SOFT = torch.softmax(torch.randn(8, 5, generator=GENERATOR), dim=1)


def outputs(logits):
    return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("labels", [HARD, SOFT], ids=["hard", "soft"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("sizes", [[8], [4, 4], [1] * 8, [5, 3]], ids=str)
def test_micro_batches_add_up_to_the_mean_of_the_big_batch(labels, smoothing, sizes):
    expected = functional.cross_entropy(LOGITS, labels, label_smoothing=smoothing)
    loss = ImageLoss(smoothing)
    total = sum(
        loss(outputs(logits), part, num_items_in_batch=torch.tensor(labels.numel()))
        for logits, part in zip(LOGITS.split(sizes), labels.split(sizes), strict=True)
    )
    torch.testing.assert_close(total, expected)


def test_smoothing_is_that_of_transformers():
    from transformers.trainer_pt_utils import LabelSmoother

    expected = LabelSmoother(epsilon=0.2)({"logits": LOGITS}, HARD.unsqueeze(-1))
    torch.testing.assert_close(ImageLoss(0.2)(outputs(LOGITS), HARD), expected)


def test_without_a_count_it_is_the_mean():
    torch.testing.assert_close(ImageLoss()({"logits": LOGITS}, HARD), functional.cross_entropy(LOGITS, HARD))


@pytest.mark.parametrize("labels", [HARD, SOFT], ids=["hard", "soft"])
@pytest.mark.parametrize("sizes", [[8], [1] * 8, [5, 3]], ids=str)
def test_class_weights_count_images_whatever_the_micro_batches(labels, sizes):
    weights = torch.tensor([0.5, 1.0, 2.0, 1.0, 3.0])
    shares = functional.one_hot(labels, 5) if labels.ndim == 1 else labels
    expected = -(shares * weights * torch.log_softmax(LOGITS, dim=1)).sum() / 8
    loss = ImageLoss(class_weights=weights.tolist())
    total = sum(
        loss(outputs(logits), part, num_items_in_batch=torch.tensor(labels.numel()))
        for logits, part in zip(LOGITS.split(sizes), labels.split(sizes), strict=True)
    )
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("labels", [torch.tensor([-100]), torch.full((1, 5), -100.0)], ids=["hard", "soft"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_filler_counts_for_nothing(labels, smoothing):
    logits = LOGITS[:1].clone().requires_grad_()
    loss = ImageLoss(smoothing)(outputs(logits), labels, num_items_in_batch=torch.tensor(8))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("labels", [HARD, SOFT], ids=["hard", "soft"])
@pytest.mark.parametrize("sizes", [[8], [1] * 8, [5, 3]], ids=str)
def test_focal_loss(labels, sizes):
    shares = functional.one_hot(labels, 5) if labels.ndim == 1 else labels
    probabilities = torch.softmax(LOGITS, dim=1)
    expected = -(shares * (1 - probabilities) ** 2 * probabilities.log()).sum() / 8
    total = sum(
        ImageLoss(gamma=2.0)(outputs(logits), part, num_items_in_batch=torch.tensor(labels.numel()))
        for logits, part in zip(LOGITS.split(sizes), labels.split(sizes), strict=True)
    )
    torch.testing.assert_close(total, expected)


def test_the_focal_loss_of_a_filler():
    loss = ImageLoss(gamma=2.0)(outputs(LOGITS[:2]), torch.tensor([-100, 3]), num_items_in_batch=torch.tensor(1))
    torch.testing.assert_close(loss, ImageLoss(gamma=2.0)(outputs(LOGITS[1:2]), torch.tensor([3])))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weights_of_images_are_sums_of_shares(smoothing):
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0, 1.0, 0.25, 1.0])
    each = functional.cross_entropy(LOGITS, HARD, label_smoothing=smoothing, reduction="none")
    shares = functional.one_hot(HARD, 5) * weights[:, None]
    torch.testing.assert_close(ImageLoss(smoothing)(outputs(LOGITS), shares), (weights * each).mean())


def test_logit_adjustment():
    counts = [10, 20, 30, 15, 25]
    adjusted = LOGITS + 0.5 * torch.log(torch.tensor(counts) / 100)
    loss = ImageLoss(shifts=prior_shifts(counts, 0.5))
    torch.testing.assert_close(loss(outputs(LOGITS), HARD), functional.cross_entropy(adjusted, HARD))


# Any number of labels


@pytest.mark.parametrize("sizes", [[8], [4, 4], [1] * 8, [5, 3]], ids=str)
@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 2.0, 1.0, 3.0]])
def test_micro_batches_of_label_sets_add_up_to_torchs_mean(sizes, weights):
    positive = None if weights is None else torch.tensor(weights)
    expected = functional.binary_cross_entropy_with_logits(LOGITS, SETS, pos_weight=positive)
    loss = LabelSetLoss(class_weights=weights)
    total = sum(
        loss(outputs(logits), part, num_items_in_batch=torch.tensor(SETS.numel()))
        for logits, part in zip(LOGITS.split(sizes), SETS.split(sizes), strict=True)
    )
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(loss(outputs(LOGITS), SETS), expected)


def test_fillers_count_for_nothing_among_label_sets():
    filled = torch.cat([SETS, torch.full((2, 5), -100.0)])
    logits = torch.cat([LOGITS, torch.full((2, 5), 7.0)])
    expected = functional.binary_cross_entropy_with_logits(LOGITS, SETS)
    torch.testing.assert_close(LabelSetLoss()(outputs(logits), filled), expected)
    found = LabelSetLoss()(outputs(logits), filled, num_items_in_batch=torch.tensor(SETS.numel()))
    torch.testing.assert_close(found, expected)


def test_smoothing_of_a_label_is_that_of_two_classes():
    """A label is a question of yes and no: cross entropy over two logits, 0 and its own."""
    pairs = torch.stack([torch.zeros_like(LOGITS), LOGITS], dim=-1).flatten(0, 1)
    expected = functional.cross_entropy(pairs, SETS.flatten().long(), label_smoothing=0.2)
    torch.testing.assert_close(LabelSetLoss(0.2)(outputs(LOGITS), SETS), expected)


def test_focal_loss_of_a_label_is_that_of_two_classes():
    pairs = torch.stack([torch.zeros_like(LOGITS), LOGITS], dim=-1).flatten(0, 1)
    expected = ImageLoss(gamma=2.0)(outputs(pairs), SETS.flatten().long())
    torch.testing.assert_close(LabelSetLoss(gamma=2.0)(outputs(LOGITS), SETS), expected)


def test_targets_between_0_and_1_are_taken_as_they_are():
    mixed = 0.3 * SETS + 0.7 * SETS.flip(0)
    expected = functional.binary_cross_entropy_with_logits(LOGITS, mixed)
    torch.testing.assert_close(LabelSetLoss()(outputs(LOGITS), mixed), expected)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [0.0, 17.0, 30.0, 200.0])
def test_a_sure_answer_has_a_gradient_whatever_gamma(gamma, size):
    for loss, right in ((ImageLoss, torch.tensor([0, 1])), (LabelSetLoss, torch.eye(2))):
        logits = torch.tensor([[size, -size], [0.3, -0.2]], requires_grad=True)
        loss(gamma=gamma)({"logits": logits}, right).backward()
        assert logits.grad.isfinite().all()
        assert logits.grad[1].abs().min() > 0.01
        if size >= 30:
            assert logits.grad[0].abs().max() < 1e-5


def test_constants_stay_where_the_logits_are():
    loss = ImageLoss(class_weights=(1.0,) * 5, shifts=(0.1,) * 5)
    places = []
    for _ in range(2):
        loss(outputs(LOGITS.to("meta")), HARD.to("meta"), 8)
        places.append([id(tensor) for tensor in (loss.class_weights, loss.shifts) if tensor.is_meta])
    assert len(places[0]) == 2
    assert places[0] == places[1]
