"""The blocks and the head of any network, found in a forward pass on the meta device: no weights, no family table."""

import json
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from hfft.errors import ModelError, first_line
from hfft.model.trace import Call, trace

PartKey = str | tuple[int, ...]
"""`stem`, `norm`, `head`, or the numbers of a block: its own, and of several stages its stage's before."""
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_MOST_OF = 0.5  # of the weights of what may be stages: with less inside, these are the blocks


def locate_modules(model: PreTrainedModel) -> tuple[dict[str, PartKey], list[str]]:
    """Where each module of the network belongs, by path, and the paths of the blocks in forward order.

    Only modules inside of a block have no place of their own: theirs is the block's.

    Args:
        model: Without adapters.

    Raises:
        ModelError: If the network can't be built from its config alone, or run, or no chain of blocks is in it.
    """
    return _locate_modules(type(model), json.dumps(model.config.to_dict(), sort_keys=True, default=str))


@lru_cache(maxsize=128)
def _locate_modules(kind: type[PreTrainedModel], config_text: str) -> tuple[dict[str, PartKey], list[str]]:
    config: Any = cast(Any, kind.config_class).from_dict(json.loads(config_text))
    try:
        network = _build(kind, config)
        config.num_labels += 1
        resized = dict(_build(kind, config).named_parameters())
        calls = trace(network, _pixels(config))
    except Exception as error:  # the network's own code
        raise ModelError(f"the architecture {config.model_type!r} can't be traced: {first_line(error)}") from error
    modules = dict(network.named_modules())
    try:
        blocks = _longest_chain(modules, calls)
    except ModelError as error:
        raise ModelError(f"the architecture {config.model_type!r} is not supported: {error}") from error
    numbers = [tuple(int(number) for number in _NUMBER.findall(path)) for path in blocks]
    entries = [calls[path].entered for path in blocks]
    places: dict[str, PartKey] = dict(zip(blocks, numbers, strict=True))
    for path, entered in _entries(modules, calls):
        if not any(path == block or path.startswith(f"{block}.") for block in blocks):
            before = bisect_right(entries, entered)
            places[path] = "stem" if before == 0 else "norm" if before == len(blocks) else numbers[before]
    heads = (name for name, tensor in network.named_parameters() if tensor.shape != resized[name].shape)
    places.update((name.rpartition(".")[0], "head") for name in heads)
    return places, blocks


def _build(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return kind(config).eval()


def _pixels(config: Any) -> torch.Tensor:
    size = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", 224)
    height, width = size if isinstance(size, Sequence) else (size, size)
    return torch.zeros(2, getattr(config, "num_channels", 3), height, width, device="meta")


def _longest_chain(modules: Mapping[str, nn.Module], calls: dict[str, Call]) -> list[str]:
    """Paths of the numbered modules that hold most of the weights; of blocks in stages, those of the blocks.

    Raises:
        ModelError: If they don't run once each, in the order of their numbers.
    """
    chains: dict[str, list[str]] = defaultdict(list)
    for path, module in modules.items():
        if path.rpartition(".")[2].isdigit() and any(module.children()):
            chains[_NUMBER.sub("#", path)].append(path)
    weights = {
        shape: sum(tensor.numel() for path in paths for tensor in modules[path].parameters())
        for shape, paths in chains.items()
    }
    outer = max((shape for shape in weights if shape.count("#") == 1), key=weights.__getitem__, default=None)
    if outer is None:
        raise ModelError("it has no numbered modules that could be its blocks")
    inner = [
        shape
        for shape in weights
        if re.fullmatch(rf"{re.escape(outer)}(\.\w+)?\.#", shape) and _is_chain(chains[shape], calls)
    ]
    blocks = max(inner, key=weights.__getitem__, default=outer)
    if weights[blocks] < _MOST_OF * weights[outer]:
        blocks = outer
    if not _is_chain(chains[blocks], calls):
        raise ModelError(f"its blocks ({blocks}) don't run once each, one after the other")
    return chains[blocks]


def _is_chain(paths: list[str], calls: dict[str, Call]) -> bool:
    ran = [calls[path] for path in paths if path in calls and calls[path].times == 1]
    return len(ran) == len(paths) and all(one.left < other.entered for one, other in pairwise(ran))


def _entries(modules: Mapping[str, nn.Module], calls: dict[str, Call]) -> Iterator[tuple[str, float]]:
    """Path and time of entry of each module; one that doesn't run counts as the next that was registered."""
    entered = float("inf")
    for path in reversed(list(modules)):
        entered = calls[path].entered if path in calls else entered
        yield path, entered
