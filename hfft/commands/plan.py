"""What a recipe would do, before any pixel is read; the run asks it first, `hfft plan` asks nothing else."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from datasets import DatasetDict
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback

from hfft.data.images.resize_mode import fit_processor
from hfft.data.sources.advice import check_found
from hfft.data.sources.reading import ImageData, choose_splits, read_source
from hfft.data.sources.rows import Source
from hfft.errors import ModelError, RecipeError, first_line
from hfft.metrics.metrics import METRICS, MetricFunction
from hfft.metrics.multilabel import LABEL_METRICS
from hfft.model.anatomy import dissect
from hfft.model.checkpoint import load_config, load_processor, load_skeleton, sample_pixels, set_labels
from hfft.model.checkpoint_files import check_weights
from hfft.model.given import align_labels, check_reopens
from hfft.recipe.contradictions import multi_label_problems, solving_problems, warms_up
from hfft.recipe.loading import check_recipe
from hfft.recipe.spec import PhaseSpec, Recipe
from hfft.runs.locating import weights_place
from hfft.runs.record import Plan
from hfft.system.launch import check_launch_options, spread_by
from hfft.system.machine import has_native_bfloat16
from hfft.training.losses import ImageLoss, LabelSetLoss, prior_shifts
from hfft.training.plan import activation_bytes, expand_phases, plan_phase, prepare_phase, refuses_one_image
from hfft.training.reporting import check_reporting
from hfft.training.settings import check_activation_checkpointing, try_arguments


@dataclass(frozen=True)
class Prepared:
    """What the phases of a recipe are checked against, before any pixel is read.

    Attributes:
        source: All rows.
        images: Their splits, with images that can't be read.
        config: Of the network, with the images' labels.
        processor: The image processor.
        plans: What each phase would do.
    """

    source: Source
    images: ImageData
    config: Any
    processor: Any
    plans: list[Plan]


def plan_recipe(recipe: Recipe, *, processes: int = 1) -> tuple[ImageData, list[Plan]]:
    """What each phase would do, from the checkpoint's config and the names of the images.

    Weights are only searched for NaN.

    Args:
        recipe: What to plan.
        processes: Processes that will share the images.

    Raises:
        HfftError: For every mistake that can be seen without weights and pixels.
    """
    recipe = resolve_phases(with_weights_found(check_recipe(recipe)), None)
    found = prepare(recipe, processes=processes)
    check_found(found.images.splits["train"], recipe.data.source)
    return found.images, found.plans


def prepare(
    recipe: Recipe, data: DatasetDict | None = None, model: PreTrainedModel | None = None, *, processes: int
) -> Prepared:
    """Find the images, open config and image processor, and try every phase; a plan and a run do the same.

    Args:
        recipe: Its phases written out.
        data: Data in memory, instead of the recipe's.
        model: From `take_model`; gets the images' labels.
        processes: Processes that will share the images.

    Raises:
        HfftError: For every mistake that can be seen without weights and pixels.
    """
    source = read_source(recipe.data, data)
    images = choose_splits(source, recipe.data, recipe.seed)
    if model is None:
        config = load_config(recipe.model, images.labels, is_multi_label=images.is_multi_label)
        check_weights(recipe.model.checkpoint)
    else:
        config: Any = model.config
        align_labels(model, images.labels)
        set_labels(config, images.labels, is_multi_label=images.is_multi_label)
    processor = fit_processor(load_processor(recipe.model, config), config, recipe.data)
    pixels = sample_pixels(processor)
    if model is not None:
        check_reopens(model, pixels, trust_remote_code=recipe.model.trust_remote_code)
    plans = check_phases(recipe, config, images, pixels, processes=processes)
    return Prepared(source, images, config, processor, plans)


def check_phases(
    recipe: Recipe, config: Any, images: ImageData, pixels: torch.Tensor, *, processes: int
) -> list[Plan]:
    """Try every phase on a network without weights, and its arguments on a Trainer without a network.

    Args:
        recipe: What to try.
        config: Of the network.
        images: For the number of training images, and whether there are others.
        pixels: An image as the network takes it, (1, C, H, W); its shape counts.
        processes: Number of processes that would share the images.

    Returns:
        The plan of each phase.

    Raises:
        RecipeError: If transformers refuses an argument, the metric is unknown, or a process would see no image.
        ModelError: If the network doesn't have what a phase asks for.
        RunError: If the launch asks for what the recipe has keys for.
    """
    problems = multi_label_problems(recipe) if images.is_multi_label else []
    if problems:
        raise RecipeError("\n".join(["the images have any number of labels (data.task):", *problems]))
    loss_of(recipe, images)
    check_reporting(recipe)
    plans = []
    known = metrics_of(images)
    can_be_bfloat16 = recipe.precision == "bfloat16" or (recipe.precision == "auto" and has_native_bfloat16())
    phases = phases_in(recipe, "bfloat16" if can_be_bfloat16 else "float32")
    check_launch_options({phase.name: phase.precision for phase in phases})
    for phase in phases:
        where = f"phases.{phase.name}"
        metric = phase.arguments.get("metric_for_best_model", next(iter(known)))
        if str(metric).removeprefix("eval_") not in known:
            raise RecipeError(f"{where}.metric_for_best_model: found {metric!r}; allowed: {', '.join(known)}")
        if phase.arguments.get("auto_find_batch_size") and processes > 1:
            raise RecipeError(
                f"{where}.auto_find_batch_size: is for one process, and there are {processes}; run the recipe with "
                "one first, which tells the batch that fits, set per_device_train_batch_size to it and leave this out"
            )
        try_arguments(phase, seed=recipe.seed, validate="validation" in images.splits)
        skeleton = _skeleton(recipe, config, phase, pixels)
        plan = plan_phase(skeleton, phase, images=len(images.splits["train"]), processes=processes)
        _check_course(phase, plan, validates="validation" in images.splits)
        _check_batchnorm(phase, plan, skeleton, (1, *pixels.shape[1:]))
        kept = activation_bytes(skeleton, (plan.device_batch, *pixels.shape[1:]), phase.batchnorm)
        plans.append(dataclasses.replace(plan, activation_bytes=kept))
    return plans


def check_callbacks(callbacks: Sequence[TrainerCallback], recipe: Recipe, images: ImageData) -> None:
    """Refuse a user's early stopping where a phase measures nothing, which transformers asserts once that begins.

    Raises:
        RecipeError: With the first such phase.
    """
    if not any(isinstance(callback, EarlyStoppingCallback) for callback in callbacks):
        return
    for phase in recipe.phases:
        if "validation" not in images.splits or phase.arguments.get("eval_strategy") == "no":
            raise RecipeError(
                f"callbacks: EarlyStoppingCallback needs evaluations, and phases.{phase.name} has none; leave it out, "
                "or set data.splits.validation and an eval_strategy other than 'no'"
            )


def _check_course(phase: PhaseSpec, plan: Plan, *, validates: bool) -> None:
    """Refuse a warm-up that leaves no step at the learning rate, and evaluations that would begin after the end."""
    where, asked = f"phases.{phase.name}", float(phase.arguments.get("warmup_steps") or 0)
    warmup = int(asked) if asked >= 1 else math.ceil(plan.steps * asked)  # as transformers 5.24 has it
    steps = f"{plan.steps:,} {'step' if plan.steps == 1 else 'steps'}"
    if warmup >= plan.steps and warms_up(phase.arguments):
        raise RecipeError(
            f"{where}.warmup_steps: found {asked:g}, and the phase has {steps}: none would have its learning rate; "
            "set fewer, a share of the steps such as 0.1, or 0"
        )
    delay, strategy = phase.arguments.get("eval_delay") or 0, phase.arguments.get("eval_strategy", "epoch")
    end, unit = (plan.epochs, "epochs") if strategy == "epoch" else (plan.steps, "steps")
    if validates and strategy != "no" and delay > end:
        raise RecipeError(
            f"{where}.eval_delay: found {delay:g}, and the phase ends after {end:g} {unit}, without an evaluation; "
            "set less, or eval_strategy: no"
        )


def _check_batchnorm(phase: PhaseSpec, plan: Plan, network: Any, shape: tuple[int, ...]) -> None:
    """Refuse batches of one image where a BatchNorm trains that needs several."""
    shares = phase.batchnorm == "sync" and plan.processes > 1
    if phase.batchnorm == "eval" or shares:
        return
    last = plan.images % plan.device_batch
    has_last = plan.processes == 1 and last == 1 and not phase.arguments.get("dataloader_drop_last")
    if (plan.device_batch == 1 or has_last) and refuses_one_image(network, shape, phase.batchnorm):
        which = "each batch has" if plan.device_batch == 1 else f"the last batch of {plan.images:,} images has"
        advice = "" if plan.device_batch == 1 else "dataloader_drop_last: true, or "
        raise RecipeError(
            f"phases.{phase.name}.batchnorm: {phase.batchnorm!r} takes statistics of each batch, and {which} one "
            f"image, which is too few for this network; set {advice}another per_device_train_batch_size"
        )


def _skeleton(recipe: Recipe, config: Any, phase: PhaseSpec, pixels: torch.Tensor) -> Any:
    """A network without weights, set up for a phase."""
    try:
        skeleton = prepare_phase(load_skeleton(recipe.model, config), phase, pixels.to("meta"))
        check_activation_checkpointing(skeleton, phase.arguments)
    except ModelError as error:
        raise ModelError(f"phases.{phase.name}: {error}") from error
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise ModelError(
            f"model.checkpoint: the network can't take the images that the image processor makes, "
            f"{tuple(pixels.shape)}: {first_line(error).rstrip('.')}; model.image_size sets the size of both"
        ) from error
    return skeleton


def with_weights_found(recipe: Recipe) -> Recipe:
    """The recipe with the folder of the weights, where its checkpoint is a run's folder, or a phase's.

    Raises:
        ModelError: If that isn't finished, or has no weights of its own.
    """
    place = weights_place(recipe.model.checkpoint)
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, checkpoint=place))


def resolve_phases(recipe: Recipe, model: PreTrainedModel | None) -> Recipe:
    """Write out gradual phases, which takes the number of blocks of the network.

    Args:
        recipe: With gradual phases or without.
        model: The network, if there is one already; its config is read from the checkpoint when None.

    Returns:
        The recipe that a run folder keeps.

    Raises:
        HfftError: If the checkpoint can't be used, has too few blocks, or two phases get one name.
    """
    if all(phase.gradual is None for phase in recipe.phases):
        return recipe
    network = load_skeleton(recipe.model, load_config(recipe.model, ("a", "b"))) if model is None else model
    phases = expand_phases(recipe.phases, len(dissect(network).blocks))
    names = [phase.name for phase in phases]
    if len(set(names)) < len(names):
        raise RecipeError(f"phases: a gradual phase stands for phases of the same name as others: {', '.join(names)}")
    return dataclasses.replace(recipe, phases=phases)


def phases_in(recipe: Recipe, precision: str) -> tuple[PhaseSpec, ...]:
    """The phases as they run in `float32` or `bfloat16`; one that sets bf16 or fp16 itself is left alone.

    With `solver: steps` where a head of `auto` can't be solved.
    """
    phases = []
    for phase in recipe.phases:
        if phase.solver == "auto" and phase.is_solved and (spread_by() or solving_problems(phase, recipe)):
            phase = dataclasses.replace(phase, solver="steps")
        if precision != "float32" and not {"bf16", "fp16"} & set(phase.arguments):
            phase = dataclasses.replace(phase, arguments={**phase.arguments, "bf16": True})
        phases.append(phase)
    return tuple(phases)


def metrics_of(images: ImageData) -> Mapping[str, MetricFunction]:
    """The metrics of a task; the first is what phases are judged by, unless they say otherwise."""
    return LABEL_METRICS if images.is_multi_label else METRICS


def loss_of(recipe: Recipe, images: ImageData) -> Callable[[float], ImageLoss]:
    """Label smoothing to the loss that the recipe asks for.

    Raises:
        RecipeError: As `class_weights`.
    """
    spec = recipe.loss
    gamma = (spec.gamma or 2.0) if spec.name == "focal" else 0.0
    if images.is_multi_label:
        return partial(LabelSetLoss, class_weights=class_weights(recipe, images), gamma=gamma)
    shifts = None
    if spec.name == "logit_adjusted":
        shifts = prior_shifts(list(images.counts("train").values()), spec.tau or 1.0)
    return partial(ImageLoss, class_weights=class_weights(recipe, images), gamma=gamma, shifts=shifts)


def class_weights(recipe: Recipe, images: ImageData) -> tuple[float, ...] | None:
    """Factors of the classes in the loss, (K,); balanced ones have a mean of 1 over the training images.

    Multi-label, they multiply the terms of images that have a label; balanced ones are how many images lack it for
    each that has it.

    Raises:
        RecipeError: If the recipe names other classes than the images have.
    """
    weights = recipe.class_weights
    if weights is None:
        return None
    if weights == "balanced":
        counts = images.counts("train")
        if images.is_multi_label:
            return _lacking_per_having(counts, len(images.splits["train"]))
        return tuple(sum(counts.values()) / (len(counts) * counts[label]) for label in images.labels)
    if set(weights) != set(images.labels):
        raise RecipeError(f"class_weights: found {', '.join(weights)}; the classes are {', '.join(images.labels)}")
    return tuple(weights[label] for label in images.labels)


def _lacking_per_having(counts: Mapping[str, int], images: int) -> tuple[float, ...]:
    everywhere = [label for label, count in counts.items() if count == images]
    if everywhere:
        raise RecipeError(
            f"class_weights: balanced: all training images have the label {', '.join(everywhere)}, so that there is "
            "nothing to balance it with; give numbers by class, or leave it out"
        )
    return tuple((images - count) / count for count in counts.values())
