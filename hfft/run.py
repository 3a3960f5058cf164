"""The whole pipeline on one screen."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import DatasetDict
from transformers import PreTrainedModel, TrainerCallback, set_seed

from hfft.data.batches import Collator, Examples, chances_of
from hfft.data.fitting import copy_fit, fit_processor
from hfft.data.sources import ImageData, load_data
from hfft.data.targets import targets_of
from hfft.data.transforms import evaluation_transform, training_transform
from hfft.distributed import join, meet, on_main
from hfft.errors import RecipeError
from hfft.evaluation.beside import Trained
from hfft.evaluation.validating import validating
from hfft.files import read_json
from hfft.finishing import checked_images, update_finished
from hfft.folder import (
    describe_origin,
    is_done,
    open_folder,
    result_name,
    write_results,
)
from hfft.hinting import hint_labels
from hfft.hub.following import check_hub, make_repository, push_result, save_pushers
from hfft.launch import check_launch, check_packages
from hfft.liveness import watched
from hfft.locking import RunLock
from hfft.model.checkpoint import (
    load_checkpoint,
    load_config,
    load_processor,
    sample_pixels,
    save_model,
    set_labels,
)
from hfft.model.checkpoint_files import check_weights
from hfft.model.given import align_labels, check_reopens, take_model
from hfft.planning import (
    check_callbacks,
    check_phases,
    loss_of,
    metrics_of,
    phases_in,
    resolve_phases,
    run_clock,
    with_weights_found,
)
from hfft.progress import bars
from hfft.recipe.loading import check_recipe
from hfft.recipe.spec import PhaseSpec, Recipe
from hfft.reopening import check_finished, score_result
from hfft.retaining import Retaining, keep_novelty
from hfft.runs.run import Run
from hfft.training.adapted import keep_given, plain_network, restore_kept
from hfft.training.failures import explained
from hfft.training.keeping import choose_kept
from hfft.training.phase_data import PhaseData
from hfft.training.phases import PhaseResult, Stage, run_phase
from hfft.training.precision import fastest_precision
from hfft.training.replay import Replay, open_replay, replay_folder
from hfft.training.reporting import finish_reporting, open_reporting
from hfft.training.timing import RunClock

_LOG = get_logger(__name__)


def finetune(
    recipe: Recipe,
    *,
    data: DatasetDict | None = None,
    model: PreTrainedModel | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    overwrite: bool = False,
) -> Run:
    """Run a recipe from images to a measured model, or finish a run of it that was interrupted.

    Args:
        recipe: What to do.
        data: Data already in memory, instead of `recipe.data.source`.
        model: A classifier to start from, instead of loading `recipe.model.checkpoint`; the checkpoint still names
            the image processor. Its head is used as it is.
        callbacks: More Trainer callbacks, for every phase.
        overwrite: Start anew where there is a run of that name.

    Raises:
        HfftError: Whatever the user can mend; nothing was written unless training had begun.
        PushError: If the run was finished and then couldn't be pushed.
    """
    recipe = check_recipe(recipe)
    if recipe.folds is not None:
        raise RecipeError(f"folds: {recipe.folds} are several runs; hfft.cross_validate makes them")
    check_packages()
    recipe, state = with_weights_found(recipe), join_for(recipe)
    check_launch(state)
    pushers = save_pushers(recipe)
    with RunLock(Path(recipe.output_dir) / recipe.name) as lock:
        with watched(state), bars(shown=not recipe.training.get("disable_tqdm", False)):
            lock.take_if_there()
            run = _finetune(recipe, data, model, [*callbacks, *pushers], overwrite=overwrite, lock=lock)
        push_result(run, recipe, after=pushers)  # the other processes need not wait for it
    return run


def join_for(recipe: Recipe) -> PartialState:
    """Meet the other processes of the launch, and wait for them as long as the recipe's `ddp_timeout` says."""
    asked = [phase.arguments["ddp_timeout"] for phase in recipe.phases if "ddp_timeout" in phase.arguments]
    return join(max(asked, default=None))


def _finetune(
    recipe: Recipe,
    data: DatasetDict | None,
    model: PreTrainedModel | None,
    callbacks: Sequence[TrainerCallback],
    *,
    overwrite: bool,
    lock: RunLock,
) -> Run:
    check_hub(recipe, overwrite=overwrite)
    given = None if model is None else take_model(model)
    recipe = resolve_phases(recipe, model)
    folder = Path(recipe.output_dir) / recipe.name
    if is_done(folder, recipe, overwrite=overwrite):
        if given is not None:
            check_finished(folder, recipe, model, given)
        update_finished(folder, recipe, data)
        return Run(folder)
    seconds: dict[str, float] = {}
    with _timed(seconds, "data"):
        images = load_data(recipe.data, recipe.seed, data)
        config = _config(recipe, images, model)
        processor = _processor(recipe, config, model)
        processes = PartialState().num_processes
        plans = check_phases(recipe, config, images, sample_pixels(processor), processes=processes)
        check_callbacks(callbacks, recipe, images)
        checked = checked_images(images, recipe, data)
        images = checked.images
        make_repository(recipe)
    with _timed(seconds, "load"):
        set_seed(recipe.seed)
        load = partial(_load, recipe, images) if model is None else None
        network: Any = model if load is None else load()
        copy_fit(config, network.config)
    precision = _precision(recipe, network, processor, None if overwrite else folder)
    with explained("run folder"):
        lock.take()
        origin = describe_origin(recipe, model_given=model is not None, data_given=data is not None)
        open_folder(
            folder, recipe, checked, origin=origin, precision=precision, model_given=given, overwrite=overwrite
        )
        keep_given(model, processor, recipe, folder)
    phases = phases_in(recipe, precision)
    job = _Job(
        recipe=recipe,
        folder=folder,
        images=images,
        processor=processor,
        stages=_stages(phases, folder, recipe.seed, run_clock(recipe, plans, images)),
        data=_phase_data(images, processor, recipe),
        replay=open_replay(recipe, phases, processor, checked.fingerprints),
    )
    reporting = open_reporting(recipe, folder)
    with _timed(seconds, "retention"):
        retaining = Retaining(recipe, network, images, processor, job.stages, is_loaded=model is None)
    network, results = _train(job, network, retaining, [*callbacks, *reporting], seconds)
    kept = choose_kept(recipe, results)
    _LOG.info(kept.reason)
    with _timed(seconds, "retention"), explained("retention"):
        retained = retaining.finish(network, job.data)
    _end(job, network, Trained(job.stages, results, kept, job.data, job.replay, load), retained, seconds)
    finish_reporting(reporting, Run(folder).metrics if reporting else {})
    return Run(folder)


@dataclass(frozen=True)
class _Job:
    """What a run works with, settled before its first phase."""

    recipe: Recipe
    folder: Path
    images: ImageData
    processor: Any
    stages: Sequence[Stage]
    data: PhaseData
    replay: Replay | None


def _train(
    job: _Job,
    network: Any,
    retaining: Retaining,
    callbacks: Sequence[TrainerCallback],
    seconds: dict[str, float],
) -> tuple[Any, list[PhaseResult]]:
    """Run all phases; what is measured of a phase is measured after it."""
    results: list[PhaseResult] = []
    for stage in job.stages:
        with _timed(seconds, stage.folder.name):
            network, result = run_phase(network, stage, job.data, replay=job.replay, callbacks=callbacks)
            results.append(result)
            network = plain_network(network, job.processor, job.recipe, results, job.folder)
        with _timed(seconds, "retention"), explained("retention"):
            retaining.after_phase(network, stage)
        if job.recipe.label_hints and stage.number == 0:
            with _timed(seconds, "label hints"), explained("label hints"):
                hint_labels(network, stage, job.data, job.replay, job.processor, job.images.labels)
    return network, results


def _end(
    job: _Job, network: PreTrainedModel, trained: Trained, retained: dict[str, Any], seconds: dict[str, float]
) -> None:
    """Write the result, measure it, and write what was measured."""
    recipe, folder, images, is_main = job.recipe, job.folder, job.images, PartialState().is_main_process
    with _timed(seconds, "evaluation"), explained("result"):
        restore_kept(network, recipe, trained.results, trained.kept, folder)
        if is_main and result_name(recipe) == "model":
            save_model(network, job.processor, folder / "model")
        meet()
        scores, baselines = score_result(network, job.processor, images, recipe, trained)
        if recipe.novelty and is_main:
            keep_novelty(folder / result_name(recipe), images, recipe)
        meet()
    if is_main:
        with explained("result"):
            more = {"kept": dataclasses.asdict(trained.kept), "baselines": baselines, **retained}
            write_results(folder, recipe, images, scores, seconds, more)
        if recipe.report:
            from hfft.report.page import try_page  # and matplotlib

            try_page(folder, images, trust_remote_code=recipe.model.trust_remote_code)
        else:
            _LOG.info(f"figures and report.html were left out; `hfft report {folder}` makes them")
    meet()


def _load(recipe: Recipe, images: ImageData) -> PreTrainedModel:
    return load_checkpoint(recipe.model, images.labels, is_multi_label=images.is_multi_label)[0]


def _config(recipe: Recipe, images: ImageData, model: PreTrainedModel | None) -> Any:
    """The checkpoint's config, or that of a model that the caller brought, with the images' labels."""
    labels = images.labels
    if model is None:
        config = load_config(recipe.model, labels, is_multi_label=images.is_multi_label)
        check_weights(recipe.model.checkpoint)
        return config
    align_labels(model, labels)
    set_labels(model.config, labels, is_multi_label=images.is_multi_label)
    return model.config


def _processor(recipe: Recipe, config: Any, model: PreTrainedModel | None) -> Any:
    """The checkpoint's image processor; a model that the caller brought can be opened again, and takes its images."""
    processor = fit_processor(load_processor(recipe.model, config), config, recipe.data)
    if model is not None:
        check_reopens(model, sample_pixels(processor), trust_remote_code=recipe.model.trust_remote_code)
    return processor


def _precision(recipe: Recipe, network: Any, processor: Any, folder: Path | None) -> str:
    """The recipe's precision, that of the run in the folder, or the faster one; the same in every process."""
    if recipe.precision != "auto":
        return recipe.precision
    if folder is not None and (folder / "environment.json").is_file():
        return read_json(folder / "environment.json")["precision"]
    replays, memory = recipe.replay.mode != "off", replay_folder(recipe) / "precision.json"
    pixels = sample_pixels(processor)
    return on_main(lambda: fastest_precision(network, recipe.phases[-1], pixels, replays=replays, memory=memory))


def _stages(phases: Sequence[PhaseSpec], folder: Path, seed: int, clock: RunClock) -> list[Stage]:
    return [
        Stage(
            number=number,
            spec=phase,
            folder=folder / f"{number}-{phase.name}",
            title=f"phase {number + 1}/{len(phases)} {phase.name}",
            seed=seed,
            clock=clock,
        )
        for number, phase in enumerate(phases)
    ]


def _phase_data(images: ImageData, processor: Any, recipe: Recipe) -> PhaseData:
    augment = recipe.data.augment
    train_with, evaluate_with = training_transform(processor, augment), evaluation_transform(processor)
    train, validation = images.splits["train"], images.splits.get("validation")
    measured = validating(len(images.labels), is_multi_label=images.is_multi_label)
    return PhaseData(
        train=Examples(train, train_with.pixels, seed=recipe.seed, targets=targets_of(train, len(images.labels))),
        validation=None if validation is None else Examples(validation, evaluate_with.pixels),
        floats=train_with.floats,
        collate=Collator(augment.mixup, len(images.labels), train_with.floats),
        reduce=measured.reduce,
        measure=measured.compute,
        metrics=metrics_of(images),
        loss=loss_of(recipe, images),
        chances=None if images.is_multi_label else chances_of(train["label"][:], recipe.sampler),
        is_multi_label=images.is_multi_label,
    )


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - begun
