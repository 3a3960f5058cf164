"""Every head of the grid is the head that the phase would train with its rate and decay."""

import dataclasses
import logging
from functools import partial

import pytest
import tiny
import torch
import toy
from torch import nn
from torch.nn import functional
from transformers import TrainerCallback, get_scheduler

from hfft.errors import RecipeError, TrainingError
from hfft.metrics.metrics import METRICS
from hfft.recipe.spec import PhaseSpec
from hfft.training import probe
from hfft.training.losses import ImageLoss
from hfft.training.probe import HeadInputs, Heads, PhaseSteps, default_grid, search_head, train_heads
from hfft.training.settings import training_arguments

GRID = [(rate, decay) for rate in (1e-3, 1e-2, 1e-1) for decay in (0.0, 0.5)]
RUN = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "dataloader_num_workers": 0}


class Snapshots(TrainerCallback):
    """Copies of the head after each step."""

    def __init__(self):
        self.by_step = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.by_step[state.global_step] = [value.clone() for value in model.classifier.parameters()]


def settings(folder, *, validate=True, **arguments):
    spec = PhaseSpec(name="p", arguments={**RUN, **arguments})
    return training_arguments(spec, folder, seed=0, validate=validate)


def network():
    """A ViT whose head has start values that are not zero."""
    model = tiny.build("vit")
    with torch.no_grad():
        model.classifier.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    return model.eval()


def head_inputs(model, data):
    def of(examples):
        pixels = torch.stack([examples[k]["pixel_values"] for k in range(len(examples))])
        seen = []
        hook = model.classifier.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        with torch.no_grad():
            model(pixels)
        hook.remove()
        return seen[0]

    return HeadInputs(
        train=[of(data.train)],
        labels=torch.tensor(data.train.rows["label"]),
        validation=of(data.validation),
        validation_labels=torch.tensor(data.validation.rows["label"]),
    )


def noise(classes=5, images=37, width=12, views=1):
    """Random inputs with a hint of their label."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (images + 40,), generator=generator)
    hint = torch.randn(classes, width, generator=generator)
    seen = [hint[labels] + 2 * torch.randn(images + 40, width, generator=generator) for _ in range(views)]
    train = [view[:images] for view in seen]
    return HeadInputs(train, labels[:images], seen[0][images:], labels[images:])


def search(inputs, arguments, *, layer=None, loss=None, **others):
    layer = layer or nn.Linear(inputs.validation.shape[1], int(inputs.labels.max()) + 1)
    return search_head(
        layer, inputs, arguments=arguments, loss=loss or ImageLoss(), **{"metrics": METRICS, "grid": GRID, **others}
    )


def trained(layer, inputs, arguments, points, loss):
    """Weights of the heads after each step."""
    steps = PhaseSteps.of(arguments, len(inputs.labels))
    heads = Heads(layer, points, steps)
    return {
        step: [value.clone() for value in (heads.weight, heads.bias)]
        for step in train_heads(heads, inputs, steps, loss)
    }


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"max_grad_norm": 0.05, "class_weights": (0.5, 3.0), "label_smoothing_factor": 0.2},
        # the Trainer drops the last validation batch too, so that there must be whole ones
        {"per_device_train_batch_size": 5, "per_device_eval_batch_size": 4, "dataloader_drop_last": True},
        {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-4}, "num_train_epochs": 1.5},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2, "max_steps": 7},
        {"lr_scheduler_type": "cosine", "warmup_steps": 0.3, "eval_strategy": "steps", "eval_steps": 2},
        {"adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-3, "optim": "adamw_torch", "max_grad_norm": 0},
        {"metric_for_best_model": "log_loss", "class_weights": (0.5, 3.0)},
        {"metric_for_best_model": "eval_macro_f1", "eval_delay": 2},
    ],
    ids=str,
)
def test_the_phase_ends_with_the_head_that_won(arguments, tmp_path):
    """The phase as users run it, at the chosen rate and decay; the weights after each of its steps."""
    class_weights = arguments.get("class_weights")
    arguments = {name: value for name, value in arguments.items() if name != "class_weights"}
    data = dataclasses.replace(toy.phase_data(), loss=partial(ImageLoss, class_weights=class_weights))
    resolved, model = settings(tmp_path, **arguments), network()
    inputs, loss = head_inputs(model, data), ImageLoss(resolved.label_smoothing_factor, class_weights)
    metric = resolved.metric_for_best_model.removeprefix("eval_")
    choice = search(inputs, resolved, layer=model.classifier, loss=loss)
    points = [(point.learning_rate, point.weight_decay) for point in choice.table]
    expected = trained(model.classifier, inputs, resolved, points, loss)
    won = points.index((choice.learning_rate, choice.weight_decay))

    snapshots = Snapshots()
    chosen = {"learning_rate": choice.learning_rate, "weight_decay": choice.weight_decay}
    model, result = toy.run(
        model,
        tmp_path,
        data=data,
        unfreeze="head",
        callbacks=[snapshots],
        arguments={**RUN, **arguments, **chosen},
    )
    assert snapshots.by_step.keys() == expected.keys()
    for step, values in snapshots.by_step.items():
        for value, heads in zip(values, expected[step], strict=True):
            torch.testing.assert_close(heads[won], value, rtol=1e-4, atol=1e-6)
    assert result.metrics[metric] == pytest.approx(choice.score, abs=1e-6)
    torch.testing.assert_close(model.classifier.weight, expected[result.best_step][0][won], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("point", [(1e-3, 0.0), (1e-2, 0.5), (1e-1, 0.5)], ids=str)
def test_the_table_has_what_single_runs_reach(point, tmp_path):
    data, model = toy.phase_data(), network()
    arguments = {"metric_for_best_model": "log_loss"}
    choice = search(head_inputs(model, data), settings(tmp_path, **arguments), layer=model.classifier)
    alone = {"learning_rate": point[0], "weight_decay": point[1]}
    _, result = toy.run(model, tmp_path, data=data, unfreeze="head", arguments={**RUN, **arguments, **alone})
    found = next(row for row in choice.table if (row.learning_rate, row.weight_decay) == point)
    assert result.metrics["log_loss"] == pytest.approx(found.score, abs=1e-6)
    assert result.best_step == found.epoch * 3  # steps per epoch
    assert choice.score <= result.metrics["log_loss"] + 1e-6


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_heads_are_those_of_a_plain_loop(has_bias, tmp_path):
    """With PyTorch's functions: views, clipping, smoothing, class weights and a smaller last batch."""
    inputs = noise(views=2)
    arguments = settings(tmp_path, per_device_train_batch_size=10, lr_scheduler_type="cosine", warmup_steps=3)
    arguments.max_grad_norm = 0.3
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
    layer = nn.Linear(12, 5, bias=has_bias)
    points = [(1e-3, 0.0), (1e-2, 0.3), (1e-1, 0.1)]
    steps = PhaseSteps.of(arguments, 37)
    heads = Heads(layer, points, steps)
    loss = ImageLoss(0.1, weights.tolist())
    assert [*train_heads(heads, inputs, steps, loss)] == [*range(1, 13)]
    for number, (rate, decay) in enumerate(points):
        alone = nn.Linear(12, 5, bias=has_bias)
        alone.load_state_dict(layer.state_dict())
        groups = [{"params": [alone.weight], "weight_decay": decay}]
        groups += [{"params": [alone.bias], "weight_decay": 0.0}] if has_bias else []
        optimizer = torch.optim.AdamW(groups, lr=rate)
        scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=3, num_training_steps=12)
        norms = []
        for epoch in range(3):
            order = torch.randperm(37, generator=torch.Generator().manual_seed(epoch))
            for batch in order.split(10):
                logits, labels = alone(inputs.train[epoch % 2][batch]), inputs.labels[batch]
                losses = functional.cross_entropy(
                    logits, labels, weight=weights, label_smoothing=0.1, reduction="none"
                )
                optimizer.zero_grad()
                losses.mean().backward()
                norms.append(nn.utils.clip_grad_norm_(alone.parameters(), 0.3))
                optimizer.step()
                scheduler.step()
        assert max(norms) > 0.3
        torch.testing.assert_close(heads.weight[number], alone.weight.detach(), rtol=1e-4, atol=1e-6)
        if has_bias:
            torch.testing.assert_close(heads.bias[number], alone.bias.detach(), rtol=1e-4, atol=1e-6)


def test_the_layer_is_not_changed(tmp_path):
    layer = nn.Linear(12, 5)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    search(noise(), settings(tmp_path), layer=layer)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert all(value.grad is None for value in layer.parameters())


def test_the_table_is_the_grid_and_the_best_is_the_choice(tmp_path):
    choice = search(noise(), settings(tmp_path))
    assert [(point.learning_rate, point.weight_decay) for point in choice.table] == GRID
    assert choice.score == max(point.score for point in choice.table) > 0.3


def test_decays_that_change_nothing_are_not_tried(tmp_path):
    """In 300 steps, 0.1 shrinks weights by 1.5 % at a rate of 1e-3, by 4.4 % at 3e-3 and by 14 % at 1e-2."""
    assert {rate for rate, _ in default_grid(300)} == set(probe.RATES)
    assert [point for point in default_grid(300) if point[1] > 0] == [(1e-2, 0.1), (3e-2, 0.1), (1e-1, 0.1)]
    assert (3e-5, 0.1) in default_grid(100_000)
    assert len(search(noise(), settings(tmp_path), grid=None).table) == len(default_grid(12))


def test_of_equal_heads_the_smaller_rate_wins_then_the_larger_decay(tmp_path):
    inputs = noise()
    inputs = dataclasses.replace(
        inputs, validation=inputs.validation[:0].new_zeros(4, 12), validation_labels=inputs.labels[:4]
    )
    layer = nn.Linear(12, 5)
    with torch.no_grad():
        layer.bias[0] = 50  # whatever is learnt, class 0 is predicted
    choice = search(inputs, settings(tmp_path), layer=layer)
    assert len({point.score for point in choice.table}) == 1
    assert (choice.learning_rate, choice.weight_decay, choice.epoch) == (1e-3, 0.5, 1)


def test_a_grid_larger_than_the_budget_is_trained_in_groups(tmp_path, monkeypatch):
    inputs, layer, made = noise(), nn.Linear(12, 5), []
    whole = search(inputs, settings(tmp_path, metric_for_best_model="log_loss"), layer=layer)
    monkeypatch.setattr(probe, "_BUDGET", 4 * 16 * (12 * 5 + 5) + 1)
    monkeypatch.setattr(
        probe, "Heads", lambda layer, points, steps: made.append(len(points)) or Heads(layer, points, steps)
    )
    parts = search(inputs, settings(tmp_path, metric_for_best_model="log_loss"), layer=layer)
    assert made == [4, 2]
    for one, other in zip(whole.table, parts.table, strict=True):
        assert dataclasses.asdict(one) == pytest.approx(dataclasses.asdict(other))


def test_a_head_that_is_no_number_any_more_harms_no_other(tmp_path):
    inputs, layer = noise(), nn.Linear(12, 5)
    arguments = settings(tmp_path, max_grad_norm=0, metric_for_best_model="log_loss")
    small = search(inputs, arguments, layer=layer, grid=[(1e-3, 0.0), (1e-2, 0.0)])
    large = search(inputs, arguments, layer=layer, grid=[(1e-3, 0.0), (1e-2, 0.0), (1e38, 0.0)])
    assert large.table[2].score is None
    assert [point.score for point in large.table[:2]] == pytest.approx([point.score for point in small.table])
    assert large.learning_rate == small.learning_rate


def test_a_head_that_fails_late_has_failed(tmp_path):
    """Its phase would stop with an error at that evaluation, whatever it reached before."""
    inputs, layer = noise(), nn.Linear(12, 5)
    warmup = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 6}  # the first step is one of rate 0
    arguments = settings(tmp_path, max_grad_norm=0, eval_strategy="steps", eval_steps=1, **warmup)
    with pytest.raises(TrainingError, match="no head to choose: none was evaluated with outputs that are finite"):
        search(inputs, arguments, layer=layer, grid=[(1e38, 0.0)])


@pytest.mark.parametrize(
    ("rates", "side"), [((1e-6, 1e-5), "largest"), ((1e-2, 1.0, 10.0), "smallest"), ((1e-6, 1e-2, 10.0), None)]
)
def test_a_rate_at_the_edge_is_warned_of(rates, side, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        search(noise(), settings(tmp_path, metric_for_best_model="log_loss"), grid=[(rate, 0.0) for rate in rates])
    warnings = [record.message for record in caplog.records if record.name == probe.__name__]
    assert [f"the {side} of those tried" in warning for warning in warnings] == ([] if side is None else [True])


def test_patience_ends_a_head_where_its_phase_would_end(tmp_path):
    """A head that gets worse, then better than ever: the phase would not live to see it."""
    scores = iter([0.5, 0.4, 0.3, 0.9])
    arguments = settings(tmp_path, num_train_epochs=4)
    layer, inputs, grid = nn.Linear(12, 5), noise(), [(1e-2, 0.0)]
    choice = search_head(
        layer,
        inputs,
        arguments=arguments,
        loss=ImageLoss(),
        metrics={"accuracy": lambda *_: next(scores)},
        grid=grid,
        patience=2,
    )
    assert (choice.score, choice.epoch) == (0.5, 1)
    scores = iter([0.5, 0.4, 0.3, 0.9])
    choice = search_head(
        layer, inputs, arguments=arguments, loss=ImageLoss(), metrics={"accuracy": lambda *_: next(scores)}, grid=grid
    )
    assert (choice.score, choice.epoch) == (0.9, 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"validate": False}, "chooses by validation images, and there are none"),
        ({"eval_strategy": "no"}, "chooses by validation images, and there are none"),
        ({"optim": "sgd"}, "found optim sgd; allowed: adamw_torch, adamw_torch_fused"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "found lr_scheduler_type reduce_lr_on_plateau"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 5e-3}}, "can't try 0.001: lr_end"),
    ],
    ids=str,
)
def test_what_can_not_be_tried_is_refused(arguments, words, tmp_path):
    with pytest.raises(RecipeError, match=words):
        search(noise(), settings(tmp_path, **arguments))
