"""Stem, ordered blocks, norm and head of a network: every parameter and buffer belongs to exactly one part."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

from torch import nn
from transformers import PreTrainedModel

from hfft.errors import ModelError
from hfft.model.chain import PartKey, locate_modules

PEFT_PREFIX = "base_model.model."
"""What peft.PeftModel puts in front of the names of the model in it."""


@dataclass(frozen=True)
class Part:
    """A piece of a network.

    Attributes:
        name: `stem`, `block 0` ..., `norm` or `head`.
        stage: For a block of a network with stages, the stage's number.
        tensors: Names of its parameters and buffers, as the model names them.
    """

    name: str
    stage: int | None
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
        """The part of that name.

        Raises:
            ModelError: If there is none.
        """
        for part in self.parts:
            if part.name == name:
                return part
        raise ModelError(
            f"no part is called {name!r}; the parts are stem, block 0..{len(self.blocks) - 1}, norm, head"
        )


# The oddities: families whose blocks run several times, as paths with `#` for a number, and their heads.
_OVERRIDES = {"perceiver": ("perceiver.encoder.self_attends.#", ("perceiver.decoder.decoder.final_layer",))}
# What AutoModelForImageClassification maps too, and why it can't be fine-tuned as images -> logits.
REFUSED: Mapping[str, str] = {
    "dinat": "its attention needs the package natten, which hfft isn't tested with",
    "imagegpt": "it reads colour clusters (input_ids), not pixels",
    "pp_lcnet": "its forward pass gives no logits, only last_hidden_state",
    "shieldgemma2": "it answers with the words yes and no, and has no classifier",
    "siglip2": "it reads patches with a mask and their grid (spatial_shapes), not images alone; the SigLIP 2 "
    "checkpoints of a fixed image size are of the architecture siglip, which is supported",
}


def dissect(model: nn.Module) -> Anatomy:
    """Find the parts of a classifier; works on the meta device and on a model with PEFT adapters too.

    The blocks are the longest chain of numbered modules that run one after the other; the head is what depends on the
    number of classes. Any other tensor belongs to the block that runs next (a stage's downsampling), to the stem when
    it runs before every block, and to the norm when it runs after the last. Timm models say themselves where their
    blocks are; there, and in `_OVERRIDES`, the order of registration stands for that of the forward pass.

    Args:
        model: What AutoModelForImageClassification returned, or a PeftModel around it.

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
            f"{rules.describe()}"
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
    """Full names of the modules that the blocks are, in the order of registration.

    What else belongs to a block, such as the downsampling in front of it, is left out, and for timm models what their
    group matcher takes for a block may be a part of one.

    Args:
        model: What AutoModelForImageClassification returned, or a PeftModel around it.
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


class _Rules(Protocol):
    """Where the tensors of a network belong, by name without PEFT's prefix."""

    def place(self, name: str) -> PartKey | None:
        """`stem`, `norm`, `head`, the numbers of a block, or None: with what is registered next."""
        ...

    def block(self, name: str) -> str | None:
        """The path of the block that a tensor is in."""
        ...

    def describe(self) -> str: ...


@dataclass(frozen=True)
class _Patterns:
    """Ordered patterns: a name belongs to the place of the first that matches; groups number the block."""

    patterns: tuple[tuple[re.Pattern[str], str, tuple[int, ...]], ...]

    def place(self, name: str) -> PartKey | None:
        for pattern, kind, suffix in self.patterns:
            match = pattern.match(name)
            if match and kind == "block":
                return (*(int(number) for number in match.groups() if number is not None), *suffix)
            if match:
                return kind
        return None

    def block(self, name: str) -> str | None:
        for pattern, kind, _ in self.patterns:
            match = pattern.match(name)
            if match:
                return match.group().rstrip(".") if kind == "block" else None
        return None

    def describe(self) -> str:
        return "looked for " + ", ".join(f"{kind} at {pattern.pattern}" for pattern, kind, _ in self.patterns)


@dataclass(frozen=True)
class _Places:
    """Where each module outside of the blocks belongs, and the blocks."""

    places: Mapping[str, PartKey]
    blocks: frozenset[str]

    def place(self, name: str) -> PartKey:
        return self.places[self._owner(name)]

    def block(self, name: str) -> str | None:
        owner = self._owner(name)
        return owner if owner in self.blocks else None

    def _owner(self, name: str) -> str:
        """The innermost module around a tensor that has a place."""
        while name not in self.places:
            name = name.rpartition(".")[0]
        return name

    def describe(self) -> str:
        return "the head is what depends on the number of classes"


def _rules(model: nn.Module) -> _Rules:
    config: Any = model.config
    family = str(config.model_type)
    if family in REFUSED:
        raise ModelError(f"the architecture {family!r} can't be fine-tuned: {REFUSED[family]}")
    if family == "timm_wrapper":
        return _timm_rules(model)
    if family in _OVERRIDES:
        blocks, heads = _OVERRIDES[family]
        return _Patterns(
            (*((_path_pattern(head), "head", ()) for head in heads), (_path_pattern(blocks), "block", ()))
        )
    from peft import PeftModel  # which networks of known families don't need

    network = model.get_base_model() if isinstance(model, PeftModel) else model
    places, paths = locate_modules(cast(PreTrainedModel, network))
    return _Places(places, frozenset(paths))


def _path_pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.escape(path).replace(r"\#", r"(\d+)") + r"\.")


def _timm_rules(model: nn.Module) -> _Patterns:
    """Timm's own classifier and group matcher, which every timm model brings for layer-wise learning rates."""
    network = next(module for name, module in model.named_modules() if name.endswith("timm_model"))
    where = f"timm's {model.config.architecture}"  # pyright: ignore[reportAttributeAccessIssue]
    try:
        matcher = network.group_matcher(coarse=False)  # pyright: ignore[reportCallIssue]
        classifiers = network.get_classifier()  # pyright: ignore[reportCallIssue]
    except (AttributeError, NotImplementedError, AssertionError) as error:
        raise ModelError(f"{where} does not say where its blocks are (group_matcher)") from error
    if not isinstance(matcher, dict) or "blocks" not in matcher:
        raise ModelError(f"{where} does not name its blocks (group_matcher)")
    heads = {id(head) for head in (classifiers if isinstance(classifiers, tuple | list) else [classifiers])}
    rules = [
        (re.compile(re.escape(f"timm_model.{name}") + r"\."), "head", ())
        for name, module in network.named_modules()
        if id(module) in heads
    ]
    for kind, key in (("block", "blocks"), ("stem", "stem")):
        rules += [
            (_timm_pattern(pattern), kind, suffix or ())
            for pattern, suffix in _entries(matcher.get(key))
            if suffix != (99999,)  # timm's mark for "with the group before": what follows the last block
        ]
    return _Patterns(tuple(rules))


def _entries(spec: str | list | tuple | None) -> list[tuple[str, tuple[int, ...] | None]]:
    if spec is None:
        return []
    return [(spec, None)] if isinstance(spec, str) else [(entry[0], entry[1]) for entry in spec]


def _timm_pattern(pattern: str) -> re.Pattern[str]:
    """Timm's patterns are matched against names without the wrapper's prefix."""
    return re.compile(rf"timm_model\.(?:{pattern.replace('^', '')})")
