"""Activations computed again in the backward pass (`gradient_checkpointing`): less memory, the same gradients."""

from collections.abc import Mapping
from typing import Any

from hfft.errors import ModelError, first_line

_SWITCHES = ("activation_checkpointing", "gradient_checkpointing")
_EXACT = {"use_reentrant": False, "preserve_rng_state": True}
"""Of torch.utils.checkpoint. The reentrant way gives no gradient where what enters a block has none, as behind a
frozen front; without the state of the random generator, dropout is another one when a block is computed again."""


def check_recomputation(network: Any, arguments: Mapping[str, Any]) -> None:
    """Check that a network can do it, where a phase asks for it.

    Args:
        network: Is changed: it does so from then on.
        arguments: Of the phase.

    Raises:
        ModelError: If its family can't.
    """
    asked = next((name for name in _SWITCHES if arguments.get(name)), None)
    if asked is None:
        return
    enable = getattr(network, "activation_checkpointing_enable", network.gradient_checkpointing_enable)
    try:
        enable()
    except (ValueError, AssertionError, NotImplementedError, AttributeError) as error:
        raise ModelError(
            f"{asked}: the architecture {network.config.model_type} can't ({first_line(error).rstrip('.')}); leave it "
            "out, and take a smaller batch with gradient_accumulation_steps where memory is short"
        ) from error


def end_recomputation(network: Any) -> None:
    """Undo what an earlier phase's Trainer has switched on.

    Args:
        network: Plain.
    """
    if getattr(network, "supports_gradient_checkpointing", False):
        getattr(network, "activation_checkpointing_disable", network.gradient_checkpointing_disable)()


def exact_recomputation(options: Mapping[str, Any] | None) -> tuple[dict[str, Any], list[str]]:
    """Options of torch's checkpoint with those that would change a gradient set back.

    Args:
        options: `activation_checkpointing_kwargs`.

    Returns:
        The options, and what was changed, for example `use_reentrant: false`.
    """
    asked = dict(options or {})
    changed = {key: value for key, value in _EXACT.items() if asked.get(key, value) != value}
    return {**asked, **_EXACT}, [f"{key}: {str(value).lower()}" for key, value in changed.items()]
