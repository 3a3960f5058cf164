"""PEFT adapters by name: attached to blocks by role, trained together with the head, merged and saved whole."""

import re
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from hfft.errors import ModelError
from hfft.model.anatomy import PEFT_PREFIX, Anatomy, dissect, head_modules
from hfft.model.checkpoint import base_spec, load_body, put_adapter, without_peft_warning
from hfft.model.config import load_processor, quiet
from hfft.model.freezing import unused_parameters
from hfft.model.remote_code import check_code
from hfft.recipe.spec import AdapterSpec, ModelSpec
from hfft.system.files import read_json, write_folder, write_json

_ADDED = re.compile(r"\.(lora_|ia3_l|vera_lambda_|vera_[AB]\b)")  # as PEFT 0.21 names what it adds
_LINEAR_ONLY = ("pissa", "vera")
_ATTENTION = re.compile(r"Att(entio)?n(?!.*Block)")  # in the class name of a module around the layer


def attach(model: PreTrainedModel, spec: AdapterSpec) -> PeftModel:
    """Wrap a plain classifier with an adapter; only the adapter and the head train afterwards.

    Raises:
        ModelError: If no layer has the wanted role.
    """
    with without_peft_warning():
        adapted = get_peft_model(model, _config(model, spec))
    assert isinstance(adapted, PeftModel)
    return adapted


def is_adapter_tensor(name: str) -> bool:
    """Whether a tensor of an adapted model was added by the adapter; the copies of the head are not."""
    return _ADDED.search(name) is not None


def _config(model: PreTrainedModel, spec: AdapterSpec) -> PeftConfig:
    anatomy = dissect(model)
    names = targets(model, anatomy, spec)
    head = head_modules(anatomy)
    if spec.method == "ia3":
        feedforward = [name for name in names if _role(model, name) == "mlp"]
        return IA3Config(target_modules=names, feedforward_modules=feedforward, modules_to_save=head)
    if spec.method == "vera":
        return VeraConfig(r=spec.r or 256, target_modules=names, modules_to_save=head)
    rank = spec.r or 8
    for name in names if spec.method == "pissa" else ():  # a layer has as many singular vectors as its smaller side
        most = min(model.get_parameter(f"{name}.weight").shape)
        if rank > most:
            raise ModelError(f"adapter.r: pissa asks for rank {rank}, but {name} has {most} singular values")
    is_shape_only = next(model.parameters()).is_meta  # which has no singular values
    return LoraConfig(
        r=rank,
        lora_alpha=spec.lora_alpha or 16,
        lora_dropout=spec.lora_dropout or 0.0,
        use_dora=spec.method == "dora",
        use_rslora=spec.method == "rslora",
        init_lora_weights="pissa" if spec.method == "pissa" and not is_shape_only else True,
        target_modules=names,
        modules_to_save=head,
    )


def check_adapter(model: PeftModel, pixels: torch.Tensor) -> None:
    """Check by one forward and backward pass that every weight of a fresh adapter gets a gradient.

    The pixels (B, C, H, W) may be any. Some networks use the weights of a layer without calling it, and the adapter on
    it would do nothing: timm's BEiT and Swin V2 do. Others read what a wrapped layer doesn't have: timm's DaViT.

    Raises:
        ModelError: If the network can't run with the adapter or doesn't use it; names the layers.
    """
    try:
        unused = unused_parameters(model, pixels)
    except AttributeError as error:
        raise ModelError(f"adapter: this network doesn't run with it: {error}; unfreeze blocks instead") from error
    idle = sorted({_ADDED.split(name)[0].removeprefix(PEFT_PREFIX) for name in unused if is_adapter_tensor(name)})
    if idle:
        raise ModelError(
            f"adapter: this network uses the weights of {len(idle)} layers without calling them, so an adapter there "
            f"does nothing ({', '.join(idle[:3])}); choose another `on`, or unfreeze blocks instead"
        )


def targets(model: PreTrainedModel, anatomy: Anatomy, spec: AdapterSpec) -> list[str]:
    """Full names of the layers that an adapter goes to: linear ones, and convolutions that see all channels; no head.

    Raises:
        ModelError: If no layer has the wanted role and can carry an adapter, or there are fewer blocks than asked for.
    """
    if spec.blocks != "all" and spec.blocks > len(anatomy.blocks):
        raise ModelError(
            f"adapter.blocks: asked for the last {spec.blocks}, but the network has {len(anatomy.blocks)}"
        )
    blocks = anatomy.blocks if spec.blocks == "all" else anatomy.blocks[-spec.blocks :]
    roles: dict[str, list[str]] = {}
    unfit: dict[str, None] = {}
    for block in blocks:
        for name in dict.fromkeys(tensor.rpartition(".")[0] for tensor in block.tensors):
            layer = model.get_submodule(name)
            obstacle = _obstacle(layer, model.config)
            if obstacle is None and spec.method in _LINEAR_ONLY and type(layer) is not nn.Linear:
                obstacle = f"{type(layer).__name__} with {spec.method}"
            if obstacle is None:
                roles.setdefault(_role(model, name), []).append(name)
            elif isinstance(layer, nn.Linear | nn.Conv2d):
                unfit[obstacle] = None
    chosen = [name for names in roles.values() for name in names] if spec.on == "all" else roles.get(spec.on, [])
    if not chosen:
        why = f"PEFT can't wrap and merge its {', '.join(unfit) or 'layers'}"
        there = ", ".join(roles) or f"none ({why}); unfreeze blocks instead"
        raise ModelError(f"adapter.on: no layer has the role {spec.on!r}; this network has: {there}")
    return chosen


def _role(model: nn.Module, name: str) -> str:
    """By class, as names deceive: RegNet calls its squeeze-and-excitation `attention`, LeViT hides its attention."""
    path = name.split(".")
    around = (model.get_submodule(".".join(path[:depth])) for depth in range(1, len(path)))
    return "attention" if any(_ATTENTION.search(type(module).__name__) for module in around) else "mlp"


def _obstacle(layer: nn.Module, config: Any) -> str | None:
    """What keeps PEFT 0.21 from wrapping the layer and adding the update to its weights, if anything does.

    Exact types, as a subclass may compute with other weights than it holds: BiT's standardises them first. PEFT's own
    convolution takes kernel, stride and padding over, and nothing else. With `tf_padding`, MobileNet V1 and V2 read
    the stride of a convolution from outside, which a wrapped one doesn't have.
    """
    if type(layer) is nn.Linear:
        return None
    if type(layer) is not nn.Conv2d:
        return type(layer).__name__
    if getattr(config, "tf_padding", False):
        return "Conv2d with tf_padding"
    as_peft_makes_it = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return None if as_peft_makes_it else "grouped or dilated Conv2d"


def merge(model: PeftModel) -> PreTrainedModel:
    """The plain model with the adapter's update added to its weights and the trained head in place."""
    return model.merge_and_unload()  # pyright: ignore[reportCallIssue]


def save_adapter(model: PeftModel, processor: Any, folder: Path, *, base: str, revision: str | None) -> None:
    """Write a complete adapter folder: PEFT's files with the head, the labels, the processor, and what it sits on.

    The folder is replaced if it exists; `base` is the checkpoint that the adapter was trained on.
    """

    def write(aside: Path) -> None:
        plain: Any = model.get_base_model()
        plain.config.architectures = [type(plain).__name__]
        with quiet():
            model.save_pretrained(str(aside))
            plain.config.save_pretrained(aside)
            processor.save_pretrained(aside)
        path = aside / ADAPTER_CONFIG_NAME
        write_json(path, {**read_json(path), "base_model_name_or_path": base, "revision": revision})
        (aside / "README.md").unlink(missing_ok=True)  # PEFT's empty card

    write_folder(folder, write)


def restore_adapter(model: PeftModel, folder: str | Path) -> None:
    """Put a saved adapter's weights, head included, into an adapted model; RuntimeError if one of them is missing."""
    with quiet():
        result = model.load_adapter(str(folder), "default", is_trainable=True)
    lost = [name for name in result.missing_keys if is_adapter_tensor(name) or "modules_to_save" in name]
    if lost:
        raise RuntimeError(f"{folder}: the adapter lacks {', '.join(lost[:5])}")


def open_adapter(folder: Path, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, Any]:
    """Load an adapter folder of a run on top of what it was trained on: a plain model, merged, and its processor.

    Raises:
        ModelError: If the base checkpoint is missing, or brings Python code that isn't trusted.
    """
    check_code(folder, trust_remote_code=trust_remote_code)
    spec = base_spec(folder, trust_remote_code=trust_remote_code)
    with quiet():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        try:
            model = load_body(spec, config)
        except ModelError as error:
            raise ModelError(f"{folder}: what the adapter sits on can't be loaded: {error}") from error
        merged = put_adapter(model, folder)
    processor = load_processor(ModelSpec(checkpoint=str(folder), trust_remote_code=trust_remote_code), config)
    return merged.eval(), processor
