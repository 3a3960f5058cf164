"""What torch and the system raise while a phase trains, as one line that says what to do."""

import pytest
import tiny
import torch
import toy
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainingArguments

from hfft.errors import TrainingError
from hfft.training.failures import Diverged, EvaluationOutOfMemory, failures_explained, smaller_batch
from hfft.training.trainer import PhaseTrainer


def message(error, tmp_path, **arguments):
    settings = TrainingArguments(str(tmp_path), use_cpu=True, **arguments)
    with pytest.raises(TrainingError) as caught, failures_explained("phase 1/1 p", settings):
        raise error
    assert str(caught.value).startswith("phase 1/1 p: ")
    return str(caught.value)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory with per_device_train_batch_size=12"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory with"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out of memory"),
        (torch.AcceleratorError("CUDA error: out of memory"), "out of memory with"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "fewer dataloader_num_workers"),
        (RuntimeError("[enforce fail at inline_container.cc] . failed writing file"), "disk full?"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on device"),
        (EvaluationOutOfMemory(), "out of memory in an evaluation with per_device_eval_batch_size=8; "),
        (ValueError("Expected more than 1 value per channel when training, got input"), "a batch has one image"),
        (Diverged("the loss is nan at step 7, learning rate 0.1"), "the loss is nan at step 7, learning rate 0.1"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_in_words(error, words, tmp_path):
    assert words in message(error, tmp_path, per_device_train_batch_size=12)


def test_outside_of_a_phase():
    words = "result: out of memory; a smaller per_device_eval_batch_size"
    with pytest.raises(TrainingError, match=words), failures_explained("result"):
        raise torch.OutOfMemoryError


def test_an_error_of_the_program_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="mat1 and mat2"), failures_explained("p", TrainingArguments(str(tmp_path))):
        torch.ones(1, 2) @ torch.ones(3, 1)


def test_advice_for_too_little_memory_keeps_the_global_batch(tmp_path):
    found = message(
        torch.OutOfMemoryError(""), tmp_path, per_device_train_batch_size=12, gradient_accumulation_steps=3
    )
    assert "per_device_train_batch_size=6 with gradient_accumulation_steps=6, or bf16" in found
    assert smaller_batch(15, 2) == {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 6}
    assert smaller_batch(1, 8) is None
    assert "less is needed by bf16" in message(torch.OutOfMemoryError(""), tmp_path, per_device_train_batch_size=1)


class Spoil(TrainerCallback):
    """Makes a weight infinite after a step: what a learning rate that is too large ends in."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            with torch.no_grad():
                next(value for value in model.parameters() if value.requires_grad).fill_(torch.inf)


def test_a_loss_that_is_no_number_ends_the_phase_and_keeps_the_checkpoint_before(tmp_path):
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step 5, .*A smaller learning_rate"):
        toy.run(tiny.build("vit"), tmp_path, unfreeze="all", callbacks=[Spoil(4)])
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    data = toy.phase_data(validation=0)
    with pytest.raises(TrainingError, match="after step 6"):
        toy.run(tiny.build("vit"), tmp_path, data=data, unfreeze="all", callbacks=[Spoil(6)])
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


@pytest.fixture
def too_small(monkeypatch):
    """A device that holds four images at once; the sizes that were tried."""
    tried = []
    step = PhaseTrainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        tried.append(len(inputs["pixel_values"]))
        if tried[-1] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PhaseTrainer, "training_step", training_step)
    return tried


def test_auto_find_batch_size_trains_the_same_in_smaller_passes(too_small, tmp_path):
    arguments = {"per_device_train_batch_size": 12, "optim": "sgd", "learning_rate": 0.1}
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with pytest.raises(TrainingError, match="out of memory"):
        toy.run(tiny.build("vit", **changes), tmp_path / "not asked", unfreeze="all", arguments=arguments)
    found, result = toy.run(
        tiny.build("vit", **changes),
        tmp_path / "found",
        unfreeze="all",
        arguments={**arguments, "auto_find_batch_size": True},
    )
    assert too_small[1:] == [12, 6, *[3] * 16]
    small = {**arguments, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
    expected, same = toy.run(tiny.build("vit", **changes), tmp_path / "small", unfreeze="all", arguments=small)
    assert result.steps == same.steps == 4
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)


class LacksMemoryToEvaluate(TrainerCallback):
    def on_prediction_step(self, args, state, control, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_memory_that_an_evaluation_lacks_is_not_the_training_batchs(tmp_path):
    arguments = {"auto_find_batch_size": True, "per_device_eval_batch_size": 12}
    with pytest.raises(TrainingError, match=r"per_device_eval_batch_size=12; .*=6"):
        toy.run(tiny.build("vit"), tmp_path / "0", callbacks=[LacksMemoryToEvaluate()], arguments=arguments)
