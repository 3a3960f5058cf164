"""What a recipe would do, before any pixel is read; the run asks it first, `hfft plan` asks nothing else."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import DatasetDict
from transformers import EarlyStoppingCallback, TrainerCallback

from hfft.data.images.resize_mode import fit_processor
from hfft.data.sources.advice import check_found
from hfft.data.sources.reading import ImageData, choose_splits, read_source
from hfft.data.sources.rows import Source
from hfft.errors import ModelError, RecipeError, first_line
from hfft.metrics.multilabel import metrics_of
from hfft.model.anatomy import dissect
from hfft.model.config import load_config, load_processor, load_skeleton, sample_pixels
from hfft.model.given import check_reopens, open_config, take_model
from hfft.recipe.loading import check_recipe
from hfft.recipe.spec import PhaseSpec, Recipe
from hfft.runs.locating import weights_place
from hfft.runs.record import Plan
from hfft.system.launch import check_launch_options
from hfft.training.losses import loss_for
from hfft.training.plan import activation_bytes, check_phase, expand_phases, plan_phase, prepare_phase
from hfft.training.precision import phases_in
from hfft.training.reporting import check_reporting
from hfft.training.settings import check_activation_checkpointing, try_arguments


@dataclass(frozen=True)
class InMemory:
    """What a caller brings in the place of what a recipe names."""

    data: DatasetDict | None = None
    model: Any = None
    fingerprints: dict[str, str] | None = None  # of the model


@dataclass(frozen=True)
class Prepared:
    """What the phases of a recipe are checked against, before any pixel is read."""

    source: Source  # all rows
    images: ImageData  # their splits, with images that can't be read
    config: Any  # of the network, with the images' labels
    processor: Any
    plans: list[Plan]  # what each phase would do


def plan_recipe(recipe: Recipe, *, processes: int = 1) -> tuple[ImageData, list[Plan]]:
    """What each phase would do, from the checkpoint's config and the names of the images.

    Weights are only searched for NaN.

    Args:
        recipe: What to plan.
        processes: Processes that will share the images.

    Raises:
        HfftError: For every mistake that can be seen without weights and pixels.
    """
    recipe, given = resolve(with_weights_found(check_recipe(recipe)), InMemory())
    found = prepare(recipe, given, processes=processes)
    check_found(found.images.splits["train"], recipe.data.source)
    return found.images, found.plans


def prepare(recipe: Recipe, given: InMemory, *, processes: int) -> Prepared:
    """Find the images, open config and image processor, and try every phase; a plan and a run do the same.

    Args:
        recipe: From `resolve`, like `given`, whose model gets the images' labels.
        given: Data and model in memory.
        processes: Processes that will share the images.
    """
    source, model = read_source(recipe.data, given.data), given.model
    images = choose_splits(source, recipe.data, recipe.seed)
    config = open_config(recipe.model, images.labels, is_multi_label=images.is_multi_label, model=model)
    processor = fit_processor(load_processor(recipe.model, config), config, recipe.data)
    pixels = sample_pixels(processor)
    if model is not None:
        check_reopens(model, pixels, trust_remote_code=recipe.model.trust_remote_code)
    loss_for(recipe, images)  # which may be impossible
    check_reporting(recipe)
    phases = phases_in(recipe, recipe.precision)
    check_launch_options({phase.name: phase.precision for phase in phases})
    plans = [_plan(recipe, phase, config, images, pixels, processes) for phase in phases]
    return Prepared(source, images, config, processor, plans)


def with_weights_found(recipe: Recipe) -> Recipe:
    """The recipe with the folder of the weights, where its checkpoint is a run's folder, or a phase's."""
    place = weights_place(recipe.model.checkpoint)
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, checkpoint=place))


def resolve(recipe: Recipe, given: InMemory) -> tuple[Recipe, InMemory]:
    """The recipe that a run folder keeps, gradual phases written out; a model is checked and known by its hashes."""
    model = given.model
    if model is not None:
        given = dataclasses.replace(given, fingerprints=take_model(model))
    if any(phase.gradual is not None for phase in recipe.phases):
        network = load_skeleton(recipe.model, load_config(recipe.model, ("a", "b"))) if model is None else model
        recipe = dataclasses.replace(recipe, phases=expand_phases(recipe.phases, len(dissect(network).blocks)))
    return recipe, given


def check_callbacks(callbacks: Sequence[TrainerCallback], recipe: Recipe, images: ImageData) -> None:
    """Refuse a user's early stopping where a phase measures nothing, which transformers asserts once that begins."""
    if not any(isinstance(callback, EarlyStoppingCallback) for callback in callbacks):
        return
    for phase in recipe.phases:
        if "validation" not in images.splits or phase.arguments.get("eval_strategy") == "no":
            raise RecipeError(
                f"callbacks: EarlyStoppingCallback needs evaluations, and phases.{phase.name} has none; leave it out, "
                "or set data.splits.validation and an eval_strategy other than 'no'"
            )


def _plan(
    recipe: Recipe, phase: PhaseSpec, config: Any, images: ImageData, pixels: torch.Tensor, processes: int
) -> Plan:
    """Try a phase on a network without weights, and its arguments on a Trainer without a network."""
    known, where = metrics_of(is_multi_label=images.is_multi_label), f"phases.{phase.name}"
    metric = phase.arguments.get("metric_for_best_model", next(iter(known)))
    if str(metric).removeprefix("eval_") not in known:
        raise RecipeError(f"{where}.metric_for_best_model: found {metric!r}; allowed: {', '.join(known)}")
    if phase.arguments.get("auto_find_batch_size") and processes > 1:
        raise RecipeError(
            f"{where}.auto_find_batch_size: is for one process, and there are {processes}; run the recipe with one "
            "first, which tells the batch that fits, set per_device_train_batch_size to it and leave this out"
        )
    validates, shape = "validation" in images.splits, pixels.shape[1:]
    try_arguments(phase, seed=recipe.seed, validate=validates)
    try:
        skeleton = prepare_phase(load_skeleton(recipe.model, config), phase, pixels.to("meta"))
        check_activation_checkpointing(skeleton, phase.arguments)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        raise ModelError(
            f"model.checkpoint: the network can't take the images that the image processor makes, "
            f"{tuple(pixels.shape)}: {first_line(error).rstrip('.')}; model.image_size sets the size of both"
        ) from error
    plan = plan_phase(skeleton, phase, images=len(images.splits["train"]), processes=processes)
    check_phase(phase, plan, skeleton, (1, *shape), validates=validates)
    kept = activation_bytes(skeleton, (plan.device_batch, *shape), phase.batchnorm)
    return dataclasses.replace(plan, activation_bytes=kept)
