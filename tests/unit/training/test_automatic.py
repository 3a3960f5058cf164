"""The rule by which a recipe is chosen: what is known of images, network and machine decides, within the budget."""

from dataclasses import replace

import pytest

from hfft.errors import RecipeError
from hfft.training.automatic import Facts, choose_checkpoint, propose

FACTS = Facts(
    images={"train": 1500, "validation": 400, "test": 600},
    labels=("rose", "tulip"),
    blocks=16,
    is_convolutional=True,
    has_linear_head=True,
    sides=(224, 160, 128),
    read=0.001,
    encode=0.02,
    step={1: 0.002, 2: 0.005, 5: 0.01}.__getitem__,
    started=10.0,
)


def chosen(minutes, **changed):
    return {choice.key: choice.value for choice in propose(replace(FACTS, **changed), minutes).choices}


@pytest.mark.parametrize("minutes", [3, 4, 5, 7, 10, 30])
def test_the_prediction_fits_the_budget(minutes):
    assert propose(FACTS, minutes).total <= 60 * minutes


def test_more_time_trains_more_blocks_and_longer():
    found = [chosen(minutes) for minutes in (3, 4.5, 5, 30)]
    blocks = [one.get("phases.last-blocks.unfreeze", {"blocks": 0})["blocks"] for one in found]
    epochs = [one.get("phases.last-blocks.num_train_epochs", 0) for one in found]
    assert blocks == sorted(blocks)
    assert (blocks[0], blocks[-1]) == (0, 5)
    assert (epochs[0], epochs[-1]) == (0, 10)


def test_a_budget_that_is_too_small_names_the_least():
    with pytest.raises(
        RecipeError, match=r"minutes: found 0\.1.* is (\d+\.?\d*): start \d+ s, record \d+ s"
    ) as caught:
        propose(FACTS, 0.1)
    least = float(str(caught.value).partition(" is ")[2].partition(":")[0])
    assert propose(FACTS, least).choices


def test_images_become_smaller_where_the_head_alone_would_be_too_slow():
    slow = {"encode": 0.2, "step": lambda blocks: 1.0}
    assert chosen(12, **slow)["model.image_size"] == 160
    assert "model.image_size" not in chosen(30, **slow)


@pytest.mark.parametrize(
    ("labels", "flips"),
    [(("left turn", "right turn"), False), (("b", "d", "p"), False), (("0", "1"), False), (("ant", "bee"), True)],
)
def test_images_are_mirrored_where_that_keeps_their_class(labels, flips):
    assert chosen(10, labels=labels)["data.augment.flip"] is flips


def test_few_validation_images_are_judged_by_a_smooth_metric():
    assert chosen(10)["training.metric_for_best_model"] == "log_loss"
    many = {**FACTS.images, "validation": 1000}
    assert "training.metric_for_best_model" not in chosen(30, images=many)


def test_an_accelerator_and_time_get_a_larger_checkpoint():
    asked = [(True, 0.01), (False, 5.0), (False, 0.1)]
    found = [choose_checkpoint(has_accelerator=gpu, seconds_per_image=each).value for gpu, each in asked]
    assert len(set(found)) == 3


def test_a_linear_head_is_solved_and_another_one_trained():
    assert chosen(10)["phases.head.solver"] == "lbfgs"
    assert "phases.head.solver" not in chosen(10, has_linear_head=False)
