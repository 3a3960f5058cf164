"""`report_to`: the phases of a run are one experiment."""

import signal
import subprocess
import sys

import pytest
import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import hfft
from hfft.cli import main
from hfft.training.reporting import flat

RECIPE = """
name: bugs
model: {checkpoint: vit}
data: {source: photos}
training:
  {report_to: tensorboard, per_device_train_batch_size: 4, dataloader_num_workers: 0, num_train_epochs: 2,
  logging_steps: 2, disable_tqdm: true}
precision: float32
report: false
phases:
  - {name: head, unfreeze: head, learning_rate: 1.0e-2}
  - {name: last, unfreeze: {blocks: 2}, learning_rate: 1.0e-3}
"""
SPLITS = {f"{split}/{name}": 8 for split in ("train", "validation", "test") for name in ("ant", "bee", "cat")}
STEPS = 24 // 4 * 2  # of a phase


@pytest.fixture
def workplace(tmp_path, photos, monkeypatch):
    photos(SPLITS)
    tiny.save(tmp_path / "vit", "vit")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    return tmp_path


def steps_in(folder):
    """Scalar name to the steps that its files hold, in order, each as often as it was written."""
    found = {}
    for path in sorted(folder.glob("events.*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.HasField("tensor") and value.metadata.plugin_data.plugin_name == "scalars":
                    found.setdefault(value.tag, []).append(event.step)
    return found


def assert_whole_board(folder):
    """Both phases side by side, steps going on, nothing twice."""
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"0-head", "1-last"}
    for number, phase in enumerate(("0-head", "1-last")):
        steps = steps_in(folder / phase)
        begin = number * STEPS
        assert steps["train/loss"] == [begin + step for step in (2, 4, 6, 8, 10, 12)]
        assert steps["eval/accuracy"] == steps["eval/macro_f1"] == [begin + 6, begin + 12]
        assert steps["train/train_runtime"] == [begin + 12]
        assert len(list((folder / phase).iterdir())) == 1


def test_tensorboard_has_phases_side_by_side_and_the_result(workplace):
    assert main(["train", "recipe.yaml"]) == 0
    board = workplace / "runs/bugs/tensorboard"
    assert_whole_board(board)
    run = hfft.Run("runs/bugs")
    result = EventAccumulator(str(board)).Reload()
    for split in ("validation", "test"):
        (accuracy,) = result.Scalars(f"{split}/accuracy")
        assert accuracy.step == 2 * STEPS
        assert accuracy.value == pytest.approx(run.metrics[split]["accuracy"]["value"])
    hyperparameters = result.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    for name in (b"phases.head.learning_rate", b"training.num_train_epochs", b"model.checkpoint"):
        assert hyperparameters.count(name) == 1
    assert not list((workplace / "runs/bugs").glob("*-*/runs"))  # the Trainer's own place


KILLED = """
import os, signal
from transformers import TrainerCallback
import hfft

class Killer(TrainerCallback):
    def on_log(self, args, state, control, **kwargs):
        if args.output_dir.endswith("1-last") and state.global_step == 10:
            os.kill(os.getpid(), signal.SIGKILL)

hfft.finetune(hfft.load_recipe("recipe.yaml"), callbacks=[Killer()])
"""


def test_a_killed_run_goes_on_in_the_same_curves(workplace):
    killed = subprocess.run([sys.executable, "-c", KILLED], check=False)  # when step 6 was the last that was saved
    assert killed.returncode == -signal.SIGKILL
    before = steps_in(workplace / "runs/bugs/tensorboard/1-last")["train/loss"]
    assert before[:4] == [STEPS + 2, STEPS + 4, STEPS + 6, STEPS + 8]
    assert main(["train", "recipe.yaml"]) == 0
    assert_whole_board(workplace / "runs/bugs/tensorboard")


def test_a_finished_run_says_nothing_more(workplace):
    assert main(["train", "recipe.yaml"]) == 0
    before = sorted((path, path.stat().st_mtime_ns) for path in (workplace / "runs/bugs/tensorboard").rglob("*"))
    assert main(["train", "recipe.yaml"]) == 0
    after = sorted((path, path.stat().st_mtime_ns) for path in (workplace / "runs/bugs/tensorboard").rglob("*"))
    assert after == before


class Notes(TrainerCallback):
    """An integration that keeps what it was told."""

    told: list

    def on_train_begin(self, args, state, control, **kwargs):
        self.told.append(("begin", args.run_name))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.told.append((state.global_step, logs))

    def on_train_end(self, args, state, control, **kwargs):
        self.told.append(("end", args.run_name))


@pytest.fixture
def notes(monkeypatch):
    Notes.told = []
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "notes", Notes)
    return Notes.told


def test_other_integrations_see_one_experiment(workplace, notes):
    assert main(["train", "recipe.yaml", "training.report_to=notes"]) == 0
    assert notes[0] == ("begin", "bugs")
    assert notes[-1] == ("end", "bugs")
    assert [name for name, _ in notes].count("begin") == 1
    losses = [(step, logs["phase"]) for step, logs in notes[1:-1] if "loss" in logs]
    assert losses == [(step, 1 + (step > STEPS)) for step in range(2, 2 * STEPS + 1, 2)]
    step, result = notes[-2]
    assert step == 2 * STEPS
    assert result["test_accuracy"] == hfft.Run("runs/bugs").metrics["test"]["accuracy"]["value"]


def test_what_was_sent_is_not_sent_again(workplace, notes):
    class Stop(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            if args.output_dir.endswith("1-last") and state.global_step == 10:
                raise KeyboardInterrupt

    recipe = hfft.load_recipe("recipe.yaml", ["training.report_to=notes"])
    with pytest.raises(KeyboardInterrupt):
        hfft.finetune(recipe, callbacks=[Stop()])
    hfft.finetune(recipe)
    for kind in ("loss", "eval_accuracy", "train_runtime"):
        steps = [step for step, logs in notes if isinstance(logs, dict) and kind in logs]
        assert steps == sorted(set(steps)), kind
        assert steps[-1] == 2 * STEPS


def test_an_integration_that_fails_later_is_left_alone(workplace, notes, monkeypatch, capsys):
    def fail(self, *args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(Notes, "on_log", fail)
    assert main(["train", "recipe.yaml", "training.report_to=notes"]) == 0
    assert capsys.readouterr().err.count("report_to: notes fails and gets nothing more: no network") == 1


def test_an_integration_that_can_not_begin_ends_the_run_with_a_line(workplace, notes, monkeypatch, capsys):
    def fail(self, *args, **kwargs):
        raise ConnectionError("no account")

    monkeypatch.setattr(Notes, "on_train_begin", fail)
    assert main(["train", "recipe.yaml", "training.report_to=notes"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: training.report_to: notes: no account; ")


@pytest.mark.parametrize("verb", ["plan", "train"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.report_to=tensorbord",
            "found 'tensorbord'; did you mean 'tensorboard'?; allowed: none, all, ",
        ),
        ("training.report_to=[tensorboard, codecarbon]", "codecarbon: CodeCarbonCallback requires"),
        ("phases.head.report_to=none", "phases.head.report_to: all phases are one experiment"),
    ],
)
def test_what_can_not_be_reported_to_is_one_error_before_anything(workplace, capsys, verb, override, message):
    assert main([verb, "recipe.yaml", override]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "report_to" in line]
    assert message in line
    assert not (workplace / "runs/bugs").exists()


def test_nested_values_are_flattened():
    content = {"a": {"b": 1, "c": [1, 2]}, "phases": [{"name": "head", "rate": 0.5, "deep": {"x": None}}], "d": True}
    assert dict(flat(content)) == {
        "a.b": 1,
        "a.c": "[1, 2]",
        "phases.head.rate": 0.5,
        "phases.head.deep.x": "None",
        "d": True,
    }
