"""Stem, ordered blocks, norm and head of a network: every parameter and buffer belongs to exactly one part.

They are found in a forward pass on the meta device: no weights, and no table of families but for the oddities.
"""

import json
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from hfft.errors import ModelError, first_line
from hfft.model.trace import Call, trace

PEFT_PREFIX = "base_model.model."
"""What peft.PeftModel puts in front of the names of the model in it."""
_Place = str | tuple[int, ...]
"""`stem`, `norm`, `head`, or the numbers of a block: its own, and of several stages its stage's before."""
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_MOST_OF = 0.5  # of the weights of what may be stages: with less inside, these are the blocks
_TIMM_REST = (99999,)  # timm's mark for "with the group before": what follows the last block

# The oddities: families whose blocks run several times, as paths with `#` for a number, and their heads.
_OVERRIDES = {"perceiver": ("perceiver.encoder.self_attends.#", "perceiver.decoder.decoder.final_layer")}
# What AutoModelForImageClassification maps too, and why it can't be fine-tuned as images -> logits.
REFUSED: Mapping[str, str] = {
    "dinat": "its attention needs the package natten, which hfft isn't tested with",
    "imagegpt": "it reads colour clusters (input_ids), not pixels",
    "pp_lcnet": "its forward pass gives no logits, only last_hidden_state",
    "shieldgemma2": "it answers with the words yes and no, and has no classifier",
    "siglip2": "it reads patches with a mask and their grid (spatial_shapes), not images alone; the SigLIP 2 "
    "checkpoints of a fixed image size are of the architecture siglip, which is supported",
}


@dataclass(frozen=True)
class Part:
    """A piece of a network, with the names of its parameters and buffers."""

    name: str  # `stem`, `block 0` ..., `norm` or `head`
    stage: int | None  # of a block of a network with stages
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Anatomy:
    """The parts of a network in the order of the forward pass: stem, blocks, norm, head."""

    parts: tuple[Part, ...]

    @cached_property
    def blocks(self) -> tuple[Part, ...]:
        """The blocks alone."""
        return tuple(part for part in self.parts if part.name.startswith("block "))

    def part(self, name: str) -> Part:
        """The part of that name; ModelError if there is none."""
        for part in self.parts:
            if part.name == name:
                return part
        raise ModelError(
            f"no part is called {name!r}; the parts are stem, block 0..{len(self.blocks) - 1}, norm, head"
        )


def dissect(model: nn.Module) -> Anatomy:
    """Find the parts of a classifier; works on the meta device and on a model with PEFT adapters too.

    The blocks are the longest chain of numbered modules that run one after the other; the head is what depends on the
    number of classes. Any other tensor belongs to the block that runs next (a stage's downsampling), to the stem when
    it runs before every block, and to the norm when it runs after the last. Timm models say themselves where their
    blocks are; there, and in `_OVERRIDES`, the order of registration stands for that of the forward pass.

    Raises:
        ModelError: If the family can't be fine-tuned, or no chain of blocks or no head was found.
    """
    rules = _rules(model)
    blocks: dict[tuple[int, ...], list[str]] = {}
    others: dict[str, list[str]] = {"stem": [], "norm": [], "head": []}
    floating: list[str] = []
    for name in tensor_names(model):
        place = rules.place(name.removeprefix(PEFT_PREFIX))
        if place is None:
            floating.append(name)
        elif isinstance(place, str):
            others[place].append(name)
        else:
            (blocks.setdefault(place, []) if blocks else others["stem"]).extend(floating)
            floating = []
            blocks.setdefault(place, []).append(name)
    if not blocks or not others["head"]:
        config: Any = model.config
        raise ModelError(
            f"{config.model_type}: found {len(blocks)} blocks and {len(others['head'])} tensors in the head; "
            f"{rules.source}"
        )
    others["norm"] += floating
    stages = sorted({place[0] for place in blocks})  # from 0 on; SwiftFormer counts its downsampling in between
    ordered = [
        Part(f"block {number}", stages.index(place[0]) if len(place) > 1 else None, tuple(blocks[place]))
        for number, place in enumerate(sorted(blocks))
    ]
    stem, norm, head = (Part(name, None, tuple(tensors)) for name, tensors in others.items())
    return Anatomy((stem, *ordered, norm, head))


def head_modules(anatomy: Anatomy) -> list[str]:
    """Full names of the head's modules that own weights: with an adapter they train in full."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in anatomy.part("head").tensors))


def block_paths(model: nn.Module) -> list[str]:
    """Full names of the modules that the blocks of a network are, adapted or not, in the order of registration.

    What else belongs to a block, such as the downsampling in front of it, is left out, and for timm models what their
    group matcher takes for a block may be a part of one.
    """
    rules = _rules(model)
    names = dict.fromkeys(rules.block(name.removeprefix(PEFT_PREFIX)) for name in tensor_names(model))
    return [name for name, _ in model.named_modules() if name.removeprefix(PEFT_PREFIX) in names]


def tensor_names(model: nn.Module) -> Iterator[str]:
    """Names of all parameters and buffers, module by module in registration order, shared ones once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{prefix}.{name}" if prefix else name


class _Rules(NamedTuple):
    """Where the tensors of a network belong, by name without PEFT's prefix, and how that is known."""

    place: Callable[[str], _Place | None]  # None is with what is registered next
    block: Callable[[str], str | None]  # path of the block that a tensor is in
    source: str


def _rules(model: nn.Module) -> _Rules:
    config: Any = model.config
    family = str(config.model_type)
    if family in REFUSED:
        raise ModelError(f"the architecture {family!r} can't be fine-tuned: {REFUSED[family]}")
    if family == "timm_wrapper":
        return _pattern_rules(_timm_patterns(model))
    if family in _OVERRIDES:
        escaped = (re.escape(path).replace(r"\#", r"(\d+)") + r"\." for path in _OVERRIDES[family])
        return _pattern_rules([(pattern, kind, ()) for pattern, kind in zip(escaped, ("block", "head"), strict=True)])
    from peft import PeftModel  # which networks of known families don't need

    network = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    config_text = json.dumps(network.config.to_dict(), sort_keys=True, default=str)
    places, blocks = _locate_modules(type(network), config_text)

    def owner(name: str) -> str:
        """The innermost module around a tensor that has a place."""
        while name not in places:
            name = name.rpartition(".")[0]
        return name

    return _Rules(
        place=lambda name: places[owner(name)],
        block=lambda name: owner(name) if owner(name) in blocks else None,
        source="the head is what depends on the number of classes",
    )


def _pattern_rules(patterns: Sequence[tuple[str, str, tuple[int, ...]]]) -> _Rules:
    """Ordered patterns: a name belongs to the place of the first that matches; groups number the block."""

    def matching(name: str) -> tuple[re.Match[str] | None, str | None, tuple[int, ...]]:
        found = ((re.match(pattern, name), kind, suffix) for pattern, kind, suffix in patterns)
        return next((one for one in found if one[0]), (None, None, ()))

    def place(name: str) -> _Place | None:
        match, kind, suffix = matching(name)
        if match is None or kind != "block":
            return kind
        return (*(int(number) for number in match.groups() if number is not None), *suffix)

    def block(name: str) -> str | None:
        match, kind, _ = matching(name)
        return match.group().rstrip(".") if match and kind == "block" else None

    return _Rules(place, block, "looked for " + ", ".join(f"{kind} at {pattern}" for pattern, kind, _ in patterns))


def _timm_patterns(model: nn.Module) -> list[tuple[str, str, tuple[int, ...]]]:
    """Timm's own classifier and group matcher, which every timm model brings for layer-wise learning rates."""
    network: Any = next(module for name, module in model.named_modules() if name.endswith("timm_model"))
    where = f"timm's {model.config.architecture}"  # pyright: ignore[reportAttributeAccessIssue]
    try:
        matcher = network.group_matcher(coarse=False)
        classifiers = network.get_classifier()
    except (AttributeError, NotImplementedError, AssertionError) as error:
        raise ModelError(f"{where} does not say where its blocks are (group_matcher)") from error
    if not isinstance(matcher, dict) or "blocks" not in matcher:
        raise ModelError(f"{where} does not name its blocks (group_matcher)")
    heads = {id(head) for head in (classifiers if isinstance(classifiers, tuple | list) else [classifiers])}
    paths = [name for name, module in network.named_modules() if id(module) in heads]
    patterns: list[tuple[str, str, tuple[int, ...]]] = [
        (re.escape(f"timm_model.{path}") + r"\.", "head", ()) for path in paths
    ]
    for kind, entries in (("block", matcher["blocks"]), ("stem", matcher.get("stem") or ())):
        for pattern, suffix in [(entries, None)] if isinstance(entries, str) else entries:
            if suffix != _TIMM_REST:  # names here have the wrapper's prefix
                patterns.append((rf"timm_model\.(?:{pattern.replace('^', '')})", kind, suffix or ()))
    return patterns


@lru_cache(maxsize=128)
def _locate_modules(kind: type[PreTrainedModel], config_text: str) -> tuple[dict[str, _Place], list[str]]:
    """Where each module of a network belongs, by path, and the paths of the blocks in forward order.

    Only modules inside of a block have no place of their own: theirs is the block's.

    Raises:
        ModelError: If the network can't be built from its config alone, or run, or no chain of blocks is in it.
    """
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
    places: dict[str, _Place] = dict(zip(blocks, numbers, strict=True))
    entered = float("inf")
    for path in reversed(list(modules)):  # a module that doesn't run counts as the next that was registered
        entered = calls[path].entered if path in calls else entered
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


def _longest_chain(modules: Mapping[str, nn.Module], calls: Mapping[str, Call]) -> list[str]:
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


def _is_chain(paths: Sequence[str], calls: Mapping[str, Call]) -> bool:
    ran = [calls[path] for path in paths if path in calls and calls[path].times == 1]
    return len(ran) == len(paths) and all(one.left < other.entered for one, other in pairwise(ran))
