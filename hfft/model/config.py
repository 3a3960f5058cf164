"""A checkpoint's settings, read before its weights: config and image processor, at the recipe's labels and size."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

from hfft.errors import ModelError, first_line
from hfft.model.anatomy import REFUSED
from hfft.model.checkpoint_files import check_files
from hfft.model.remote_code import name_own_class, own_code, processor_code, refuse_untrusted
from hfft.recipe.spec import ModelSpec
from hfft.runs.locating import processor_place
from hfft.system.hub_lookup import hub_problem

CONFIG_FIELD = "hfft"
"""Where the config.json of a result keeps fields of ours, which transformers ignores."""
SINGLE_LABEL, MULTI_LABEL = "single_label_classification", "multi_label_classification"
_PLAIN = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}
_DAMAGED = (TypeError, KeyError, AttributeError, ArithmeticError, StrictDataclassError)  # of values of a config
UNUSABLE = (OSError, ValueError, RuntimeError, ImportError, SafetensorError, *_DAMAGED)
"""What transformers raises where a checkpoint is none."""


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


def unusable(spec: ModelSpec, error: Exception) -> ModelError:
    """What to raise where transformers raised an error of UNUSABLE."""
    where = spec.checkpoint if Path(spec.checkpoint).is_dir() else f"{spec.checkpoint} is no folder here, and the Hub"
    advice = "; is a value in its config.json wrong?" if isinstance(error, _DAMAGED) else ""
    return ModelError(f"model.checkpoint: {where} gave no image classifier: {first_line(error)}{advice}")


def check_exists(spec: ModelSpec) -> None:
    """Refuse a checkpoint that is nowhere, or whose files are damaged."""
    problem = None if Path(spec.checkpoint).exists() else hub_problem(spec.checkpoint, "model", spec.revision)
    if problem is not None:
        raise ModelError(f"model.checkpoint: {spec.checkpoint} is no folder here, and {problem}")
    check_files(spec.checkpoint, spec.revision)


def read_config(spec: ModelSpec, **options: Any) -> Any:
    """The checkpoint's own config, with some options in it; it answers with logits alone."""
    with quiet():
        try:
            config = AutoConfig.from_pretrained(
                spec.checkpoint, revision=spec.revision, trust_remote_code=spec.trust_remote_code, **options
            )
        except UNUSABLE as error:
            raise unusable(spec, error) from error
    config.architectures = config.architectures or []  # transformers 5.24 iterates over them where it can choose
    plain_outputs(config)
    return config


def load_config(spec: ModelSpec, labels: Sequence[str], *, is_multi_label: bool = False) -> Any:
    """The checkpoint's config with these labels, any number of which an image may have, and the recipe's image size.

    Raises:
        ModelError: If there is no such checkpoint, or its architecture can't be fine-tuned.
    """
    check_exists(spec)
    config = read_config(spec, num_labels=len(labels))
    refuse_untrusted(spec, own_code(vars(config)))
    if config.model_type in REFUSED:
        raise ModelError(f"model.checkpoint: {spec.checkpoint} can't be fine-tuned: {REFUSED[config.model_type]}")
    if getattr(config, "quantization_config", None):
        raise ModelError(f"model.checkpoint: {spec.checkpoint} is quantized, and can't be trained; take the original")
    config.dtype = torch.float32  # of what is trained, whatever the checkpoint was saved in
    set_labels(config, labels, is_multi_label=is_multi_label)
    set_image_size(config, spec)
    return config


def load_skeleton(spec: ModelSpec, config: Any) -> PreTrainedModel:
    """The network of a config on the meta device: shapes without weights; ModelError if it is no image classifier."""
    try:
        with torch.device("meta"), quiet():
            return AutoModelForImageClassification.from_config(config, trust_remote_code=spec.trust_remote_code)
    except UNUSABLE as error:
        raise unusable(spec, error) from error


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
    """The class names of a config, in the order of the outputs; ModelError if those aren't numbered from 0."""
    names = {str(number): str(name) for number, name in config.id2label.items()}
    if names.keys() != set(map(str, range(len(names)))):
        raise ModelError(f"id2label of the config: found {', '.join(names)}; allowed: 0 to {len(names) - 1}")
    return tuple(names[str(number)] for number in range(len(names)))


def set_image_size(config: Any, spec: ModelSpec) -> None:
    """Put the recipe's image size, if it names one, into a config.

    Where weights belong to the checkpoint's own size, the config keeps it, if the network takes the other one all the
    same: DINOv2 and its kin interpolate their positions.

    Raises:
        ModelError: If the network doesn't.
    """
    side = spec.image_size
    if side is None:
        return
    if getattr(config, "pretrained_cfg", None):
        config.pretrained_cfg = {**config.pretrained_cfg, "input_size": [3, side, side]}
    resized = copy.deepcopy(config)
    if not resize_config(resized, side):
        return
    try:
        own, other = (load_skeleton(spec, copy.deepcopy(one)) for one in (config, resized))
    except ModelError:  # said elsewhere, and better
        resize_config(config, side)
        return
    shapes = {name: tensor.shape for name, tensor in other.state_dict().items()}
    changed = [name for name, tensor in own.state_dict().items() if shapes.get(name) != tensor.shape]
    if not changed:
        resize_config(config, side)
    elif not _takes(own, side):
        raise ModelError(
            f"model.image_size: the weights of {spec.checkpoint} don't fit its network at image_size {side}: "
            f"{', '.join(changed[:5])}; leave image_size out, or take a network that interpolates its positions"
        )


def resize_config(config: Any, side: int) -> bool:
    """Set the size where the config keeps one, and say whether it does.

    CLIP and its kin keep it in their vision section; Hiera keeps height and width.
    """
    sections: tuple[Any, ...] = (config, getattr(config, "vision_config", None))
    sized = [section for section in sections if getattr(section, "image_size", None) is not None]
    for section in sized:
        section.image_size = [side, side] if isinstance(section.image_size, list | tuple) else side
    return bool(sized)


def _takes(network: PreTrainedModel, side: int) -> bool:
    """Whether a network without weights takes images of this size."""
    try:
        with torch.no_grad():
            network.eval()(pixel_values=torch.zeros(1, 3, side, side, device="meta"))
    except (RuntimeError, ValueError, AssertionError):
        return False
    return True


def load_processor(spec: ModelSpec, config: Any) -> Any:
    """The checkpoint's own image processor, at the recipe's image size; ModelError if it has none."""
    is_timm = config.model_type == "timm_wrapper"
    with quiet():
        try:
            if is_timm:
                return _timm_processor(config)
            processor = AutoImageProcessor.from_pretrained(
                processor_place(spec.checkpoint), revision=spec.revision, trust_remote_code=spec.trust_remote_code
            )
        except (*UNUSABLE, AssertionError) as error:
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


def sample_pixels(processor: Any) -> torch.Tensor:
    """What the processor makes of one gray image, (1, C, H, W)."""
    return processor(images=Image.new("RGB", (64, 64), "gray"), return_tensors="pt")["pixel_values"]
