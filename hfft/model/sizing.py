"""Another image size than the checkpoint's: in its config, or left to a network that interpolates its positions."""

import copy
from typing import Any

import torch
from transformers import AutoModelForImageClassification, PreTrainedModel

from hfft.errors import ModelError
from hfft.recipe.spec import ModelSpec


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
    own, other = _skeleton(config, spec), _skeleton(resized, spec)
    if own is None or other is None:  # said elsewhere, and better
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


def _skeleton(config: Any, spec: ModelSpec) -> PreTrainedModel | None:
    """The network without weights; None where it can't be built."""
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"):
            return AutoModelForImageClassification.from_config(config, trust_remote_code=spec.trust_remote_code).eval()
    except (ValueError, RuntimeError, ImportError):
        return None


def _takes(network: PreTrainedModel, side: int) -> bool:
    """Whether a network without weights takes images of this size."""
    try:
        with torch.no_grad():
            network(pixel_values=torch.zeros(1, 3, side, side, device="meta"))
    except (RuntimeError, ValueError, AssertionError):
        return False
    return True
