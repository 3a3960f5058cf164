"""A head phase that is solved: a phase like others, without steps."""

import json

import pytest
import tiny
import torch
import toy
from safetensors.torch import load_file
from transformers import TrainerCallback

from hfft.errors import ModelError, TrainingError
from hfft.recipe.augment import AugmentSpec
from hfft.recipe.spec import PhaseSpec, ReplaySpec
from hfft.runs.record import PhaseRecord
from hfft.training.logistic import head_path
from hfft.training.phase_data import PhaseRun
from hfft.training.phases import run_phase
from hfft.training.plan import prepare_phase
from hfft.training.solved_head import WEIGHT_DECAYS, solvable_head

REPLAY = ReplaySpec(mode="force", engine="torch")


def run(folder, *, family="vit", data=None, augment=None, callbacks=(), replay=REPLAY, **phase):
    spec = PhaseSpec(name="p", **{"arguments": {"dataloader_num_workers": 0}, **phase})
    feeding = None if replay is None else toy.replay_of(replay, folder.parent / "recordings", [spec], augment)
    data = data or toy.phase_data()
    one = PhaseRun(number=0, spec=spec, folder=folder, title="test", seed=0)
    return run_phase(tiny.build(family), one, data, replay=feeding, callbacks=callbacks)


def history(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


class Events(TrainerCallback):
    """What a user's callback hears."""

    def __init__(self):
        self.heard = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.heard.append("begin")

    def on_evaluate(self, args, state, control, **kwargs):
        self.heard.append(state.global_step)

    def on_save(self, args, state, control, **kwargs):
        self.heard.append("save")

    def on_train_end(self, args, state, control, **kwargs):
        self.heard.append("end")


def test_a_solved_phase_is_a_phase_like_others(tmp_path):
    before = tiny.build("vit").state_dict()
    events = Events()
    model, result = run(tmp_path / "p", callbacks=[events])
    steps = list(range(1, result.steps + 1))
    assert events.heard == ["begin", *steps, "save", "end"]
    entries = [entry for entry in history(tmp_path / "p") if "weight_decay" in entry]
    assert [entry["weight_decay"] for entry in entries] == list(WEIGHT_DECAYS[: result.steps])
    assert result.steps in (result.best_step + 3, len(WEIGHT_DECAYS))  # weaker ones are not tried after three worse
    scores = [(entry["eval_accuracy"], -entry["eval_log_loss"]) for entry in entries]
    assert result.best_step == 1 + scores.index(max(scores))
    assert result.metrics["accuracy"] == max(scores)[0]
    assert result.checkpoint == f"checkpoint-{result.best_step}"
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    assert result.frozen["changed"] == 0
    stored = load_file(tmp_path / "p" / result.checkpoint / "model.safetensors")
    assert torch.equal(stored["classifier.weight"], model.classifier.weight)
    plan = PhaseRecord(tmp_path / "p").plan
    assert (plan.solver, plan.steps, plan.groups) == ("lbfgs", len(WEIGHT_DECAYS), ())


def test_it_is_the_head_of_least_loss(tmp_path):
    data = toy.phase_data()
    model, result = run(tmp_path / "p", data=data)
    network = tiny.build("vit").eval()
    entering = []
    network.classifier.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    with torch.no_grad():
        for row in range(len(data.train)):
            network(pixel_values=data.floats(data.train[row]["pixel_values"][None]))
    decay = WEIGHT_DECAYS[: result.best_step]
    *_, head = head_path(torch.cat(entering), torch.tensor(data.train.labels), classes=2, weight_decays=decay)
    torch.testing.assert_close(model.classifier.weight.double(), head.weight, atol=1e-3, rtol=1e-3)


def test_a_phase_that_was_killed_is_solved_again_to_the_same_bits(tmp_path):
    class Killed(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    expected, _ = run(tmp_path / "whole" / "p")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed" / "p", callbacks=[Killed()])
    assert not list((tmp_path / "killed" / "p").glob("checkpoint-*"))
    model, _ = run(tmp_path / "killed" / "p")
    again, _ = run(tmp_path / "killed" / "p")  # finished
    for one in (model, again):
        assert all(torch.equal(value, one.state_dict()[name]) for name, value in expected.state_dict().items())


def test_views_are_rows_of_their_own(tmp_path):
    augment = AugmentSpec(flip="both")
    answers = []
    for views in (1, 3):
        replay = ReplaySpec(mode="force", engine="torch", views=views)
        folder = tmp_path / str(views) / "p"
        answers.append(run(folder, data=toy.phase_data(augment=augment), augment=augment, replay=replay)[0])
    assert not torch.equal(answers[0].classifier.weight, answers[1].classifier.weight)


def test_without_validation_folds_choose(tmp_path):
    _, result = run(tmp_path / "p", data=toy.phase_data(validation=0))
    entries = [entry for entry in history(tmp_path / "p") if "weight_decay" in entry]
    scores = [(entry["folds_accuracy"], -entry["folds_log_loss"]) for entry in entries]
    assert result.best_step == 1 + scores.index(max(scores))
    assert result.metrics == {}


@pytest.mark.parametrize("solver", ["auto", "lbfgs"])
def test_what_is_not_recorded_takes_steps_or_is_refused(solver, tmp_path):
    if solver == "lbfgs":
        with pytest.raises(TrainingError, match="solver: lbfgs: nothing is replayed"):
            run(tmp_path / "p", replay=None, solver=solver)
    else:
        _, result = run(tmp_path / "p", replay=None, solver=solver)
        assert result.steps == 3 * 3  # of the Trainer's defaults


def test_a_head_of_several_layers_takes_steps_or_is_refused(tmp_path):
    model = prepare_phase(tiny.build("swiftformer"), PhaseSpec(name="p"))
    assert solvable_head(model) is None
    with pytest.raises(ModelError, match="solver: lbfgs"):
        run(tmp_path / "p", family="swiftformer", solver="lbfgs")


@pytest.mark.parametrize("family", ["mobilenet_v2", "dinov2", "resnet", "timm_wrapper"])
def test_heads_behind_dropout_and_pooling(family, tmp_path):
    _, result = run(tmp_path / "p", family=family)
    assert PhaseRecord(tmp_path / "p").plan.solver == "lbfgs"
    assert result.frozen["changed"] == 0


def test_keys_about_steps_take_steps(tmp_path):
    model, result = run(tmp_path / "p", arguments={"dataloader_num_workers": 0, "learning_rate": 1e-2})
    same, _ = run(tmp_path / "q", solver="steps", arguments={"dataloader_num_workers": 0, "learning_rate": 1e-2})
    assert result.steps == 3 * 3
    assert torch.equal(model.classifier.weight, same.classifier.weight)
