"""A phase and a model -> what trains, at which rates, for how many steps, in how much memory."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from hfft.errors import ModelError, RecipeError
from hfft.model.adapters import attach, check_adapter, is_adapter_tensor
from hfft.model.anatomy import Anatomy, dissect
from hfft.model.freezing import frozen_parts, set_modes, set_trainable, trainable_names, unused_parameters
from hfft.model.restoring import left_as_it_was
from hfft.recipe.arguments import AUTO
from hfft.recipe.dependencies import warms_up
from hfft.recipe.spec import PhaseSpec
from hfft.runs.record import Group, Plan
from hfft.training.failures import ONE_VALUE

# transformers.TrainingArguments' own defaults, read in 5.23; tests/unit/training/test_plan.py compares them.
_DEFAULTS = {
    "learning_rate": 5e-5,
    "weight_decay": 0.0,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "dataloader_drop_last": False,
}
_KERNELS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
_SEVERAL_KERNELS = (nn.MultiheadAttention, nn.RNNBase)  # such as in_proj_weight and weight_hh_l0


def expand_phases(phases: Sequence[PhaseSpec], blocks: int) -> tuple[PhaseSpec, ...]:
    """The phases with each gradual one replaced by those that it stands for, for a network of so many blocks.

    Raises:
        ModelError: If a gradual phase asks for more blocks than there are.
        RecipeError: If two phases would have one name.
    """
    expanded: list[PhaseSpec] = []
    for phase in phases:
        if phase.gradual is None:
            expanded.append(phase)
            continue
        step = phase.gradual.blocks_per_phase
        last = blocks if phase.gradual.blocks == "all" else phase.gradual.blocks
        if last > blocks:
            raise ModelError(
                f"phases.{phase.name}.gradual.blocks: asked for the last {last}, but the network has {blocks}"
            )
        for number, released in enumerate([*range(step, last, step), last], start=1):
            name = f"{phase.name}-{number}"
            expanded.append(replace(phase, name=name, gradual=None, unfreeze={"blocks": released}))
    names = [phase.name for phase in expanded]
    if len(set(names)) < len(names):
        raise RecipeError(f"phases: a gradual phase stands for phases of the same name as others: {', '.join(names)}")
    return tuple(expanded)


def prepare_phase(model: Any, spec: PhaseSpec, pixels: torch.Tensor | None = None) -> Any:
    """Set up a model for a phase: attach its adapter, or unfreeze its parts.

    Args:
        model: A plain classifier, changed in place; may be on the meta device.
        spec: The phase.
        pixels: An image as the network takes it, (1, C, H, W), where the model is. With it, parameters that the
            network never uses (DINOv2's mask token) stay frozen, as DistributedDataParallel would wait for their
            gradients, and an adapter that the network can't use is refused.

    Returns:
        The model, wrapped by PEFT for an adapter phase.

    Raises:
        ModelError: If the network doesn't have what the phase asks for.
    """
    if spec.adapter is not None:
        set_trainable(model, set())
        model = attach(model, spec.adapter)
    else:
        set_trainable(model, trainable_names(model, dissect(model), spec.unfreeze))
    if pixels is not None:
        _probe(model, pixels)
    return model


def _probe(model: Any, pixels: torch.Tensor) -> None:
    try:
        if hasattr(model, "peft_config"):
            check_adapter(model, pixels)
        else:
            unused = unused_parameters(model, pixels)
            for name, parameter in model.named_parameters():
                if name in unused:
                    parameter.requires_grad_(False)
    except RuntimeError as error:
        if "meta tensor" not in str(error):  # a network that reads values (Perceiver) can't be probed without them
            raise


def plan_phase(model: nn.Module, spec: PhaseSpec, *, images: int, processes: int = 1) -> Plan:
    """Plan a phase of a model that `prepare_phase` has set up.

    Args:
        model: The classifier; shapes suffice.
        spec: The phase.
        images: Number of training images.
        processes: Number of processes that share them.

    Raises:
        RecipeError: If no batch is left.
    """
    anatomy = dissect(model)
    arguments = {**_DEFAULTS, **spec.arguments}
    parameters = dict(model.named_parameters())
    trainable = sum(value.numel() for value in parameters.values() if value.requires_grad)
    total = sum(value.numel() for value in parameters.values())
    steps, epochs = duration(spec, images, processes)
    return Plan(
        phase=spec.name,
        trains=_in_words(model, anatomy),
        trainable=trainable,
        total=total,
        groups=parameter_groups(model, anatomy, spec, arguments),
        images=images,
        batch=arguments["per_device_train_batch_size"] * processes * arguments["gradient_accumulation_steps"],
        device_batch=arguments["per_device_train_batch_size"],
        steps=steps,
        epochs=epochs,
        state_bytes=4 * total + 12 * trainable,
        processes=processes,
        shares=_shares(images, arguments, processes),
        frozen_share=_frozen_share(model, anatomy),
    )


def duration(spec: PhaseSpec, images: int, processes: int = 1) -> tuple[int, float]:
    """Optimizer steps of a phase, and how many passes over the training images they are.

    Args:
        spec: The phase.
        images: Number of training images.
        processes: Number of processes that share them.

    Raises:
        RecipeError: If no batch is left.
    """
    arguments = {**_DEFAULTS, **spec.arguments}
    batches = _batches(spec, images, arguments, processes) / processes
    batches = math.floor(batches) if arguments["dataloader_drop_last"] else math.ceil(batches)
    per_epoch = max(math.ceil(batches / arguments["gradient_accumulation_steps"]), 1)
    max_steps = arguments["max_steps"]
    steps = max_steps if max_steps > 0 else math.ceil(arguments["num_train_epochs"] * per_epoch)
    return steps, steps / per_epoch


def parameter_groups(
    model: nn.Module, anatomy: Anatomy, spec: PhaseSpec, arguments: Mapping[str, Any]
) -> tuple[Group, ...]:
    """Trainable parameters by part, each with its rate, split into those with and without weight decay.

    A part's rate is the phase's, times `layer_decay` once per block from the head down: the head and the norm get
    the full rate, the last block one factor less, and so on to the stem
    (BEiT fine-tuning, https://hf.co/papers/2106.08254). `head_learning_rate` replaces the head's. Weight decay falls
    on kernels alone: never on biases, norms, scales, temperatures, positions and tokens.
    """
    parameters = dict(model.named_parameters())
    groups = []
    depth = len(anatomy.blocks)
    for place, part in enumerate(anatomy.parts):
        below_head = max(depth + 1 - place, 0)  # norm and head: 0, last block: 1, ..., stem: depth + 1
        asked = arguments["learning_rate"]
        rate = None if asked == AUTO else asked * spec.layer_decay**below_head
        if part.name == "head" and spec.head_learning_rate is not None:
            rate = spec.head_learning_rate
        names = [name for name in part.tensors if name in parameters and parameters[name].requires_grad]
        decayed = [name for name in names if _decays(model, name, parameters[name])]
        plain = [name for name in names if name not in decayed]
        for chosen, decay in ((decayed, float(arguments["weight_decay"])), (plain, 0.0)):
            if chosen:
                groups.append(Group(part.name, tuple(chosen), rate, decay))
    return tuple(groups)


def activation_bytes(model: nn.Module, shape: tuple[int, ...], batchnorm: str = "eval") -> int | None:
    """Bytes of float32 activations that one training step keeps, without weights.

    A forward pass is made in which autograd reports what it saves: what a frozen part computes before the first
    trainable parameter is not saved, and counts nothing. On the meta device this takes no memory itself.
    Kernels differ in what they save (attention most): another device may need some 20 % more or less.

    Args:
        model: As `prepare_phase` left it.
        shape: Of the pixels, (B, C, H, W).
        batchnorm: The phase's.

    Returns:
        The bytes, or None for a network whose forward pass reads values, which there are none of on the meta device.
    """
    device = next(model.parameters()).device
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor  # and autograd keeps it, so that no storage is used twice

    try:
        with left_as_it_was(model), saved_tensors_hooks(note, lambda tensor: tensor):
            set_modes(model, batchnorm)
            outputs = model(pixel_values=torch.zeros(shape, device=device))  # holds what was saved
    except RuntimeError as error:
        if "meta tensor" not in str(error):
            raise
        return None
    del outputs
    return sum(kept.values())


def check_phase(spec: PhaseSpec, plan: Plan, model: nn.Module, shape: tuple[int, ...], *, validates: bool) -> None:
    """Refuse a phase that would fail in its course: see the functions below.

    Args:
        spec: The phase.
        plan: Of the phase.
        model: As `prepare_phase` left it; may be on the meta device.
        shape: The pixels', (1, C, H, W).
        validates: Whether there are validation images.
    """
    _check_course(spec, plan, validates=validates)
    _check_batchnorm(spec, plan, model, shape)


def _check_course(spec: PhaseSpec, plan: Plan, *, validates: bool) -> None:
    """Refuse a warm-up that leaves no step at the learning rate, and evaluations that would begin after the end."""
    where, asked = f"phases.{spec.name}", float(spec.arguments.get("warmup_steps") or 0)
    warmup = int(asked) if asked >= 1 else math.ceil(plan.steps * asked)  # as transformers 5.24 has it
    steps = f"{plan.steps:,} {'step' if plan.steps == 1 else 'steps'}"
    if warmup >= plan.steps and warms_up(spec.arguments):
        raise RecipeError(
            f"{where}.warmup_steps: found {asked:g}, and the phase has {steps}: none would have its learning rate; "
            "set fewer, a share of the steps such as 0.1, or 0"
        )
    delay, strategy = spec.arguments.get("eval_delay") or 0, spec.arguments.get("eval_strategy", "epoch")
    end, unit = (plan.epochs, "epochs") if strategy == "epoch" else (plan.steps, "steps")
    if validates and strategy != "no" and delay > end:
        raise RecipeError(
            f"{where}.eval_delay: found {delay:g}, and the phase ends after {end:g} {unit}, without an evaluation; "
            "set less, or eval_strategy: no"
        )


def _check_batchnorm(spec: PhaseSpec, plan: Plan, model: nn.Module, shape: tuple[int, ...]) -> None:
    """Refuse batches of one image where a BatchNorm trains that needs several."""
    shares = spec.batchnorm == "sync" and plan.processes > 1
    if spec.batchnorm == "eval" or shares:
        return
    last = plan.images % plan.device_batch
    has_last = plan.processes == 1 and last == 1 and not spec.arguments.get("dataloader_drop_last")
    if (plan.device_batch == 1 or has_last) and _refuses_one_image(model, shape, spec.batchnorm):
        which = "each batch has" if plan.device_batch == 1 else f"the last batch of {plan.images:,} images has"
        advice = "" if plan.device_batch == 1 else "dataloader_drop_last: true, or "
        raise RecipeError(
            f"phases.{spec.name}.batchnorm: {spec.batchnorm!r} takes statistics of each batch, and {which} one "
            f"image, which is too few for this network; set {advice}another per_device_train_batch_size"
        )


def _refuses_one_image(model: nn.Module, shape: tuple[int, ...], batchnorm: str) -> bool:
    """Whether a BatchNorm that is trained has a single value per channel where a batch has one image."""
    try:
        with left_as_it_was(model), torch.no_grad():
            set_modes(model, batchnorm)
            model(pixel_values=torch.zeros(shape, device=next(model.parameters()).device))
    except ValueError as error:
        if ONE_VALUE not in str(error):
            raise
        return True
    except RuntimeError as error:
        if "meta tensor" not in str(error):
            raise
    return False


def _batches(spec: PhaseSpec, images: int, arguments: Mapping[str, Any], processes: int) -> int:
    size, drops = arguments["per_device_train_batch_size"], arguments["dataloader_drop_last"]
    batches = images // size if drops else math.ceil(images / size)
    if batches >= processes:
        return batches
    if processes == 1:
        problem = (
            f"a batch of {size} is larger than the {images} training images, and dataloader_drop_last leaves it out"
        )
    elif drops:
        problem = (
            f"{processes} processes with batches of {size} need {processes * size} images for a step, there are "
            f"{images}, and dataloader_drop_last leaves them out; {_fewer(images, size, batches, processes)}"
        )
    else:
        problem = (
            f"{images} training images are {batches} {'batch' if batches == 1 else 'batches'} of {size}, so that "
            f"{processes - batches} of {processes} processes would never see one; "
            f"{_fewer(images, size, batches, processes)}"
        )
    raise RecipeError(f"phases.{spec.name}: {problem}")


def _fewer(images: int, size: int, batches: int, processes: int) -> str:
    """What to do where there are fewer batches than processes."""
    if batches == 0:
        return f"launch 1 with per_device_train_batch_size={images}"
    smaller = f", or set per_device_train_batch_size={images // processes}" if images >= processes else ""
    return f"launch {batches}{smaller}"


def _shares(images: int, arguments: Mapping[str, Any], processes: int) -> tuple[int, int]:
    """Images per epoch of the last process and of the first: whole batches are dealt in turn."""
    size = arguments["per_device_train_batch_size"]
    rounds, rest = divmod(images, size * processes)
    if arguments["dataloader_drop_last"]:
        return rounds * size, rounds * size
    return rounds * size + max(rest - (processes - 1) * size, 0), rounds * size + min(rest, size)


def _decays(model: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a kernel: a matrix of a layer that multiplies with it, known by layer and shape.

    Of a class that is not torch's own, it is what is called `weight` and more than a scale for each channel
    (ConvNeXt V2's grn.weight is (1, 1, 1, C)).
    """
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if parameter.ndim < 2 or isinstance(owner, nn.Embedding):
        return False
    if isinstance(owner, _SEVERAL_KERNELS):
        return "weight" in leaf
    return leaf == "weight" and (isinstance(owner, _KERNELS) or parameter.numel() > max(parameter.shape))


def _frozen_share(model: nn.Module, anatomy: Anatomy) -> float:
    """For example 0.75: the last three of twelve blocks train; blocks are about alike in what they cost."""
    frozen = frozen_parts(model, anatomy)
    if "stem" not in frozen and anatomy.part("stem").tensors:
        return 0.0
    behind = [number for number, block in enumerate(anatomy.blocks) if block.name not in frozen]
    return behind[0] / len(anatomy.blocks) if behind else 1.0


def _in_words(model: nn.Module, anatomy: Anatomy) -> str:
    """For example `blocks 8-11 of 12, norm, head`; `adapter in blocks 0-11 of 12, head`."""
    frozen = frozen_parts(model, anatomy)
    blocks = [number for number, block in enumerate(anatomy.blocks) if block.name not in frozen]
    words = ["stem"] if "stem" not in frozen else []
    if blocks:
        spans = ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in _spans(blocks))
        adapter = "adapter in " if any(is_adapter_tensor(name) for name, _ in model.named_parameters()) else ""
        words.append(f"{adapter}block{'s' if len(blocks) > 1 else ''} {spans} of {len(anatomy.blocks)}")
    has_norm = any(name in dict(model.named_parameters()) for name in anatomy.part("norm").tensors)
    words += ["norm"] if "norm" not in frozen and has_norm else []
    return ", ".join([*words, "head"])


def _spans(numbers: list[int]) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number, number))
    return spans
