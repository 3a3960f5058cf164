"""What goes wrong while a run computes and writes, in words that say what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError
from transformers import TrainingArguments

from hfft.data.images.batches import worker_deaths_explained
from hfft.errors import TrainingError

_CONTINUES = "the same command continues from the last whole checkpoint"
# Of torch on a CPU; of CUDA and its libraries, where it isn't torch that asks for memory.
_NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
ONE_VALUE = "Expected more than 1 value per channel"
"""Of torch, where a BatchNorm trains on a batch of one image."""
_NO_SPACE = ("failed writing file", "iostream error", "unexpected pos")  # of torch.save, which hides the cause


class Diverged(Exception):
    """Loss or weights that are no numbers any more; says where."""


class EvaluationOutOfMemory(Exception):
    """Memory ran out while validation images were measured, and not in a training step."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a forward or backward pass found too little memory, on a device or a CPU."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


@contextmanager
def failures_explained(title: str, arguments: TrainingArguments | None = None) -> Iterator[None]:
    """Raise a TrainingError that says what to do in the place of what torch or the system raise.

    Args:
        title: Of the phase, or what else is done.
        arguments: Of the phase.
    """
    try:
        with worker_deaths_explained(title, f"fewer dataloader_num_workers need less, and {_CONTINUES}"):
            yield
    except (Diverged, EvaluationOutOfMemory, OSError, SafetensorError, ValueError, RuntimeError) as error:
        explanation = _explanation(error, arguments)
        if explanation is None:
            raise
        raise TrainingError(f"{title}: {explanation}") from error


def smaller_batch(batch: int, accumulated: int) -> dict[str, int] | None:
    """Arguments for smaller forward passes and the same optimizer steps; None where there is nothing smaller.

    Args:
        batch: Images per forward pass.
        accumulated: Forward passes per step.
    """
    if batch == 1:
        return None
    smaller = max(size for size in range(1, batch) if batch % size == 0)
    return {"per_device_train_batch_size": smaller, "gradient_accumulation_steps": accumulated * batch // smaller}


def _explanation(error: Exception, arguments: TrainingArguments | None) -> str | None:
    text = str(error)
    if isinstance(error, Diverged):
        help_ = "A smaller learning_rate, warmup_steps or a smaller max_grad_norm help"
        return f"{error}; the checkpoints saved before are kept. {help_}, with --overwrite or another name"
    if isinstance(error, OSError | SafetensorError):
        return f"{error}; {_CONTINUES}"
    if isinstance(error, EvaluationOutOfMemory) or (is_out_of_memory(error) and arguments is None):
        return _evaluation_advice(arguments)
    if is_out_of_memory(error) and arguments is not None:
        batch = arguments.per_device_train_batch_size
        smaller = smaller_batch(batch, arguments.gradient_accumulation_steps)
        words = [] if smaller is None else [" with ".join(f"{name}={value}" for name, value in smaller.items())]
        less = ", or ".join([*words, "bf16 or activation_checkpointing"])
        return f"out of memory with per_device_train_batch_size={batch}; less is needed by {less}"
    if "DebugUnderflowOverflow" in text:
        return "debug: a module computed numbers that are infinite or none; it is named in what was printed"
    if ONE_VALUE in text:
        advice = "set dataloader_drop_last: true, or another per_device_train_batch_size"
        return f"a batch has one image, and BatchNorm that trains needs two; {advice}"
    if any(words in text for words in _NO_SPACE):
        return f"weights can't be written; is the disk full? {_CONTINUES}"
    return None


def _evaluation_advice(arguments: TrainingArguments | None) -> str:
    if arguments is None:
        return f"out of memory; a smaller per_device_eval_batch_size needs less, and {_CONTINUES}"
    batch = arguments.per_device_eval_batch_size
    less = f"per_device_eval_batch_size={batch // 2}" if batch > 1 else "eval_accumulation_steps=1"
    where = f"in an evaluation with per_device_eval_batch_size={batch}"
    return f"out of memory {where}; {less} needs less, and {_CONTINUES}"
