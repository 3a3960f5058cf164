"""The whole pipeline on one screen, and Run: a view of the folder that it leaves."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from datasets import DatasetDict
from transformers import PreTrainedModel, TrainerCallback, set_seed

from hfft.data.batches import Collator, Examples, chances_of
from hfft.data.checking import Checked, check_images
from hfft.data.decoding import RULE
from hfft.data.fitting import copy_fit, fit_processor
from hfft.data.sources import ImageData, load_data
from hfft.data.targets import targets_of
from hfft.data.transforms import evaluation_transform, training_transform
from hfft.errors import ModelError, RecipeError, RunError, TrainingError
from hfft.evaluation.beside import Trained, Way, score_beside
from hfft.evaluation.scoring import Scores
from hfft.evaluation.validating import validating
from hfft.files import read_json
from hfft.folder import (
    card_changes,
    describe_origin,
    is_done,
    open_folder,
    result_name,
    update_card,
    write_results,
)
from hfft.hinting import hint_labels
from hfft.hub.following import check_hub, make_repository, push_result, save_pushers
from hfft.hub.pushing import Pushed, Pushing, push
from hfft.inference.classifier import Classifier
from hfft.launch import check_launch, check_packages
from hfft.liveness import watched
from hfft.machine import cpus_per_process, package_versions
from hfft.model.checkpoint import (
    load_checkpoint,
    load_config,
    load_processor,
    sample_pixels,
    save_model,
    set_labels,
    set_memory_format,
)
from hfft.planning import check_callbacks, check_phases, loss_of, metrics_of, phases_in, resolve_phases, run_clock
from hfft.progress import bars
from hfft.recipe.loading import check_recipe, read_recipe
from hfft.recipe.spec import PhaseSpec, Recipe
from hfft.retaining import Retaining, keep_novelty
from hfft.training.adapted import plain_network, restore_kept
from hfft.training.failures import explained
from hfft.training.keeping import choose_kept
from hfft.training.phase_data import PhaseData
from hfft.training.phases import PhaseResult, Stage, run_phase
from hfft.training.precision import fastest_precision
from hfft.training.replay import Replay, recorded_with
from hfft.training.reporting import finish_reporting, open_reporting
from hfft.training.settings import EVAL_BATCH
from hfft.training.shelf import Origin
from hfft.training.timing import RunClock

if TYPE_CHECKING:
    from typing_extensions import Unpack

_LOG = get_logger(__name__)


class Run:
    """A view of a run folder; changes nothing there but the note of what was pushed."""

    def __init__(self, folder: str | Path) -> None:
        """Open a run folder.

        Raises:
            RunError: If it isn't one.
        """
        self.folder = Path(folder)
        if not (self.folder / "recipe.yaml").is_file():
            raise RunError(f"{self.folder} is no run folder: it has no recipe.yaml")

    def __fspath__(self) -> str:
        """The folder, wherever a path is asked for."""
        return str(self.folder)

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return read_recipe(self.folder)

    @property
    def model_dir(self) -> Path:
        """The result: a plain transformers model folder, or an adapter folder where nothing was merged."""
        return self.folder / result_name(self.recipe)

    @property
    def is_finished(self) -> bool:
        """Whether all phases ran and the result was measured."""
        return (self.folder / "metrics.json").is_file()

    @property
    def metrics(self) -> dict[str, Any]:
        """Content of metrics.json: split to metric to value and interval, and what else was measured.

        `by_class`, `confusion` and `calibration` are by split, `seconds` by stage; `examples` lie beside the model.
        """
        if not self.is_finished:
            raise RunError(f"{self.folder}: this run is not finished; run its command again to continue it")
        return read_json(self.folder / "metrics.json")

    @property
    def skipped(self) -> list[dict[str, str]]:
        """Images that were left out as they can't be read: file, label and reason."""
        return read_json(self.folder / "data.json").get("skipped", [])

    @property
    def predictions(self) -> pd.DataFrame:
        """One row per validation and test image."""
        return pd.read_parquet(self.folder / "predictions.parquet")

    def phase_dir(self, number: int) -> Path:
        """Folder of a phase, counted from 0."""
        return self.folder / f"{number}-{self.recipe.phases[number].name}"

    def push_to_hub(self, repo_id: str, **pushing: "Unpack[Pushing]") -> Pushed:
        """Push the run as `hfft.push` does."""
        return push(self, repo_id, **pushing)


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
    state = PartialState(cpu=not torch.accelerator.is_available())
    check_launch(state)
    pushers = save_pushers(recipe)
    with watched(state), bars(shown=not recipe.training.get("disable_tqdm", False)):
        run = _finetune(recipe, data, model, [*callbacks, *pushers], overwrite=overwrite)
    push_result(run, recipe, after=pushers)  # the other processes need not wait for it
    return run


def _finetune(
    recipe: Recipe,
    data: DatasetDict | None,
    model: PreTrainedModel | None,
    callbacks: Sequence[TrainerCallback],
    *,
    overwrite: bool,
) -> Run:
    state = PartialState()
    check_hub(recipe, overwrite=overwrite)
    recipe = resolve_phases(recipe, model)
    folder = Path(recipe.output_dir) / recipe.name
    if is_done(folder, recipe, overwrite=overwrite):
        return _finished(folder, recipe, data)
    seconds: dict[str, float] = {}
    with _timed(seconds, "data"):
        images = load_data(recipe.data, recipe.seed, data)
        config = _config(recipe, images, model)
        processor = fit_processor(load_processor(recipe.model, config), config, recipe.data)
        plans = check_phases(recipe, config, images, sample_pixels(processor), processes=state.num_processes)
        check_callbacks(callbacks, recipe, images)
        checked = _check(images, recipe, data)
        images = checked.images
        make_repository(recipe)
    with _timed(seconds, "load"):
        set_seed(recipe.seed)
        load = partial(_load, recipe, images) if model is None else None
        network: Any = model if load is None else load()
        copy_fit(config, network.config)
    precision = _precision(recipe, network, processor, None if overwrite else folder)
    with explained("run folder"):
        origin = describe_origin(recipe, model_given=model is not None, data_given=data is not None)
        open_folder(folder, recipe, checked, origin=origin, precision=precision, overwrite=overwrite)
    phases = phases_in(recipe, precision)
    replay = _replay(recipe, phases, processor, checked)
    phase_data = _phase_data(images, processor, recipe)
    reporting = open_reporting(recipe, folder)
    callbacks = [*callbacks, *reporting]
    results: list[PhaseResult] = []
    stages = _stages(phases, folder, recipe.seed, run_clock(recipe, plans, images))
    with _timed(seconds, "retention"):
        retaining = Retaining(recipe, network, images, processor, stages, is_loaded=model is None)
    for stage in stages:
        with _timed(seconds, stage.folder.name):
            network, result = run_phase(network, stage, phase_data, replay=replay, callbacks=callbacks)
            results.append(result)
            network = plain_network(network, processor, recipe, results, folder)
        with _timed(seconds, "retention"), explained("retention"):
            retaining.after_phase(network, stage)
        if recipe.label_hints and stage.number == 0:
            with _timed(seconds, "label hints"), explained("label hints"):
                hint_labels(network, stage, phase_data, replay, processor, images.labels)
    kept = choose_kept(recipe, results)
    _LOG.info(kept.reason)
    with _timed(seconds, "retention"), explained("retention"):
        retained = retaining.finish(network, phase_data)
    trained = Trained(stages, results, kept, phase_data, replay, load)
    _end(network, processor, recipe, images, trained, retained, seconds)
    finish_reporting(reporting, Run(folder).metrics if reporting else {})
    return Run(folder)


def _finished(folder: Path, recipe: Recipe, data: DatasetDict | None) -> Run:
    """A run that had ended, with its card written anew if the recipe asks for another one."""
    state, changed = PartialState(), card_changes(folder, recipe)
    state.wait_for_everyone()
    if changed:
        checked = _check(load_data(recipe.data, recipe.seed, data), recipe, data) if "widget" in changed else None
        if state.is_main_process:
            with explained("card"):
                update_card(folder, recipe, checked)
        state.wait_for_everyone()
        told = ", ".join(f"{key} {getattr(recipe, key)}" for key in changed)
        _LOG.info(f"{folder}: the card was written anew: {told}")
    _LOG.info(f"{folder} is finished; --overwrite runs it again")
    return Run(folder)


def _end(
    network: PreTrainedModel,
    processor: Any,
    recipe: Recipe,
    images: ImageData,
    trained: Trained,
    retained: dict[str, Any],
    seconds: dict[str, float],
) -> None:
    """Write the result, measure it, and write what was measured."""
    state, folder = PartialState(), Path(recipe.output_dir) / recipe.name
    with _timed(seconds, "evaluation"), explained("result"):
        restore_kept(network, recipe, trained.results, trained.kept, folder)
        if state.is_main_process and result_name(recipe) == "model":
            save_model(network, processor, folder / "model")
        state.wait_for_everyone()
        scores, baselines = _score_result(folder, images, recipe, trained)
        if recipe.novelty and state.is_main_process:
            keep_novelty(folder / result_name(recipe), images, recipe)
    if state.is_main_process:
        with explained("result"):
            more = {"kept": dataclasses.asdict(trained.kept), "baselines": baselines, **retained}
            write_results(folder, recipe, images, scores, seconds, more)
        if recipe.report:
            from hfft.report.page import try_page  # and matplotlib

            try_page(folder, images)
        else:
            _LOG.info(f"figures and report.html were left out; `hfft report {folder}` makes them")
    state.wait_for_everyone()


def _check(images: ImageData, recipe: Recipe, data: DatasetDict | None) -> Checked:
    """The images without those that can't be read."""
    source = recipe.data.source if data is None else None
    return check_images(
        images, recipe.data, source, lambda gone: load_data(recipe.data, recipe.seed, data, without=gone)
    )


def _load(recipe: Recipe, images: ImageData) -> PreTrainedModel:
    return load_checkpoint(recipe.model, images.labels, is_multi_label=images.is_multi_label)[0]


def _config(recipe: Recipe, images: ImageData, model: PreTrainedModel | None) -> Any:
    """The checkpoint's config, or that of a model that the caller brought, with the images' labels."""
    labels = images.labels
    if model is None:
        return load_config(recipe.model, labels, is_multi_label=images.is_multi_label)
    config: Any = model.config
    if config.num_labels != len(labels):
        raise ModelError(f"the model has {config.num_labels} outputs, the images have {len(labels)} classes")
    set_labels(config, labels, is_multi_label=images.is_multi_label)
    return config


def _precision(recipe: Recipe, network: Any, processor: Any, folder: Path | None) -> str:
    """The recipe's precision, that of the run in the folder, or the faster one; the same in every process."""
    if recipe.precision != "auto":
        return recipe.precision
    if folder is not None and (folder / "environment.json").is_file():
        return read_json(folder / "environment.json")["precision"]
    found: list[Any] = [None]
    if PartialState().is_main_process:
        replays = recipe.replay.mode != "off"
        memory = _replay_folder(recipe) / "precision.json"
        found = [
            fastest_precision(network, recipe.phases[-1], sample_pixels(processor), replays=replays, memory=memory)
        ]
    broadcast_object_list(found)
    return found[0]


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


def _replay(recipe: Recipe, phases: Sequence[PhaseSpec], processor: Any, checked: Checked) -> Replay | None:
    if recipe.replay.mode == "off":
        return None
    origin = Origin(
        fingerprints=dict(checked.fingerprints),
        processor=f"{type(processor).__name__} {processor.to_dict()}, decoding {RULE}",
        augment=recipe.data.augment,
        seed=recipe.seed,
        versions=package_versions(),
    )
    return Replay(recipe.replay, _replay_folder(recipe), phases, origin)


def _replay_folder(recipe: Recipe) -> Path:
    return Path(recipe.output_dir) / ".replay" if recipe.replay.folder is None else Path(recipe.replay.folder)


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


def _score_result(
    folder: Path, images: ImageData, recipe: Recipe, trained: Trained
) -> tuple[dict[str, Scores], dict[str, Any]]:
    """Score the folder that was written and not the network in memory: that is what users will open."""
    model_folder = folder / result_name(recipe)
    classifier = Classifier.from_pretrained(model_folder, trust_remote_code=recipe.model.trust_remote_code)
    if classifier.classes != images.labels:
        found, wanted = ", ".join(classifier.classes[:5]), ", ".join(images.labels[:5])
        raise TrainingError(f"{model_folder}: reopened, the model's labels are {found} ... instead of {wanted} ...")
    set_memory_format(classifier.model, recipe.model.memory_format)
    way = Way(
        classifier.transform,
        batch_size=recipe.phases[-1].arguments.get("per_device_eval_batch_size", EVAL_BATCH),
        workers=recipe.phases[-1].arguments.get("dataloader_num_workers", min(cpus_per_process(), 8)),
        engine=recorded_with(trained.stages[0].folder),
    )
    splits = {split: images.splits[split] for split in ("validation", "test") if split in images.splits}
    return score_beside(classifier.model, splits, way, trained, classes=images.labels)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.monotonic() - begun
