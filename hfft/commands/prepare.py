"""Recipe, images and checkpoint -> what the phases of a run need: its job."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hfft.commands.plan import Prepared, loss_of, metrics_of, phases_in
from hfft.data.audit.filtering import Checked
from hfft.data.images.batches import Collator, Examples, chances_of
from hfft.data.images.transforms import evaluation_transform, training_transform
from hfft.data.sources.labels import targets_of
from hfft.data.sources.reading import ImageData
from hfft.evaluators.protocol import Job
from hfft.metrics.evaluate_modules import validating
from hfft.model.checkpoint import load_checkpoint
from hfft.model.config import sample_pixels
from hfft.recipe.spec import PhaseSpec, Recipe
from hfft.replay.cache import Origin
from hfft.replay.replay import Replay, RunPhases, image_origin, replay_folder
from hfft.runs.record import RunRecord
from hfft.system.distributed import on_main
from hfft.training.phase_data import PhaseData, PhaseRun
from hfft.training.plan import duration, prepare_phase
from hfft.training.precision import fastest_precision


def load_network(recipe: Recipe, images: ImageData) -> PreTrainedModel:
    """The checkpoint's network with a new head for the images' classes."""
    return load_checkpoint(recipe.model, images.labels, is_multi_label=images.is_multi_label)[0]


def precision_of(recipe: Recipe, network: Any, processor: Any, folder: Path | None) -> str:
    """The recipe's precision, that of the run in the folder, or the faster one; the same in every process."""
    if recipe.precision != "auto":
        return recipe.precision
    if folder is not None and (noted := RunRecord(folder).environment.get("precision")) is not None:
        return noted
    replays, memory = recipe.replay.mode != "off", replay_folder(recipe) / "precision.json"
    pixels = sample_pixels(processor)
    return on_main(lambda: fastest_precision(network, recipe.phases[-1], pixels, replays=replays, memory=memory))


def make_job(recipe: Recipe, found: Prepared, checked: Checked, precision: str, *, is_loaded: bool) -> Job:
    """All that the phases of a run need but the network.

    Args:
        recipe: Of the run.
        found: From `prepare`.
        checked: The images that can be read.
        precision: What the phases train in, where they don't say so themselves.
        is_loaded: Whether the network is the checkpoint's, and no model object of the caller's.
    """
    phases, images, folder = phases_in(recipe, precision), checked.images, Path(recipe.output_dir) / recipe.name
    return Job(
        recipe=recipe,
        folder=folder,
        images=images,
        processor=found.processor,
        phases=_phase_runs(phases, folder, recipe.seed),
        data=_phase_data(images, found.processor, recipe),
        replay=_replay(recipe, phases, image_origin(recipe, found.processor, checked.fingerprints)),
        load=partial(load_network, recipe, images) if is_loaded else None,
    )


def _replay(recipe: Recipe, phases: Sequence[PhaseSpec], origin: Origin) -> Replay | None:
    """What feeds the phases from recordings; None where replay is off."""
    if recipe.replay.mode == "off":
        return None
    return Replay(recipe.replay, replay_folder(recipe), origin, RunPhases(phases, prepare_phase, duration))


def _phase_runs(phases: Sequence[PhaseSpec], folder: Path, seed: int) -> list[PhaseRun]:
    return [
        PhaseRun(
            number=number,
            spec=phase,
            folder=RunRecord(folder).phase(number, phase.name).folder,
            title=f"phase {number + 1}/{len(phases)} {phase.name}",
            seed=seed,
        )
        for number, phase in enumerate(phases)
    ]


def _phase_data(images: ImageData, processor: Any, recipe: Recipe) -> PhaseData:
    augment = recipe.data.augment
    train_with, evaluate_with = training_transform(processor, augment), evaluation_transform(processor)
    train, validation = images.splits["train"], images.splits.get("validation")
    reduce, measure = validating(len(images.labels), is_multi_label=images.is_multi_label)
    return PhaseData(
        train=Examples(train, train_with.pixels, seed=recipe.seed, targets=targets_of(train, len(images.labels))),
        validation=None if validation is None else Examples(validation, evaluate_with.pixels),
        floats=train_with.floats,
        collate=Collator(augment.mixup, len(images.labels), train_with.floats, cutmix=augment.cutmix),
        reduce=reduce,
        measure=measure,
        metrics=metrics_of(images),
        loss=loss_of(recipe, images),
        chances=None if images.is_multi_label else chances_of(train["label"][:], recipe.sampler),
        is_multi_label=images.is_multi_label,
    )
