"""Adapter folders that hfft wrote: what they sit on, wherever they were moved to, and how they are put on it."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from hfft.recipe.spec import ModelSpec
from hfft.runs.locating import adapter_base


def holds_adapter(checkpoint: str) -> bool:
    """Whether a checkpoint is a folder with an adapter, and no weights of its own."""
    return (Path(checkpoint) / ADAPTER_CONFIG_NAME).is_file()


def base_spec(folder: Path, *, trust_remote_code: bool) -> ModelSpec:
    """What an adapter folder sits on, as a recipe's model section."""
    checkpoint, revision = adapter_base(folder)
    return ModelSpec(checkpoint=checkpoint, revision=revision, trust_remote_code=trust_remote_code)


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
    merged = put_adapter(load_body(base_spec(folder, trust_remote_code=spec.trust_remote_code), own), folder)
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
