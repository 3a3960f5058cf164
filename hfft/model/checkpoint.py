"""A checkpoint -> a model with a new head and its image processor; and back to a folder that anything can open."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from hfft.errors import ModelError, first_line
from hfft.model.anatomy import dissect, head_modules
from hfft.model.config import (
    UNUSABLE,
    check_exists,
    load_config,
    load_processor,
    quiet,
    read_config,
    sample_pixels,
    set_image_size,
    unusable,
)
from hfft.model.remote_code import check_code, name_own_class
from hfft.recipe.spec import ModelSpec
from hfft.runs.locating import adapter_base
from hfft.system.files import write_folder

_HEAD_STD = 0.02


def load_checkpoint(
    spec: ModelSpec, labels: Sequence[str], *, is_multi_label: bool = False
) -> tuple[PreTrainedModel, Any]:
    """Load a pretrained classifier with a new head for these labels, and its image processor.

    Returns:
        The model on the CPU, in evaluation mode, float32, and the processor.

    Raises:
        ModelError: If it can't be loaded, weights other than the head's are missing or don't fit, or its output for
            one image isn't one number per label.
    """
    config = load_config(spec, labels, is_multi_label=is_multi_label)
    processor = load_processor(spec, config)
    model = load_body(spec, config)
    _renew_head(model, spec.head)
    set_memory_format(model, spec.memory_format)
    _probe(model.eval(), processor, spec)
    return model, processor


def set_memory_format(model: nn.Module, memory_format: str) -> None:
    """Order the weights in memory: `channels_last`, `contiguous`, or for `auto` the first in convolutional networks.

    A network with one convolution, as vision transformers have for their patches, gains nothing by it.
    """
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    if memory_format == "channels_last" or (memory_format == "auto" and convolutions > 1):
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def load_body(spec: ModelSpec, config: Any) -> PreTrainedModel:
    """The network of a config with the checkpoint's weights, all but the head's.

    Raises:
        ModelError: If it can't be loaded, or weights other than the head's are missing or don't fit.
    """
    model, report = _load(spec, config)
    head = set(dissect(model).part("head").tensors)
    mismatched = {entry[0] for entry in report["mismatched_keys"]} - head
    if mismatched:
        size = f" at image_size {spec.image_size}" if spec.image_size else ""
        raise ModelError(
            f"model.checkpoint: the weights of {spec.checkpoint} don't fit its network{size}: "
            f"{', '.join(sorted(mismatched)[:5])}"
        )
    missing = set(report["missing_keys"]) - head
    if missing:
        raise ModelError(
            f"model.checkpoint: {spec.checkpoint} lacks {len(missing)} weights of the network, which would start at "
            f"random: {', '.join(sorted(missing)[:5])}"
        )
    return model


def load_original(spec: ModelSpec) -> PreTrainedModel | None:
    """The checkpoint with the head that it came with, in evaluation mode; None where it came without."""
    config = read_config(spec)
    if not any("ForImageClassification" in name for name in config.architectures):
        return None
    set_image_size(config, spec)
    model, report = _load(spec, config)
    return None if report["missing_keys"] or report["mismatched_keys"] else model.eval()


def _load(spec: ModelSpec, config: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The network of a config with all of the checkpoint's weights that fit, and what was missing or didn't."""
    with quiet():
        try:
            if (Path(spec.checkpoint) / ADAPTER_CONFIG_NAME).is_file():
                return _load_on_base(spec, config)
            model, report = AutoModelForImageClassification.from_pretrained(
                spec.checkpoint,
                config=config,
                revision=spec.revision,
                trust_remote_code=spec.trust_remote_code,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                use_safetensors=True,
                dtype=torch.float32,
            )
        except UNUSABLE as error:
            raise unusable(spec, error) from error
    name_own_class(model.config, type(model))
    return model, report


def _load_on_base(spec: ModelSpec, config: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The same of an adapter folder: its weights are added to what they sit on, as far as they fit the config."""
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


def base_spec(folder: Path, *, trust_remote_code: bool) -> ModelSpec:
    """What an adapter folder that hfft wrote sits on, wherever it was moved to, as a recipe's model section."""
    checkpoint, revision = adapter_base(folder)
    return ModelSpec(checkpoint=checkpoint, revision=revision, trust_remote_code=trust_remote_code)


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


def _renew_head(model: PreTrainedModel, start: str) -> None:
    """Give the last linear layers of the head start values of our own; the families' differ, and some have none."""
    with torch.no_grad():
        for layer in map(model.get_submodule, head_modules(dissect(model))):
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.weight) if start == "zero" else nn.init.normal_(layer.weight, std=_HEAD_STD)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)


def _probe(model: PreTrainedModel, processor: Any, spec: ModelSpec) -> None:
    pixels = sample_pixels(processor)
    try:
        with torch.inference_mode():
            logits = model(pixel_values=pixels).logits  # (1, K)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ModelError(
            f"model.checkpoint: {spec.checkpoint} can't take the images that its processor makes, "
            f"{tuple(pixels.shape)}: {first_line(error)}"
        ) from error
    if logits.shape != (1, model.config.num_labels) or not logits.isfinite().all():
        raise ModelError(
            f"model.checkpoint: {spec.checkpoint} answers one image with {tuple(logits.shape)} numbers "
            f"({'finite' if logits.isfinite().all() else 'not all finite'}); wanted (1, {model.config.num_labels})"
        )


def save_model(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    """Write config, safetensors and processor of a plain model, whole or not at all, in the place of the folder."""

    def write(aside: Path) -> None:
        with quiet():
            model.save_pretrained(aside)
            processor.save_pretrained(aside)

    write_folder(folder, write)


def reopen(folder: str | Path, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, Any]:
    """Load a finished model just as it is: its own head, labels and processor.

    Raises:
        ModelError: If there is no such model, a weight is missing, or it brings Python code that isn't trusted.
    """
    spec = ModelSpec(checkpoint=str(folder), trust_remote_code=trust_remote_code)
    check_exists(spec)
    check_code(Path(folder), trust_remote_code=trust_remote_code)
    model, report = _load(spec, read_config(spec))
    lacking = {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}
    if lacking:
        raise ModelError(f"{folder}: weights are missing, or don't fit: {', '.join(sorted(lacking)[:5])}")
    return model.eval(), load_processor(spec, model.config)


def restore_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Put every weight and buffer of a saved checkpoint into the model; RuntimeError if one is missing or odd."""
    model.load_state_dict(saved_weights(model, folder), strict=True)


def saved_weights(model: PreTrainedModel, folder: str | Path) -> dict[str, torch.Tensor]:
    """Every weight and buffer of a saved checkpoint of the model, by the model's names.

    Through from_pretrained, because several families are saved under older tensor names, which a plain
    load_state_dict would skip (transformers 5.23's Trainer does so for ViT).
    """
    with quiet():
        return type(model).from_pretrained(str(folder), use_safetensors=True, dtype=model.dtype).state_dict()
