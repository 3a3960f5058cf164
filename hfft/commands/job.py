"""Recipe, images and checkpoint -> what the phases of a run need: its job, its network and its folder."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, TrainerCallback, set_seed

from hfft.commands.plan import InMemory, check_callbacks, prepare
from hfft.data.audit.filtering import Checked, check_images, describe_images
from hfft.data.images.resize_mode import copy_fit
from hfft.data.sources.reading import ImageData
from hfft.evaluators.protocol import Job
from hfft.hub.following import make_repository
from hfft.model.checkpoint import load_checkpoint
from hfft.model.config import sample_pixels
from hfft.recipe.spec import Recipe
from hfft.replay.replay import Replay, RunPhases, image_origin, replay_folder
from hfft.runs.opening import describe_start, open_folder
from hfft.runs.record import FIGURES, FIRST_BATCH, RunRecord
from hfft.system.distributed import on_main
from hfft.system.locking import RunLock
from hfft.system.progress import timed
from hfft.training.failures import failures_explained
from hfft.training.model_selection import keep_given
from hfft.training.phase_data import PhaseRun, draw_first_batch, make_phase_data
from hfft.training.plan import duration, prepare_phase
from hfft.training.precision import fastest_precision, phases_in


def open_job(
    recipe: Recipe,
    given: InMemory,
    *,
    comments: Mapping[str, str],
    callbacks: Sequence[TrainerCallback],
    overwrite: bool,
    lock: RunLock,
) -> tuple[Job, Any, dict[str, float]]:
    """Read and check the images, load the network, and open the run folder.

    Args:
        recipe: From `resolve`, like `given`.
        given: Data and model in memory.
        comments: Of the recipe's file.
        callbacks: The user's, to be checked.
        overwrite: Whether a run that is there goes.
        lock: Of the run folder; is taken.

    Returns:
        The job, the network, and seconds by step.
    """
    folder, seconds = Path(recipe.output_dir) / recipe.name, {}
    with timed(seconds, "data"):
        found = prepare(recipe, given, processes=PartialState().num_processes)
        check_callbacks(callbacks, recipe, found.images)
        checked = check_images(found.source, found.images, recipe.data, recipe.seed)
        make_repository(recipe)
    images = checked.images
    load = partial(load_network, recipe, images)
    with timed(seconds, "load"):
        set_seed(recipe.seed)
        network: Any = load() if given.model is None else given.model
        copy_fit(found.config, network.config)
    precision = precision_of(recipe, network, found.processor, None if overwrite else folder)
    with failures_explained("run folder"):
        lock.take()
        environment = describe_start(
            recipe, precision=precision, model_given=given.fingerprints, data_given=given.data is not None
        )
        open_folder(folder, recipe, environment, describe_images(checked), overwrite=overwrite, comments=comments)
        keep_given(given.model, found.processor, recipe, folder)
    job = make_job(recipe, found.processor, checked, precision, load=load if given.model is None else None)
    if recipe.report:
        draw_first_batch(folder / FIGURES / FIRST_BATCH, recipe, images, job.processor, job.data)
    return job, network, seconds


def load_network(recipe: Recipe, images: ImageData) -> PreTrainedModel:
    """The checkpoint's network with a new head for the images' classes."""
    return load_checkpoint(recipe.model, images.labels, is_multi_label=images.is_multi_label)[0]


def make_job(
    recipe: Recipe, processor: Any, checked: Checked, precision: str, *, load: Callable[[], Any] | None
) -> Job:
    """All that phases need but the network, which `load` makes anew, where it isn't a model object of the caller's."""
    folder = Path(recipe.output_dir) / recipe.name
    phases = phases_in(recipe, precision)
    replay = None
    if recipe.replay.mode != "off":
        origin = image_origin(recipe, processor, checked.fingerprints)
        replay = Replay(recipe.replay, replay_folder(recipe), origin, RunPhases(phases, prepare_phase, duration))
    return Job(
        recipe=recipe,
        folder=folder,
        images=checked.images,
        processor=processor,
        phases=[
            PhaseRun(
                number=number,
                spec=phase,
                folder=RunRecord(folder).phase(number, phase.name).folder,
                title=f"phase {number + 1}/{len(phases)} {phase.name}",
                seed=recipe.seed,
            )
            for number, phase in enumerate(phases)
        ],
        data=make_phase_data(checked.images, processor, recipe),
        replay=replay,
        load=load,
    )


def precision_of(recipe: Recipe, network: Any, processor: Any, folder: Path | None) -> str:
    """The recipe's precision, that of the run in the folder, or the faster one; the same in every process."""
    if recipe.precision != "auto":
        return recipe.precision
    if folder is not None and (noted := RunRecord(folder).environment.get("precision")) is not None:
        return noted
    replays, memory = recipe.replay.mode != "off", replay_folder(recipe) / "precision.json"
    pixels = sample_pixels(processor)
    return on_main(lambda: fastest_precision(network, recipe.phases[-1], pixels, replays=replays, memory=memory))
