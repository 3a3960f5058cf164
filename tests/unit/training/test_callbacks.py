import logging
import time

import pytest
import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from hfft.training import callbacks
from hfft.training.callbacks import PhaseProgress

TITLE = "phase 1/2 head"


class Images(torch.utils.data.Dataset):
    """Eight images, each of which takes `seconds`."""

    def __init__(self, wait, seconds):
        self.wait = wait
        self.seconds = seconds

    def __len__(self):
        return 8

    def __getitem__(self, index):
        self.wait(self.seconds)
        return {"pixel_values": torch.tensor([float(index)]), "labels": 0}


class Network(torch.nn.Module):
    """A forward pass takes `seconds`."""

    def __init__(self, wait, seconds):
        super().__init__()
        self.layer = torch.nn.Linear(1, 2)
        self.wait = wait
        self.seconds = seconds

    def forward(self, pixel_values, labels):
        self.wait(self.seconds)
        logits = self.layer(pixel_values)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


class Slow(TrainerCallback):
    """Another's callback that takes its time."""

    def __init__(self, wait):
        self.wait = wait

    def on_log(self, args, state, control, **kwargs):
        self.wait(7)

    def on_evaluate(self, args, state, control, **kwargs):
        self.wait(9)


class SlowToSave(Trainer):
    wait = staticmethod(time.sleep)

    def _save_checkpoint(self, model, trial):
        self.wait(20)


@pytest.fixture
def lines(tmp_path, caplog):
    """Lines of a training of 8 images in batches of 2, where an image and a forward pass take some seconds."""

    def train(wait, image, forward, trainer_class=Trainer, others=(), **arguments):
        settings = {"num_train_epochs": 2, "eval_strategy": "epoch", "save_strategy": "no", "logging_steps": 1}
        trainer = trainer_class(
            Network(wait, forward),
            TrainingArguments(
                output_dir=str(tmp_path),
                per_device_train_batch_size=2,
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                **{**settings, **arguments},
            ),
            train_dataset=Images(wait, image),
            eval_dataset=Images(wait, image),
            compute_metrics=lambda _: {"accuracy": 0.5, "macro_f1": 0.25},
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        for callback in (*others, PhaseProgress(TITLE, images=8)):
            trainer.add_callback(callback)
        with caplog.at_level(logging.INFO, "hfft"):
            trainer.train()
        found = [record.getMessage().removeprefix("[RANK 0] ") for record in caplog.records]
        return [line for line in found if line.startswith(TITLE)]

    return train


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on only when it is told to: `wait(seconds)`."""
    now = [1000.0]

    def wait(seconds):
        now[0] += seconds

    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])
    return wait


def speeds(lines):
    return [line.partition(" on validation")[2] for line in lines]


def test_a_line_says_how_an_evaluation_went(clock, lines):
    first, second = lines(clock, 0.01, 0.06)
    assert first.startswith("phase 1/2 head: epoch 1 of 2, loss ")
    assert second.startswith("phase 1/2 head: epoch 2 of 2, loss ")
    assert ", accuracy 0.5000, macro F1 0.2500 on validation, " in first


@pytest.mark.parametrize(
    ("image", "forward", "expected"),
    [
        (0.01, 0.06, ", 25 images/s, 25 % waiting for data"),  # 8 images in 8 * 0.01 + 4 * 0.06 = 0.32 s
        (0.00, 0.04, ", 50 images/s, 0 % waiting for data"),
        (0.02, 0.00, ", 50 images/s, 100 % waiting for data"),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_speed_of_every_epoch(clock, lines, image, forward, expected, accumulate):
    found = speeds(lines(clock, image, forward, gradient_accumulation_steps=accumulate))
    assert found == [expected] * 2


@pytest.mark.parametrize("save", ["steps", "no"])
def test_evaluating_logging_and_saving_do_not_count(clock, lines, monkeypatch, save):
    monkeypatch.setattr(SlowToSave, "wait", staticmethod(clock))
    arguments = {"save_strategy": save, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
    found = speeds(lines(clock, 0.01, 0.06, trainer_class=SlowToSave, others=[Slow(clock)], **arguments))
    assert len(found) == 4
    # 0.32 s in each epoch; Accelerate fetches a batch ahead, so the first line of an epoch waits for 6 of its images
    assert found == [", 22 images/s, 33 % waiting for data", ", 29 images/s, 14 % waiting for data"] * 2


def test_an_evaluation_before_the_first_step_has_no_speed(clock, lines):
    assert speeds(lines(clock, 0.01, 0.06, eval_on_start=True))[0] == ""


@pytest.mark.parametrize(("image", "forward", "waits"), [(0.04, 0, True), (0, 0.08, False)])
def test_time_that_really_passes(lines, image, forward, waits):
    found = speeds(lines(time.sleep, image, forward))
    shares = [int(speed.split(", ")[2].removesuffix(" % waiting for data")) for speed in found]
    assert [share > 50 for share in shares] == [waits] * 2
