"""A checkpoint -> a model with a new head and its image processor; and back to a folder that anything can open."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hfft.errors import ModelError, first_line
from hfft.model.adapter_folders import holds_adapter, load_on_base
from hfft.model.anatomy import REFUSED, dissect
from hfft.model.checkpoint_files import file_problem
from hfft.model.remote_code import check_code, name_own_class, own_code, processor_code, refuse_untrusted
from hfft.model.sizing import set_image_size
from hfft.recipe.spec import ModelSpec
from hfft.runs.locating import processor_place
from hfft.system.files import write_folder
from hfft.system.hub_lookup import hub_problem

CONFIG_FIELD = "hfft"
"""Where the config.json of a result keeps fields of ours, which transformers ignores."""
SINGLE_LABEL, MULTI_LABEL = "single_label_classification", "multi_label_classification"
_HEAD_STD = 0.02
_PLAIN = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
_DAMAGED = (TypeError, KeyError, AttributeError, ArithmeticError, StrictDataclassError)  # of values of a config
_UNUSABLE = (OSError, ValueError, RuntimeError, ImportError, SafetensorError, *_DAMAGED)


def load_checkpoint(
    spec: ModelSpec, labels: Sequence[str], *, is_multi_label: bool = False
) -> tuple[PreTrainedModel, Any]:
    """Load a pretrained classifier with a new head for these labels, and its image processor.

    Args:
        spec: The recipe's model section.
        labels: Class names; they become id2label and label2id.
        is_multi_label: Whether an image has any number of labels.

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

    Args:
        spec: The recipe's model section.
        config: From `load_config`.

    Raises:
        ModelError: If it can't be loaded, or weights other than the head's are missing or don't fit.
    """
    model, report = _load(spec, config)
    _check_only_head_is_new(model, report, spec)
    return model


def load_original(spec: ModelSpec) -> PreTrainedModel | None:
    """The checkpoint with the head that it came with, in evaluation mode; None where it came without.

    Args:
        spec: The recipe's model section.

    Raises:
        ModelError: If it can't be loaded.
    """
    config = _read_config(spec)
    if not any("ForImageClassification" in name for name in config.architectures):
        return None
    set_image_size(config, spec)
    model, report = _load(spec, config)
    return None if report["missing_keys"] or report["mismatched_keys"] else model.eval()


def _load(spec: ModelSpec, config: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The network of a config with all of the checkpoint's weights that fit, and what was missing or didn't."""
    with quiet():
        try:
            if holds_adapter(spec.checkpoint):
                return load_on_base(spec, config, load_body)
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
        except _UNUSABLE as error:
            raise _unusable(spec, error) from error
    name_own_class(model.config, type(model))
    return model, report


def load_skeleton(spec: ModelSpec, config: Any) -> PreTrainedModel:
    """The same model from its config alone, on the meta device: shapes without weights.

    Args:
        spec: The recipe's model section.
        config: From `load_config`.

    Raises:
        ModelError: If the config isn't an image classifier's.
    """
    try:
        with torch.device("meta"), quiet():
            return AutoModelForImageClassification.from_config(config, trust_remote_code=spec.trust_remote_code)
    except _UNUSABLE as error:
        raise _unusable(spec, error) from error


def load_config(spec: ModelSpec, labels: Sequence[str], *, is_multi_label: bool = False) -> Any:
    """The checkpoint's config with these labels, any number of which an image may have, and the recipe's image size.

    Raises:
        ModelError: If there is no such checkpoint, or its architecture can't be fine-tuned.
    """
    _check_exists(spec)
    config = _read_config(spec, num_labels=len(labels))
    refuse_untrusted(spec, own_code(vars(config)))
    if config.model_type in REFUSED:
        raise ModelError(f"model.checkpoint: {spec.checkpoint} can't be fine-tuned: {REFUSED[config.model_type]}")
    if getattr(config, "quantization_config", None):
        raise ModelError(f"model.checkpoint: {spec.checkpoint} is quantized, and can't be trained; take the original")
    config.dtype = torch.float32  # of what is trained, whatever the checkpoint was saved in
    set_labels(config, labels, is_multi_label=is_multi_label)
    set_image_size(config, spec)
    return config


def plain_outputs(config: Any) -> None:
    """Let a network of this config answer with logits alone: a config may ask for attentions, or for a tuple."""
    for section in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        for key, value in _PLAIN.items():
            if section is not None and getattr(section, key, value) != value:
                setattr(section, key, value)


def set_labels(config: Any, labels: Sequence[str], *, is_multi_label: bool = False) -> None:
    """Put the class names into a config of as many outputs, and take out what it says of a model with others.

    Its `problem_type` says what an output means: by it, transformers' `pipeline` takes softmax or sigmoid.
    """
    config.problem_type = MULTI_LABEL if is_multi_label else SINGLE_LABEL
    config.__dict__.pop(CONFIG_FIELD, None)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    if config.model_type == "timm_wrapper":
        config.label_names = list(labels)  # saved in their place; transformers 5.24 keeps the checkpoint's own


def has_many_labels(config: Any) -> bool:
    """Whether a model says of each class by itself whether an image has it."""
    return getattr(config, "problem_type", None) == MULTI_LABEL


def labels_of(config: Any) -> tuple[str, ...]:
    """The class names of a config, in the order of the outputs.

    Raises:
        ModelError: If the outputs aren't numbered from 0.
    """
    names = {str(number): str(name) for number, name in config.id2label.items()}
    if names.keys() != set(map(str, range(len(names)))):
        raise ModelError(f"id2label of the config: found {', '.join(names)}; allowed: 0 to {len(names) - 1}")
    return tuple(names[str(number)] for number in range(len(names)))


def load_processor(spec: ModelSpec, config: Any) -> Any:
    """The checkpoint's own image processor, at the recipe's image size.

    Raises:
        ModelError: If the checkpoint has none.
    """
    is_timm = config.model_type == "timm_wrapper"
    with quiet():
        try:
            if is_timm:
                return _timm_processor(config)
            processor = AutoImageProcessor.from_pretrained(
                processor_place(spec.checkpoint), revision=spec.revision, trust_remote_code=spec.trust_remote_code
            )
        except (*_UNUSABLE, AssertionError) as error:
            raise ModelError(
                f"model.checkpoint: {spec.checkpoint} has no image processor "
                f"({'pretrained_cfg in config.json' if is_timm else 'preprocessor_config.json'}), so nobody can know "
                f"the size and scale of its pixels: {first_line(error)}"
            ) from error
    refuse_untrusted(spec, processor_code(vars(processor)))
    name_own_class(processor, type(processor))
    return processor if spec.image_size is None else _resized(processor, spec.image_size)


def _timm_processor(config: Any) -> Any:
    from transformers import TimmWrapperImageProcessor

    processor = TimmWrapperImageProcessor(pretrained_cfg=config.pretrained_cfg, architecture=config.architecture)
    for key in {"fit", "background"} & set(config.pretrained_cfg):  # of the recipe's data section
        setattr(processor, key, config.pretrained_cfg[key])
    return processor


def save_model(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    """Write config, safetensors and processor, whole or not at all.

    Args:
        model: A plain model, adapters merged.
        processor: Its image processor. TimmWrapper keeps it in config.json.
        folder: Replaced if it exists.
    """

    def write(aside: Path) -> None:
        with quiet():
            model.save_pretrained(aside)
            processor.save_pretrained(aside)

    write_folder(folder, write)


def reopen(folder: str | Path, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, Any]:
    """Load a finished model just as it is: its own head, labels and processor.

    Args:
        folder: Of the model.
        trust_remote_code: Runs the Python code that the model brings, where it brings some.

    Raises:
        ModelError: If there is no such model, a weight is missing, or it brings code that isn't trusted.
    """
    spec = ModelSpec(checkpoint=str(folder), trust_remote_code=trust_remote_code)
    _check_exists(spec)
    check_code(Path(folder), trust_remote_code=trust_remote_code)
    model, report = _load(spec, _read_config(spec))
    lacking = {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}
    if lacking:
        raise ModelError(f"{folder}: weights are missing, or don't fit: {', '.join(sorted(lacking)[:5])}")
    return model.eval(), load_processor(spec, model.config)


def restore_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Put every weight and buffer of a saved checkpoint into the model.

    Raises:
        RuntimeError: If one is missing or has another shape.
    """
    model.load_state_dict(saved_weights(model, folder), strict=True)


def saved_weights(model: PreTrainedModel, folder: str | Path) -> dict[str, torch.Tensor]:
    """Every weight and buffer of a saved checkpoint of the model, by the model's names.

    Through from_pretrained, because several families are saved under older tensor names, which a plain
    load_state_dict would skip (STACK: transformers 5.23 Trainer does so for ViT).
    """
    with quiet():
        return type(model).from_pretrained(str(folder), use_safetensors=True, dtype=model.dtype).state_dict()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' report on new heads and the like: what matters of it is checked here."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _check_exists(spec: ModelSpec) -> None:
    problem = None if Path(spec.checkpoint).exists() else hub_problem(spec.checkpoint, "model", spec.revision)
    if problem is not None:
        raise ModelError(f"model.checkpoint: {spec.checkpoint} is no folder here, and {problem}")
    if (problem := file_problem(spec.checkpoint, spec.revision)) is not None:
        raise ModelError(f"model.checkpoint: {problem}")


def _read_config(spec: ModelSpec, **options: Any) -> Any:
    with quiet():
        try:
            config = AutoConfig.from_pretrained(
                spec.checkpoint, revision=spec.revision, trust_remote_code=spec.trust_remote_code, **options
            )
        except _UNUSABLE as error:
            raise _unusable(spec, error) from error
    config.architectures = config.architectures or []  # transformers 5.24 iterates over them where it can choose
    plain_outputs(config)
    return config


def _check_only_head_is_new(model: PreTrainedModel, report: dict[str, Any], spec: ModelSpec) -> None:
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


def _renew_head(model: PreTrainedModel, start: str) -> None:
    """Give the last linear layers of the head start values of our own; the families' differ, and some have none."""
    head = {name.rpartition(".")[0] for name in dissect(model).part("head").tensors}
    with torch.no_grad():
        for name in head:
            layer = model.get_submodule(name)
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


def sample_pixels(processor: Any) -> torch.Tensor:
    """What the processor makes of one gray image, (1, C, H, W)."""
    return processor(images=Image.new("RGB", (64, 64), "gray"), return_tensors="pt")["pixel_values"]


def _resized(processor: Any, side: int) -> Any:
    """The processor with every size scaled so that its output is `side` pixels high and wide."""
    try:
        now = sample_pixels(processor).shape[-2]
    except Exception as error:  # of anybody's code
        raise ModelError(
            f"model.image_size: the image processor, {type(processor).__name__}, can't take an image: {error}"
        ) from error
    processor = copy.deepcopy(processor)
    for key in ("size", "crop_size"):
        sizes = {name: value for name, value in dict(getattr(processor, key, None) or {}).items() if value}
        if sizes:
            scaled = {name: round(value * side / now) for name, value in sizes.items()}
            setattr(processor, key, type(getattr(processor, key))(**scaled))
    return processor


def _unusable(spec: ModelSpec, error: Exception) -> ModelError:
    where = spec.checkpoint if Path(spec.checkpoint).is_dir() else f"{spec.checkpoint} is no folder here, and the Hub"
    advice = "; is a value in its config.json wrong?" if isinstance(error, _DAMAGED) else ""
    return ModelError(f"model.checkpoint: {where} gave no image classifier: {first_line(error)}{advice}")
