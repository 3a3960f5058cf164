"""A model object that a caller brings: taken as what will be saved and opened again, or refused before any work."""

import copy
import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from hfft.errors import ModelError, first_line
from hfft.model.anatomy import dissect, head_modules
from hfft.model.checkpoint_files import check_weights
from hfft.model.config import labels_of, load_config, plain_outputs, quiet, set_labels
from hfft.model.fingerprint import hash_weights
from hfft.model.restoring import left_as_it_was
from hfft.recipe.spec import ModelSpec
from hfft.system.text import listed

_PLACEHOLDER = re.compile(r"(LABEL_)?\d+")  # names of classes that nobody gave one
_TOLERANCE = 1e-4  # of logits, relative to the largest where that is above 1
_NAMES_ADVICE = (
    "set model.config.id2label to the images' names, in the order of its outputs, or give a model of these classes"
)
_NOT_COMPUTED = ("_name_or_path", "architectures", "id2label", "label2id", "problem_type", "transformers_version")

_LOG = get_logger(__name__)


def take_model(model: Any) -> dict[str, str]:
    """Check the object, and give it float32 weights, in which hfft trains whatever the precision.

    Returns:
        From `fingerprints`.

    Raises:
        ModelError: If it is no plain transformers classifier with weights that are numbers.
    """
    problem = _kind_problem(model)
    if problem is not None:
        raise ModelError(f"model: {problem}")
    types = {value.dtype for value in model.parameters()}
    if types != {torch.float32}:
        names = " and ".join(sorted(str(one).removeprefix("torch.") for one in types))
        _LOG.info(f"model: given in {names}; it trains in float32, with autocast where precision says so")
        model.float()
    model.config.dtype = torch.float32
    plain_outputs(model.config)
    broken = [name for name, value in model.named_parameters() if not value.isfinite().all()]
    if broken:
        raise ModelError(
            f"model: {len(broken)} weights hold NaN or infinity: {listed(broken)}; take an undamaged copy"
        )
    return fingerprints(model)


def fingerprints(model: Any) -> dict[str, str]:
    """Hashes of a transformers model: `weights`, of what is saved, and `config`, of what that says of the network."""
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in _NOT_COMPUTED}
    of_config = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16)
    return {"weights": hash_weights(model.state_dict()), "config": of_config.hexdigest()}


def check_reopens(model: Any, pixels: torch.Tensor, *, trust_remote_code: bool) -> None:
    """Check that what will be opened again from the model's config and weights is the model.

    A head of several layers, a hook or a replaced layer isn't in the config, and would be lost with the object. The
    pixels are an image as the processor makes it, (1, C, H, W).

    Raises:
        ModelError: If another network would be opened.
    """
    if type(model).__module__.startswith("transformers_modules") and not trust_remote_code:
        raise ModelError(
            f"model: {type(model).__name__} is Python code of its checkpoint and can't be opened without it; if you "
            "trust that code, set model.trust_remote_code: true"
        )
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            twin: Any = AutoModelForImageClassification.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError) as error:
        raise ModelError(
            f"model: {type(model).__name__} can't be opened again from its config: {first_line(error)}"
        ) from error
    own, other = _tensors(model), _tensors(twin)
    odd = sorted(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
    if odd:
        raise ModelError(
            f"model: opened again from its config, it would be a {type(twin).__name__} with other tensors "
            f"({listed(odd)}); give a classifier as its config describes it, with one linear layer as head"
        )
    twin.load_state_dict(model.state_dict())
    expected, found = _logits(model, pixels), _logits(twin.to(model.device), pixels)
    classes = len(labels_of(model.config))
    if expected.shape != (1, classes):
        raise ModelError(
            f"model: answers one image with {tuple(expected.shape)} numbers; its config names {classes} classes"
        )
    difference = float((expected - found).abs().max())
    if not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ModelError(
            f"model: opened again from its config and weights, its logits differ by {difference:.2g}; give it "
            "without what its config doesn't say: a hook, a replaced layer, a changed forward"
        )


def open_config(spec: ModelSpec, labels: Sequence[str], *, is_multi_label: bool, model: Any = None) -> Any:
    """The config of a checkpoint, or of a model from `take_model`, with the labels of the images.

    The checkpoint's weights are looked at; a model's head is put into the order of the labels.

    Raises:
        ModelError: As `load_config` and `align_labels`, or if weights are damaged.
    """
    if model is None:
        config = load_config(spec, labels, is_multi_label=is_multi_label)
        check_weights(spec.checkpoint)
        return config
    align_labels(model, labels)
    set_labels(model.config, labels, is_multi_label=is_multi_label)
    return model.config


def align_labels(model: Any, labels: Sequence[str]) -> None:
    """Put the outputs of the head into the order of the images' classes, unless their names are mere numbers.

    Raises:
        ModelError: If there are other outputs than classes, only some of the names are those of the images, or the
            outputs can't be put into another order.
    """
    if not model.config.id2label:  # as PVT's is, where nobody set it
        return
    own = labels_of(model.config)
    if len(own) != len(labels):
        raise ModelError(
            f"model: its config names {len(own)} classes ({listed(own)}), and the images have {len(labels)} "
            f"({listed(labels)}); {_NAMES_ADVICE}"
        )
    order = _order(own, labels)
    if order is None or order == list(range(len(labels))):
        return
    with torch.no_grad():
        for name in head_modules(dissect(model)):
            layer = model.get_submodule(name)
            if not isinstance(layer, nn.Linear | nn.Conv2d) or layer.weight.shape[0] != len(labels):
                raise ModelError(
                    f"model: its classes are in another order ({listed(own)}) than those of the images "
                    f"({listed(labels)}), and its head, {type(layer).__name__}, can't be reordered; give it with "
                    "the images' order"
                )
            for value in layer.parameters():
                value.copy_(value[order].clone())
    _LOG.info(f"model: the outputs of its head were put into the order of the images' classes: {listed(labels)}")


def _kind_problem(model: Any) -> str | None:
    """What was found, and what to give instead; None where the object can be taken."""
    kind = f"{type(model).__module__.partition('.')[0]}'s {type(model).__name__}"
    wanted = "give a transformers model for image classification (PreTrainedModel)"
    if not isinstance(model, nn.Module):
        return f"found {type(model).__name__}; {wanted}"
    if hasattr(model, "_orig_mod"):
        return "found a compiled one; give it without torch.compile, and set training.torch_compile: true"
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return f"found {type(model).__name__}; give what it wraps (model.module): hfft spreads it itself"
    if getattr(model, "peft_config", None):
        return "found one with PEFT adapters; merge them (model.merge_and_unload()), or let a phase attach an adapter"
    if not isinstance(model, PreTrainedModel):
        timm = "; a timm model is opened by model.checkpoint: timm/NAME" if kind.startswith("timm") else ""
        return f"found {kind}; {wanted}{timm}"
    if getattr(model, "is_quantized", False) or not all(value.is_floating_point() for value in model.parameters()):
        return "found quantized weights, which can't be trained; give the model as it was before quantization"
    if any(value.is_meta for value in model.state_dict().values()):
        return "found weights without values (on the meta device); load them first"
    if any(value.is_inference() for value in model.state_dict().values()):
        return "found weights that can't be trained, made inside torch.inference_mode(); make it outside"
    return None


def _order(own: Sequence[str], labels: Sequence[str]) -> list[int] | None:
    """The model's output for each class of the images; None where its names say nothing of them."""
    for key in (str, _folded):
        places = {key(name): place for place, name in enumerate(own)}
        wanted = [key(name) for name in labels]
        if len(places) == len(set(wanted)) == len(labels) and places.keys() == set(wanted):
            return [places[name] for name in wanted]
    shared = {_folded(name) for name in own} & {_folded(name) for name in labels}
    if all(_PLACEHOLDER.fullmatch(name) for name in own):
        return None
    if shared:
        raise ModelError(
            f"model: of its classes ({listed(own)}) only {len(shared)} are among those of the images "
            f"({listed(labels)}); {_NAMES_ADVICE}"
        )
    _LOG.warning(f"model: its outputs ({listed(own)}) are taken for the images' classes in order: {listed(labels)}")
    return None


def _folded(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name.casefold()).strip()


def _tensors(model: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Shapes by name, each with the first name of the same memory: layers may share their weights."""
    first: dict[int, str] = {}
    tensors = model.state_dict().items()
    return {name: (first.setdefault(value.data_ptr(), name), tuple(value.shape)) for name, value in tensors}


def _logits(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """(1, K) in evaluation mode."""
    try:
        with left_as_it_was(model), torch.no_grad():
            return model.eval()(pixel_values=pixels.to(model.device)).logits.float()
    except (RuntimeError, ValueError, AssertionError, AttributeError) as error:
        raise ModelError(
            f"model: can't take the images that the checkpoint's processor makes, {tuple(pixels.shape)}: "
            f"{first_line(error)}"
        ) from error
