"""A phase's `average`: exact against one made by hand, continued after an interruption, and chosen on validation."""

import json
import shutil

import pytest
import tiny
import torch
import toy
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import TrainerCallback

from hfft.recipe.spec import AdapterSpec
from hfft.training import averaging

EVERY_TWO = {"num_train_epochs": 3, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.05}  # 9 steps
LAST_BLOCK = {"unfreeze": {"blocks": 1}, "arguments": EVERY_TWO}


class Snapshots(TrainerCallback):
    """Copies of all weights before the first step and after each one."""

    def __init__(self):
        self.by_step = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.by_step.append({name: value.clone() for name, value in model.state_dict().items()})

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.on_train_begin(args, state, control, model)


def by_hand(snapshots, decay, steps):
    averages = {name: value.clone() for name, value in snapshots[0].items()}
    for step in range(1, steps + 1):
        now = min(decay, (1 + step) / (10 + step))
        for name, value in snapshots[step].items():
            averages[name] = torch.lerp(averages[name], value, 1 - now) if value.is_floating_point() else value
    return averages


def mean_of(folder, names):
    files = [load_file(next((folder / name).glob("*model.safetensors"))) for name in names]
    return {name: torch.stack([one[name].double() for one in files]).mean(0).float() for name in files[0]}


def is_equal(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("family", "phase"),
    [
        ("vit", {"unfreeze": {"blocks": 1}}),
        ("vit", {"adapter": AdapterSpec(r=2, lora_dropout=0.1)}),
        ("resnet", {"unfreeze": {"blocks": 2}, "batchnorm": "train"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("decay", [0.3, 0.999])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_moving_average_is_that_of_the_weights_after_each_step(family, phase, decay, accumulated, tmp_path):
    snapshots = Snapshots()
    arguments = {**EVERY_TWO, "gradient_accumulation_steps": accumulated, "eval_steps": 1}
    options = {"average": {"ema": decay}, "arguments": arguments, **phase}
    model, result = toy.run(tiny.build(family), tmp_path, callbacks=[snapshots], **options)
    assert is_equal(model.state_dict(), by_hand(snapshots.by_step, decay, result.best_step))
    saved = torch.load(tmp_path / result.checkpoint / averaging.UNAVERAGED, weights_only=True)
    raw = snapshots.by_step[result.best_step]
    assert all(torch.equal(value, raw[name]) for name, value in saved.items())
    assert any(not torch.equal(value, model.state_dict()[name]) for name, value in saved.items())
    assert result.frozen["changed"] == 0


def test_a_moving_average_is_what_is_evaluated(tmp_path):
    model, result = toy.run(tiny.build("vit"), tmp_path, average={"ema": 0.9}, **LAST_BLOCK)
    again, measured = toy.run(model, tmp_path.with_name("again"), arguments={**EVERY_TWO, "learning_rate": 1e-9})
    assert again is not None
    assert measured.metrics["log_loss"] == pytest.approx(result.metrics["log_loss"], abs=1e-6)


def test_without_validation_the_average_of_the_last_step_is_kept(tmp_path):
    data, snapshots = toy.phase_data(validation=0), Snapshots()
    model, result = toy.run(tiny.build("vit"), tmp_path, data=data, callbacks=[snapshots], average={"ema": 0.9})
    assert is_equal(model.state_dict(), by_hand(snapshots.by_step, 0.9, result.steps))
    again, _ = toy.run(tiny.build("vit"), tmp_path, data=data, average={"ema": 0.9})
    assert is_equal(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("kind", ["last", "best", "soup"])
def test_a_mean_of_checkpoints(kind, tmp_path, monkeypatch):
    """All checkpoints are kept aside as they are written; which of them go in is looked up in the history."""
    kept = tmp_path / "kept"
    remove = averaging.remove_others

    def copied(average, folder, *others):
        for path in folder.glob("checkpoint-*"):
            shutil.copytree(path, kept / path.name, dirs_exist_ok=True)
        remove(average, folder, *others)

    monkeypatch.setattr("hfft.training.trainer.remove_others", copied)
    model, result = toy.run(tiny.build("vit"), tmp_path / "p", average={kind: 3}, **LAST_BLOCK)
    history = [json.loads(line) for line in (tmp_path / "p/history.jsonl").read_text().splitlines()]
    scores = {entry["step"]: entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry}
    newest = sorted(scores, reverse=True)
    best = sorted(scores, key=lambda step: (-scores[step], step))
    names = [f"checkpoint-{step}" for step in (newest if kind == "last" else best)[:3]]
    assert result.mean["checkpoints"] == names if kind != "soup" else set(result.mean["checkpoints"]) <= set(names)
    mean = mean_of(kept, result.mean["checkpoints"])
    if result.mean["kept"]:
        assert result.checkpoint == "average"
        assert result.metrics["accuracy"] == result.mean["metrics"]["accuracy"]
        assert kind == "last" or result.metrics["accuracy"] >= max(scores.values())
        assert is_equal(load_file(tmp_path / "p/average/model.safetensors"), mean)
    else:
        assert result.checkpoint == f"checkpoint-{best[0]}"
        assert result.metrics["accuracy"] == scores[best[0]]
    again, second = toy.run(tiny.build("vit"), tmp_path / "p", average={kind: 3}, **LAST_BLOCK)
    assert second == result
    assert is_equal(again.state_dict(), model.state_dict())
    assert kind == "last" or result.metrics["accuracy"] >= max(scores.values())


def test_a_mean_that_is_worse_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(averaging, "_measure", lambda _: {"accuracy": 0.0})
    model, result = toy.run(tiny.build("vit"), tmp_path, average={"best": 2}, **LAST_BLOCK)
    assert not result.mean["kept"]
    alone, single = toy.run(tiny.build("vit"), tmp_path.with_name("alone"), **LAST_BLOCK)
    assert (single.checkpoint, single.metrics) == (result.checkpoint, result.metrics)
    assert is_equal(model.state_dict(), alone.state_dict())


def test_the_mean_of_adapters(tmp_path):
    phase = {"adapter": AdapterSpec(r=2), "arguments": {**EVERY_TWO, "save_total_limit": 9}}
    model, result = toy.run(tiny.build("vit"), tmp_path, average={"last": 2}, **phase)
    assert result.mean["checkpoints"] == ["checkpoint-9", "checkpoint-8"]
    assert is_equal(get_peft_model_state_dict(model), mean_of(tmp_path, result.mean["checkpoints"]))


@pytest.mark.parametrize("average", [{"ema": 0.8}, {"last": 2}, {"soup": 3}], ids=str)
@pytest.mark.parametrize("stop", [1, 5, 8])
@pytest.mark.parametrize(
    ("family", "phase"),
    [("vit", {"unfreeze": {"blocks": 1}}), ("resnet", {"unfreeze": {"blocks": 2}, "batchnorm": "train"})],
    ids=["vit", "resnet"],
)
def test_an_interrupted_phase_ends_as_if_it_had_not_been(family, phase, average, stop, tmp_path):
    options = {"average": average, "arguments": EVERY_TWO, **phase}
    whole, result = toy.run(tiny.build(family), tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        toy.run(tiny.build(family), tmp_path / "parts", callbacks=[toy.StopAt(stop)], **options)
    again, continued = toy.run(tiny.build(family), tmp_path / "parts", **options)
    assert is_equal(again.state_dict(), whole.state_dict())
    assert (continued.mean, continued.metrics, continued.checkpoint) == (
        result.mean,
        result.metrics,
        result.checkpoint,
    )
