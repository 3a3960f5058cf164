"""Which way this launch spreads a phase over its processes: FSDP 2, DeepSpeed ZeRO-2, or not at all."""

from typing import Any

from transformers import TrainingArguments

from hfft.errors import RecipeError
from hfft.system.launch import is_deepspeed_asked, is_fsdp_asked, spread_by
from hfft.training.sharding import Shards
from hfft.training.zero import Partitions

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
"""What was tried on parts of weights; others look at a whole one, as Adafactor does."""
_REFUSED = {
    "fp16": "its gradient scaler was not tried there; use bf16",
    "torch_compile": "it was not tried there",
}


def shards_of(model: Any, arguments: TrainingArguments) -> Shards | None:
    """The network apart from its whole copy where this launch spreads it, or what it is trained with; else None.

    Args:
        model: As `prepare_phase` left it.
        arguments: Of the phase.
    """
    if is_deepspeed_asked():
        return Partitions(model, arguments)
    return Shards(model) if is_fsdp_asked() else None


def check_spreadable(phase: str, arguments: TrainingArguments) -> None:
    """Refuse settings of a phase that don't go with FSDP or DeepSpeed, where this launch is one of them.

    Raises:
        RecipeError: With the setting and what to use instead.
    """
    where = spread_by()
    if where is None:
        return
    for name, reason in _REFUSED.items():
        if getattr(arguments, name):
            raise RecipeError(f"phases.{phase}.{name}: not under {where}: {reason}")
    kind = str(getattr(arguments.optim, "value", arguments.optim))
    if kind not in OPTIMIZERS:
        raise RecipeError(f"phases.{phase}.optim: found {kind!r}; allowed under {where}: {', '.join(OPTIMIZERS)}")
