"""What the variables of `accelerate launch` ask for and recipes have keys for: the recipe counts, or it is refused."""

import os
from collections.abc import Sequence

import torch
from accelerate.logging import get_logger

from hfft.errors import RunError
from hfft.recipe.spec import PhaseSpec

_PRECISION = "ACCELERATE_MIXED_PRECISION"
_NAMES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
_UNTRIED = "it was never tried"
# Variable -> what is allowed, the launcher's option, what to do.
_REFUSED: dict[str, tuple[tuple[str, ...], str, str]] = {
    _PRECISION: (tuple(_NAMES), "mixed_precision", "the recipe's precision counts"),
    "ACCELERATE_DYNAMO_BACKEND": (("no",), "dynamo_backend", "training.torch_compile compiles"),
    "ACCELERATE_DYNAMO_MODE": (("default", "none"), "dynamo_mode", "training.torch_compile_mode says so"),
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": (("false",), "dynamo_use_fullgraph", _UNTRIED),
    "ACCELERATE_DYNAMO_USE_DYNAMIC": (("false",), "dynamo_use_dynamic", _UNTRIED),
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": (("false",), "dynamo_use_regional_compilation", _UNTRIED),
    "ACCELERATE_USE_MEGATRON_LM": (("false",), "use_megatron_lm", "it is for language models"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (("false",), "use_parallelism_config", "images are shared, and no layers"),
}

_LOG = get_logger(__name__)


def check_launched(phases: Sequence[PhaseSpec]) -> None:
    """Refuse what this launch asks of accelerate that would silently count more than the recipe.

    Mixed precision doesn't, and where phases train in another one that is told.

    Args:
        phases: As they run.

    Raises:
        RunError: With the launcher's option, what is allowed and what to do instead.
    """
    for variable, (allowed, option, advice) in _REFUSED.items():
        found = os.environ.get(variable) or allowed[0]
        if found.lower() not in allowed:
            raise RunError(
                f"{option} ({variable}): found {found}; allowed: {', '.join(allowed)}; {advice}. "
                "Leave it out of the launch or of accelerate's config file"
            )
    asks_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")
    if asks_cpu and torch.accelerator.is_available():
        raise RunError(
            "cpu (ACCELERATE_USE_CPU): the launch asks for the CPU, and this process sees an accelerator, which hfft "
            "trains on; hide it, as with CUDA_VISIBLE_DEVICES=''"
        )
    asked = (os.environ.get(_PRECISION) or "no").lower()
    others = [phase for phase in phases if phase.precision != _NAMES[asked]]
    if asked != "no" and others:
        told = ", ".join(f"{phase.name} trains in {phase.precision}" for phase in others)
        _LOG.warning(
            f"mixed_precision ({_PRECISION}): the launch asks for {asked}, and the recipe counts: {told}; "
            "precision=bfloat16 or training.fp16=true change it"
        )
