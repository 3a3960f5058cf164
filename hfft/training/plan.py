"""A phase and a model -> what trains, at which rates, for how many steps, in how much memory."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import TrainingArguments

from hfft.errors import ModelError, RecipeError
from hfft.model.adapters import attach, check_adapter, is_adapter_tensor
from hfft.model.anatomy import Anatomy, dissect
from hfft.model.freezing import frozen_parts, set_modes, set_trainable, trainable_names, unused_parameters
from hfft.model.restoring import left_as_it_was
from hfft.recipe.contradictions import warms_up
from hfft.recipe.spec import PhaseSpec
from hfft.runs.record import Group, Plan
from hfft.training.failures import ONE_VALUE
from hfft.training.solved_head import WEIGHT_DECAYS, solvable_head

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
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
            where = f"phases.{phase.name}.gradual.blocks"
            raise ModelError(f"{where}: asked for the last {last}, but the network has {blocks}")
        for number, released in enumerate([*range(step, last, step), last], start=1):
            name = f"{phase.name}-{number}"
            expanded.append(dataclasses.replace(phase, name=name, gradual=None, unfreeze={"blocks": released}))
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
        with _shapes_may_not_suffice():
            if spec.adapter is not None:
                check_adapter(model, pixels)
            else:
                unused = unused_parameters(model, pixels)
                for name, parameter in model.named_parameters():
                    parameter.requires_grad_(parameter.requires_grad and name not in unused)
    return model


@contextmanager
def _shapes_may_not_suffice() -> Iterator[None]:
    """Pass over what a network can't do on the meta device: one that reads values (Perceiver) finds none there."""
    try:
        yield
    except RuntimeError as error:
        if "meta tensor" not in str(error):
            raise


def plan_phase(model: nn.Module, spec: PhaseSpec, *, images: int, processes: int = 1) -> Plan:
    """Plan a phase of a model that `prepare_phase` has set up; shapes suffice.

    Args:
        model: The classifier.
        spec: The phase.
        images: Number of training images.
        processes: Number of processes that share them.

    Raises:
        RecipeError: If no batch is left.
    """
    spec = with_solver(model, spec)
    anatomy = dissect(model)
    arguments = {**_DEFAULTS, **spec.arguments}
    parameters = list(model.parameters())
    trainable = sum(value.numel() for value in parameters if value.requires_grad)
    total = sum(value.numel() for value in parameters)
    steps, epochs = duration(spec, images, processes)
    size = arguments["per_device_train_batch_size"]
    rounds, rest = divmod(images, size * processes)  # whole batches are dealt in turn
    rest = 0 if arguments["dataloader_drop_last"] else rest
    return Plan(
        phase=spec.name,
        trains=_in_words(model, anatomy),
        trainable=trainable,
        total=total,
        groups=() if spec.is_solved else parameter_groups(model, anatomy, spec, arguments),
        images=images,
        batch=images if spec.is_solved else size * processes * arguments["gradient_accumulation_steps"],
        device_batch=size,
        steps=steps,
        epochs=epochs,
        state_bytes=4 * total + 12 * trainable,
        processes=processes,
        shares=(rounds * size + max(rest - (processes - 1) * size, 0), rounds * size + min(rest, size)),
        frozen_share=_frozen_share(model, anatomy),
        solver=spec.solver,
    )


def with_solver(model: nn.Module, spec: PhaseSpec) -> PhaseSpec:
    """The phase with `lbfgs` or `steps` as its solver, as its prepared model allows.

    Raises:
        ModelError: If the recipe asks for `lbfgs`, and the head is more than a linear layer.
    """
    is_solvable = solvable_head(model) is not None
    if spec.solver == "lbfgs" and not is_solvable:
        needs = "lbfgs needs a head that is one linear layer, and this network's is more"
        raise ModelError(f"phases.{spec.name}.solver: {needs}; set solver: steps")
    return dataclasses.replace(spec, solver="lbfgs" if spec.is_solved and is_solvable else "steps")


def duration(spec: PhaseSpec, images: int, processes: int = 1) -> tuple[int, float]:
    """Optimizer steps of a phase over so many training images, and how many passes over them the steps are.

    A solved head's steps are its weight decays, each of which is for all images.

    Raises:
        RecipeError: If a process would see no batch.
    """
    if spec.is_solved:
        return len(WEIGHT_DECAYS), float(len(WEIGHT_DECAYS))
    arguments = {**_DEFAULTS, **spec.arguments}
    size, drops = arguments["per_device_train_batch_size"], arguments["dataloader_drop_last"]
    whole = math.floor if drops else math.ceil
    batches = whole(images / size)
    if batches < processes:
        made = f"{batches}{' full' if drops else ''} {'batch' if batches == 1 else 'batches'} of {size}"
        needed = f", fewer than the {processes} processes" if processes > 1 else ""
        launch = f"launch {batches}" if batches else f"launch 1 with per_device_train_batch_size={images}"
        smaller = f"set per_device_train_batch_size={images // processes}"
        advice = ", or ".join([launch] * (processes > 1) + [smaller] * (images >= processes))
        raise RecipeError(f"phases.{spec.name}: {images} training images make {made}{needed}; {advice}")
    per_epoch = max(math.ceil(whole(batches / processes) / arguments["gradient_accumulation_steps"]), 1)
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
        rate = arguments["learning_rate"] * spec.layer_decay**below_head
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
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor  # and autograd keeps it, so that no storage is used twice

    with saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = _outputs(model, shape, batchnorm)  # holds what was saved
    return None if outputs is None else sum(kept.values())


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
        with torch.no_grad():
            _outputs(model, shape, batchnorm)
    except ValueError as error:
        if ONE_VALUE not in str(error):
            raise
        return True
    return False


def _outputs(model: nn.Module, shape: tuple[int, ...], batchnorm: str) -> Any:
    """Of pixels of that shape, in a training step; None where the network reads values that the meta device lacks."""
    with _shapes_may_not_suffice(), left_as_it_was(model):
        set_modes(model, batchnorm)
        return model(pixel_values=torch.zeros(shape, device=next(model.parameters()).device))
    return None


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
        spans: list[list[int]] = []
        for number in blocks:
            if not spans or spans[-1][-1] != number - 1:
                spans.append([])
            spans[-1].append(number)
        listed = ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)
        adapter = "adapter in " if any(is_adapter_tensor(name) for name, _ in model.named_parameters()) else ""
        words.append(f"{adapter}block{'s' if len(blocks) > 1 else ''} {listed} of {len(anatomy.blocks)}")
    has_norm = any(name in dict(model.named_parameters()) for name in anatomy.part("norm").tensors)
    words += ["norm"] if "norm" not in frozen and has_norm else []
    return ", ".join([*words, "head"])
