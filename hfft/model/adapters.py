"""PEFT adapters by name: attached to blocks by role, trained together with the head, merged and saved whole."""

import json
import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from hfft.errors import ModelError
from hfft.files import write_folder
from hfft.model.anatomy import Anatomy, dissect
from hfft.model.checkpoint import quiet
from hfft.recipe.spec import AdapterSpec

_ATTENTION = ("attention", "attn")


def attach(model: PreTrainedModel, spec: AdapterSpec) -> PeftModel:
    """Wrap the model with an adapter; only the adapter and the head train afterwards.

    Args:
        model: A plain classifier.
        spec: The phase's adapter section.

    Raises:
        ModelError: If no layer has the wanted role.
    """
    anatomy = dissect(model)
    config = LoraConfig(
        r=spec.r,
        lora_alpha=spec.lora_alpha,
        lora_dropout=spec.lora_dropout,
        use_dora=spec.method == "dora",
        use_rslora=spec.method == "rslora",
        target_modules=targets(model, anatomy, spec),
        modules_to_save=head_modules(model, anatomy),
    )
    with warnings.catch_warnings():  # PEFT 0.21 reads a property that transformers 5.23 has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def targets(model: nn.Module, anatomy: Anatomy, spec: AdapterSpec) -> list[str]:
    """Full names of the layers that an adapter goes to: linear ones, and convolutions that see all channels.

    Depthwise and grouped convolutions are left out, and the head always is.

    Raises:
        ModelError: If no layer has the wanted role, or there are fewer blocks than asked for.
    """
    if spec.blocks != "all" and spec.blocks > len(anatomy.blocks):
        raise ModelError(
            f"adapter.blocks: asked for the last {spec.blocks}, but the network has {len(anatomy.blocks)}"
        )
    blocks = anatomy.blocks if spec.blocks == "all" else anatomy.blocks[-spec.blocks :]
    roles: dict[str, list[str]] = {}
    for block in blocks:
        for name in dict.fromkeys(tensor.rpartition(".")[0] for tensor in block.tensors):
            layer = model.get_submodule(name)
            if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1):
                is_attention = any(word in name.lower() for word in _ATTENTION)
                roles.setdefault("attention" if is_attention else "mlp", []).append(name)
    chosen = [name for names in roles.values() for name in names] if spec.on == "all" else roles.get(spec.on, [])
    if not chosen:
        raise ModelError(
            f"adapter.on: no layer has the role {spec.on!r}; this network has: {', '.join(roles) or 'none'}"
        )
    return chosen


def head_modules(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Full names of the head's modules that own weights: they train in full beside an adapter."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in anatomy.part("head").tensors))


def merge(model: PeftModel) -> PreTrainedModel:
    """The plain model with the adapter's update added to its weights and the trained head in place."""
    return model.merge_and_unload()  # pyright: ignore[reportCallIssue]


def save_adapter(model: PeftModel, processor: Any, folder: Path, *, base: str, revision: str | None) -> None:
    """Write a complete adapter folder: PEFT's files with the head, the labels, the processor, and what it sits on.

    Args:
        model: The adapted model.
        processor: Its image processor.
        folder: Replaced if it exists.
        base: Checkpoint that the adapter was trained on.
        revision: That checkpoint's revision.
    """

    def write(aside: Path) -> None:
        with quiet():
            model.save_pretrained(str(aside))
            model.config.save_pretrained(aside)  # pyright: ignore[reportCallIssue]
            processor.save_pretrained(aside)
        path = aside / "adapter_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config.update(base_model_name_or_path=base, revision=revision)
        path.write_text(json.dumps(config, indent=2), encoding="utf-8")
        (aside / "README.md").unlink(missing_ok=True)  # PEFT's empty card

    write_folder(folder, write)


def restore_adapter(model: PeftModel, folder: str | Path) -> None:
    """Put a saved adapter's weights, head included, into an adapted model.

    Raises:
        RuntimeError: If one of them is missing.
    """
    with quiet():
        result = model.load_adapter(str(folder), "default", is_trainable=True)
    lost = [name for name in result.missing_keys if "lora_" in name or "modules_to_save" in name]
    if lost:
        raise RuntimeError(f"{folder}: the adapter lacks {', '.join(lost[:5])}")
