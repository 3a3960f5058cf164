"""Stopped anywhere and run again, a phase ends with the weights of an uninterrupted one, bit for bit."""

import shutil

import pytest
import tiny
import torch
import toy
from transformers import EarlyStoppingCallback, TrainerCallback

from hfft.errors import TrainingError
from hfft.recipe.augment import PRESETS, AugmentSpec
from hfft.recipe.spec import AdapterSpec
from hfft.training.trainer import newest_checkpoint

AUGMENT = AugmentSpec(**PRESETS["strong"])
STEPS = {"num_train_epochs": 3, "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 2}


class StopAtTheEnd(TrainerCallback):
    def on_train_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def run(family, folder, callbacks=(), **phase):
    data = toy.phase_data(augment=AUGMENT)
    changes = {"drop_path_rate": 0.1} if family == "convnext" else {}
    return toy.run(tiny.build(family, **changes), folder, data=data, callbacks=callbacks, **phase)


@pytest.mark.parametrize(
    ("family", "phase"),
    [
        ("vit", {"unfreeze": "head"}),
        ("vit", {"unfreeze": "all"}),
        ("vit", {"adapter": AdapterSpec(lora_dropout=0.1)}),
        ("convnext", {"unfreeze": "all"}),
        ("resnet", {"unfreeze": {"blocks": 2}, "batchnorm": "train"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("stop", [1, 5, 8])  # before the first checkpoint, in the middle of an epoch, in the last one
def test_an_interrupted_phase_ends_as_if_it_had_not_been(family, phase, stop, tmp_path):
    model, result = run(family, tmp_path / "whole", arguments=STEPS, **phase)
    with pytest.raises(KeyboardInterrupt):
        run(family, tmp_path / "parts", callbacks=[toy.StopAt(stop)], arguments=STEPS, **phase)
    again, continued = run(family, tmp_path / "parts", arguments=STEPS, **phase)
    expected, got = model.state_dict(), again.state_dict()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert (continued.best_step, continued.metrics) == (result.best_step, result.metrics)


def test_early_stopping_counts_on_after_an_interruption(tmp_path):
    phase = {
        "unfreeze": "head",
        "early_stopping": 2,
        "arguments": {"num_train_epochs": 8, "metric_for_best_model": "log_loss", "greater_is_better": True},
    }
    _, result = run("vit", tmp_path / "whole", **phase)
    with pytest.raises(KeyboardInterrupt):
        run("vit", tmp_path / "parts", callbacks=[toy.StopAt(result.best_step + 4)], **phase)
    _, continued = run("vit", tmp_path / "parts", **phase)
    assert continued.steps == result.steps


def test_a_phase_that_had_stopped_early_is_not_trained_on(tmp_path):
    """Killed between its last step and result.json."""
    phase = {"unfreeze": "head", "early_stopping": 1, "arguments": {"num_train_epochs": 8, "learning_rate": 0.3}}
    model, result = run("vit", tmp_path / "whole", **phase)
    assert result.steps < 8 * 3
    with pytest.raises(KeyboardInterrupt):
        run("vit", tmp_path / "parts", callbacks=[StopAtTheEnd()], **phase)
    again, continued = run("vit", tmp_path / "parts", callbacks=[toy.StopAt(result.steps + 1)], **phase)
    assert (continued.steps, continued.best_step, continued.metrics) == (
        result.steps,
        result.best_step,
        result.metrics,
    )
    assert torch.equal(again.classifier.weight, model.classifier.weight)


class EndAfterEpoch(TrainerCallback):
    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_save = True


def test_a_phase_that_a_callback_ended_without_validation_keeps_its_weights(tmp_path):
    """Killed between its last step and result.json: there is no best step then, and the weights are the last."""
    phase = {"data": toy.phase_data(validation=0), "unfreeze": "head"}
    model, result = toy.run(tiny.build("vit"), tmp_path / "whole", callbacks=[EndAfterEpoch()], **phase)
    assert result.steps < 2 * 3
    with pytest.raises(KeyboardInterrupt):
        toy.run(tiny.build("vit"), tmp_path / "parts", callbacks=[EndAfterEpoch(), StopAtTheEnd()], **phase)
    again, continued = toy.run(tiny.build("vit"), tmp_path / "parts", callbacks=[EndAfterEpoch()], **phase)
    assert continued.steps == result.steps
    assert torch.equal(again.classifier.weight, model.classifier.weight)


def test_early_stopping_counts_on_beside_callbacks_of_the_same_kind(tmp_path):
    """Also where those of the user aren't given any more."""
    arguments = {"num_train_epochs": 8, "metric_for_best_model": "log_loss", "greater_is_better": True}
    phase = {"unfreeze": "head", "early_stopping": 2, "arguments": arguments}
    _, result = run("vit", tmp_path / "whole", **phase)
    patient = [EarlyStoppingCallback(90), EarlyStoppingCallback(91)]
    for name, later in (("with", patient), ("without", [])):
        with pytest.raises(KeyboardInterrupt):
            run("vit", tmp_path / name, callbacks=[*patient, toy.StopAt(result.best_step + 4)], **phase)
        _, continued = run("vit", tmp_path / name, callbacks=later, **phase)
        assert continued.steps == result.steps


def test_two_callbacks_of_one_kind_count_on_after_an_interruption(tmp_path):
    arguments = {"num_train_epochs": 8, "metric_for_best_model": "log_loss", "greater_is_better": True}

    def phase(name, *more):
        stopping = [EarlyStoppingCallback(90), EarlyStoppingCallback(3)]
        return run("vit", tmp_path / name, unfreeze="head", callbacks=[*stopping, *more], arguments=arguments)[1]

    result = phase("whole")
    assert result.steps < 8 * 3
    for stop in (toy.StopAt(result.steps - 1), StopAtTheEnd()):
        with pytest.raises(KeyboardInterrupt):
            phase(type(stop).__name__, stop)
        assert phase(type(stop).__name__).steps == result.steps


def test_a_finished_phase_whose_weights_are_damaged_is_refused(tmp_path):
    _, result = run("vit", tmp_path, unfreeze="head")
    path = tmp_path / result.checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TrainingError, match="weights of this finished phase can't be read"):
        run("vit", tmp_path, unfreeze="head")


def test_a_finished_phase_is_reloaded_and_not_trained(tmp_path):
    model, result = run("vit", tmp_path, unfreeze="all")
    again, same = run("vit", tmp_path, callbacks=[toy.StopAt(1)], unfreeze="all")
    assert same == result
    assert all(torch.equal(model.state_dict()[name], value) for name, value in again.state_dict().items())
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("how", ["cut", "gone"])
@pytest.mark.parametrize(
    ("family", "phase"), [("vit", {"unfreeze": "all"}), ("vit", {"adapter": AdapterSpec(lora_dropout=0.1)})], ids=str
)
def test_whatever_file_of_the_newest_checkpoint_is_damaged_the_one_before_is_continued(family, phase, how, tmp_path):
    model, _ = run(family, tmp_path / "whole", arguments=STEPS, **phase)
    with pytest.raises(KeyboardInterrupt):
        run(family, tmp_path / "parts", callbacks=[toy.StopAt(5)], arguments=STEPS, **phase)
    names = sorted(path.name for path in (tmp_path / "parts" / "checkpoint-4").iterdir())
    needed = [name for name in names if name not in ("training_args.bin", "README.md")]
    assert len(needed) > 5
    for name in needed:
        folder = tmp_path / name / "phase"
        shutil.copytree(tmp_path / "parts", folder)
        damaged = folder / "checkpoint-4" / name
        damaged.unlink() if how == "gone" else damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
        assert newest_checkpoint(folder).name == "checkpoint-2", name
    again, _ = run(family, folder, arguments=STEPS, **phase)
    expected, got = model.state_dict(), again.state_dict()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
