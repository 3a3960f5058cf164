"""Stem, ordered blocks, norm and head of a network: every parameter and buffer belongs to exactly one part."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from hfft.errors import ModelError

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


@dataclass(frozen=True)
class _Layout:
    """Where a family keeps its parts; `#` stands for a number, the first of two being the stage.

    Attributes:
        blocks: Path of a block.
        heads: Paths of the classifiers.
        entry: Path of what runs before a stage's first block where it isn't registered just before that block;
            stage 0's belongs to the stem.
    """

    blocks: str
    heads: tuple[str, ...] = ("classifier",)
    entry: str | None = None


# Read in transformers 5.20 to 5.24; tests/unit/model/test_anatomy.py runs each and compares the order with a trace.
_LAYOUTS = {
    "beit": _Layout("beit.layers.#"),
    "bit": _Layout("bit.encoder.stages.#.layers.#"),
    "clip": _Layout("vision_model.encoder.layers.#"),
    "convnext": _Layout("convnext.encoder.stages.#.layers.#", entry="convnext.encoder.stages.#.downsampling_layer"),
    "convnextv2": _Layout(
        "convnextv2.encoder.stages.#.layers.#", entry="convnextv2.encoder.stages.#.downsampling_layer"
    ),
    "cvt": _Layout("cvt.encoder.stages.#.layers.#"),
    "data2vec-vision": _Layout("data2vec_vision.encoder.layer.#"),
    "deit": _Layout("deit.layers.#", ("classifier", "cls_classifier", "distillation_classifier")),
    "dinov2": _Layout("dinov2.encoder.layer.#"),
    "dinov2_with_registers": _Layout("dinov2_with_registers.encoder.layer.#"),
    "donut-swin": _Layout("donut.encoder.layers.#.blocks.#"),
    "efficientnet": _Layout("efficientnet.encoder.blocks.#"),
    "focalnet": _Layout("focalnet.encoder.stages.#.layers.#"),
    "hgnet_v2": _Layout("encoder.stages.#.blocks.#", ("fc",)),
    "hiera": _Layout("hiera.encoder.stages.#.layers.#"),
    "ijepa": _Layout("ijepa.layers.#"),
    "levit": _Layout("levit.encoder.stages.#.layers.#", ("classifier.linear", "classifier_distill.linear")),
    "metaclip_2": _Layout("vision_model.encoder.layers.#"),
    "mobilenet_v1": _Layout("mobilenet_v1.layer.#"),
    "mobilenet_v2": _Layout("mobilenet_v2.layer.#"),
    "mobilevit": _Layout("mobilevit.encoder.layer.#"),
    "mobilevitv2": _Layout("mobilevitv2.encoder.layer.#"),
    "perceiver": _Layout("perceiver.encoder.self_attends.#", ("perceiver.decoder.decoder.final_layer",)),
    "poolformer": _Layout("poolformer.encoder.block.#.#", entry="poolformer.encoder.patch_embeddings.#"),
    "pvt": _Layout("pvt.encoder.block.#.#", entry="pvt.encoder.patch_embeddings.#"),
    "pvt_v2": _Layout("pvt_v2.encoder.layers.#.blocks.#"),
    "regnet": _Layout("regnet.encoder.stages.#.layers.#"),
    "resnet": _Layout("resnet.encoder.stages.#.layers.#"),
    "segformer": _Layout("segformer.stages.#.blocks.#"),
    "siglip": _Layout("vision_model.encoder.layers.#"),
    "swiftformer": _Layout("swiftformer.encoder.network.#.blocks.#", ("head", "dist_head")),
    "swin": _Layout("swin.encoder.layers.#.blocks.#"),
    "swinv2": _Layout("swinv2.encoder.layers.#.blocks.#"),
    "textnet": _Layout("textnet.encoder.stages.#.stage.#", ("fc",)),
    "vit": _Layout("vit.layers.#"),
    "vit_msn": _Layout("vit.layers.#"),
}
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

    A tensor outside of all blocks and the head belongs to the block registered next (a stage's downsampling), to the
    stem when it comes before every block, and to the norm when it comes after the last.

    Args:
        model: What AutoModelForImageClassification returned, or a PeftModel around it.

    Raises:
        ModelError: If the family can't be fine-tuned or is unknown, or its parts are not where they should be.
    """
    config: Any = model.config
    family = str(config.model_type)
    rules = _timm_rules(model) if family == "timm_wrapper" else _family_rules(family)
    blocks: dict[tuple[int, ...], list[str]] = {}
    stem: list[str] = []
    head: list[str] = []
    floating: list[str] = []
    for name in tensor_names(model):
        place = rules.place(name.removeprefix(PEFT_PREFIX))
        if place is None:
            floating.append(name)
        elif isinstance(place, str):
            (head if place == "head" else stem).append(name)
        else:
            (blocks.setdefault(place, []) if blocks else stem).extend(floating)
            floating = []
            blocks.setdefault(place, []).append(name)
    if not blocks or not head:
        raise ModelError(
            f"{family}: found {len(blocks)} blocks and {len(head)} tensors in the head; {rules.describe()}"
        )
    stages = sorted({place[0] for place in blocks})  # from 0 on; SwiftFormer counts its downsampling in between
    ordered = [
        Part(f"block {number}", stages.index(place[0]) if len(place) > 1 else None, tuple(blocks[place]))
        for number, place in enumerate(sorted(blocks))
    ]
    return Anatomy((Part("stem", None, tuple(stem)), *ordered, _part("norm", floating), _part("head", head)))


def head_modules(anatomy: Anatomy) -> list[str]:
    """Full names of the head's modules that own weights: they train in full beside an adapter."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in anatomy.part("head").tensors))


def block_modules(model: nn.Module) -> list[str]:
    """Full names of the modules that the blocks are, in the order of registration.

    What else belongs to a block, such as the downsampling in front of it, is left out, and for timm models what their
    group matcher takes for a block may be a part of one.

    Args:
        model: What AutoModelForImageClassification returned, or a PeftModel around it.
    """
    config: Any = model.config
    family = str(config.model_type)
    rules = _timm_rules(model) if family == "timm_wrapper" else _family_rules(family)
    names = dict.fromkeys(rules.block(name.removeprefix(PEFT_PREFIX)) for name in tensor_names(model))
    return [name for name, _ in model.named_modules() if name.removeprefix(PEFT_PREFIX) in names]


def families() -> tuple[str, ...]:
    """Model types whose anatomy is known; `timm_wrapper` stands for every timm model with a group matcher."""
    return (*_LAYOUTS, "timm_wrapper")


def tensor_names(model: nn.Module) -> Iterator[str]:
    """Names of all parameters and buffers, module by module in registration order, shared ones once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{prefix}.{name}" if prefix else name


@dataclass(frozen=True)
class _Rules:
    """Ordered patterns: a name belongs to the place of the first that matches; groups number the block."""

    patterns: tuple[tuple[re.Pattern[str], str, tuple[int, ...]], ...]

    def place(self, name: str) -> str | tuple[int, ...] | None:
        for pattern, kind, suffix in self.patterns:
            match = pattern.match(name)
            if match and kind == "block":
                return (*(int(number) for number in match.groups() if number is not None), *suffix)
            if match and kind == "entry":
                stage = int(match.group(1))
                return (stage, 0) if stage > 0 else "stem"
            if match:
                return kind
        return None

    def block(self, name: str) -> str | None:
        """The beginning of a tensor's name that says in which block it is."""
        for pattern, kind, _ in self.patterns:
            match = pattern.match(name)
            if match:
                return match.group().rstrip(".") if kind == "block" else None
        return None

    def describe(self) -> str:
        return "looked for " + ", ".join(f"{kind} at {pattern.pattern}" for pattern, kind, _ in self.patterns)


def _part(name: str, tensors: list[str]) -> Part:
    return Part(name, None, tuple(tensors))


def _family_rules(family: str) -> _Rules:
    if family in REFUSED:
        raise ModelError(f"the architecture {family!r} can't be fine-tuned: {REFUSED[family]}")
    if family not in _LAYOUTS:
        raise ModelError(f"the architecture {family!r} is not supported yet; supported: {', '.join(families())}")
    layout = _LAYOUTS[family]
    rules = [
        *((_path_pattern(head), "head", ()) for head in layout.heads),
        (_path_pattern(layout.blocks), "block", ()),
    ]
    if layout.entry is not None:
        rules.append((_path_pattern(layout.entry), "entry", ()))
    return _Rules(tuple(rules))


def _path_pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.escape(path).replace(r"\#", r"(\d+)") + r"\.")


def _timm_rules(model: nn.Module) -> _Rules:
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
    return _Rules(tuple(rules))


def _entries(spec: str | list | tuple | None) -> list[tuple[str, tuple[int, ...] | None]]:
    if spec is None:
        return []
    return [(spec, None)] if isinstance(spec, str) else [(entry[0], entry[1]) for entry in spec]


def _timm_pattern(pattern: str) -> re.Pattern[str]:
    """Timm's patterns are matched against names without the wrapper's prefix."""
    return re.compile(rf"timm_model\.(?:{pattern.replace('^', '')})")
