"""Adapter folders that hfft wrote: what they sit on, wherever they were moved to, and how they are put on it."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from hfft.errors import RecipeError
from hfft.model.locating import GIVEN
from hfft.recipe.loading import read_recipe
from hfft.recipe.spec import ModelSpec
from hfft.system.files import read_json


def holds_adapter(checkpoint: str) -> bool:
    """Whether a checkpoint is a folder with an adapter, and no weights of its own."""
    return (Path(checkpoint) / ADAPTER_CONFIG_NAME).is_file()


def adapter_base(folder: Path, *, trust_remote_code: bool) -> ModelSpec:
    """What an adapter sits on: a checkpoint, or weights of the run that it lies in, which may have been moved.

    Args:
        folder: Of the adapter.
        trust_remote_code: As the result has it.
    """
    content = read_json(folder / ADAPTER_CONFIG_NAME)
    name = content["base_model_name_or_path"]
    own = _weights_beside(folder, Path(name))
    return ModelSpec(
        checkpoint=name if own is None else str(own),
        revision=content.get("revision"),
        trust_remote_code=trust_remote_code,
    )


def load_on_base(
    spec: ModelSpec, config: Any, load_body: Callable[[ModelSpec, Any], PreTrainedModel]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The network of a config with an adapter folder's weights, added to what they sit on, as far as they fit.

    Args:
        spec: Its checkpoint is the folder.
        config: Of the network that is wanted.
        load_body: Makes a network of a config with a checkpoint's weights.

    Returns:
        The network, and what was missing or didn't fit.
    """
    folder = Path(spec.checkpoint)
    own = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    merged = put_adapter(load_body(adapter_base(folder, trust_remote_code=spec.trust_remote_code), own), folder)
    return type(merged).from_pretrained(
        None,
        config=config,
        state_dict=merged.state_dict(),
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        dtype=torch.float32,
    )


def put_adapter(model: Any, folder: Path) -> Any:
    """A plain model with an adapter's update added to its weights, and the adapter's head."""
    from peft import PeftModel

    with without_peft_warning():
        adapted: Any = PeftModel.from_pretrained(model, str(folder))
    return adapted.merge_and_unload()


@contextmanager
def without_peft_warning() -> Iterator[None]:
    """PEFT 0.21 reads a property that transformers 5.23 has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _weights_beside(folder: Path, base: Path) -> Path | None:
    """Weights in the adapter's own run that its absolute base names; None where it sits on something else.

    By the recipe: an adapter sits on the phase before it, unless head phases alone came before.
    """
    run = folder.absolute().parent
    if not base.is_absolute() or not (run / "recipe.yaml").is_file():
        return None
    if base.name == GIVEN and (run / GIVEN).is_dir():
        return run / GIVEN
    try:
        phases = read_recipe(run).phases
    except RecipeError:  # of another version of hfft
        return None
    for number in range(1, len(phases)):
        before, own = phases[:number], run / f"{number - 1}-{phases[number - 1].name}" / base.name
        sits_on_it = phases[number].adapter is not None and not all(phase.trains_head_alone for phase in before)
        if sits_on_it and base.parent.name == own.parent.name and own.is_dir():
            return own
    return None
