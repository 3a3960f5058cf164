"""The whole pipeline on one screen."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import DatasetDict
from transformers import PreTrainedModel, TrainerCallback, set_seed

from hfft.commands.finishing import update_finished
from hfft.commands.plan import check_callbacks, prepare, resolve_phases, with_weights_found
from hfft.commands.prepare import load_network, make_job, precision_of
from hfft.commands.results import score_result, write_results
from hfft.commands.run import Run
from hfft.data.audit.filtering import check_images, describe_images
from hfft.data.images.first_batch import try_first_batch
from hfft.data.images.resize_mode import copy_fit
from hfft.errors import RecipeError
from hfft.evaluators.protocol import Evaluator, Job
from hfft.evaluators.registry import evaluators_for
from hfft.hub.following import check_hub, make_repository, push_result, save_pushers
from hfft.model.checkpoint import save_model
from hfft.model.given import take_model
from hfft.recipe.loading import check_recipe
from hfft.recipe.spec import Recipe
from hfft.runs.opening import describe_start, is_done, open_folder
from hfft.runs.record import FIGURES, FIRST_BATCH, MODEL, PhaseResult, result_name
from hfft.system.distributed import join, on_main
from hfft.system.launch import check_launch, refuse_deepspeed
from hfft.system.liveness import watched
from hfft.system.locking import RunLock
from hfft.system.progress import bars
from hfft.training.failures import failures_explained
from hfft.training.model_selection import keep_given, plain_network, restore_selected, select_phase
from hfft.training.phases import run_phase
from hfft.training.reporting import finish_reporting, open_reporting

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
    refuse_deepspeed()
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
    if on_main(lambda: is_done(folder, recipe, overwrite=overwrite)):
        update_finished(folder, recipe, data, given)
        return Run(folder)
    seconds: dict[str, float] = {}
    with _timed(seconds, "data"):
        found = prepare(recipe, data, model, processes=PartialState().num_processes)
        check_callbacks(callbacks, recipe, found.images)
        checked = check_images(found.source, found.images, recipe.data, recipe.seed)
        make_repository(recipe)
    with _timed(seconds, "load"):
        set_seed(recipe.seed)
        network: Any = load_network(recipe, checked.images) if model is None else model
        copy_fit(found.config, network.config)
    precision = precision_of(recipe, network, found.processor, None if overwrite else folder)
    with failures_explained("run folder"):
        lock.take()
        environment = describe_start(recipe, precision=precision, model_given=given, data_given=data is not None)
        open_folder(folder, recipe, environment, describe_images(checked), overwrite=overwrite)
        keep_given(model, found.processor, recipe, folder)
    job = make_job(recipe, found, checked, precision, is_loaded=model is None)
    reporting = open_reporting(recipe, folder)
    _run(job, network, [*callbacks, *reporting], seconds)
    finish_reporting(reporting, Run(folder).metrics if reporting else {})
    return Run(folder)


def _run(job: Job, network: Any, callbacks: Sequence[TrainerCallback], seconds: dict[str, float]) -> None:
    """Train all phases, save the model of the best, and measure it."""
    recipe, folder = job.recipe, job.folder

    @contextmanager
    def measuring(evaluator: Evaluator) -> Iterator[None]:
        with _timed(seconds, evaluator.name), failures_explained(evaluator.name):
            yield

    with _timed(seconds, "retention"):
        evaluators = evaluators_for(job, network)
    if recipe.report:
        try_first_batch(
            folder / FIGURES / FIRST_BATCH,
            job.data.train,
            job.data.collate,
            processor=job.processor,
            classes=job.images.labels,
            seed=recipe.seed,
            chances=job.data.chances,
        )
    results: list[PhaseResult] = []
    for phase in job.phases:
        with _timed(seconds, phase.folder.name):
            network, result = run_phase(network, phase, job.data, replay=job.replay, callbacks=callbacks)
            results.append(result)
            network = plain_network(network, job.processor, recipe, results, folder)
        for evaluator in evaluators:
            with measuring(evaluator):
                evaluator.after_phase(job, phase, network)
    selection = select_phase(recipe, results)
    _LOG.info(selection.reason)
    with failures_explained("result"):
        restore_selected(network, recipe, selection, folder)
    for evaluator in evaluators:
        with measuring(evaluator):
            evaluator.before_saving(job, network)
    with _timed(seconds, "evaluation"), failures_explained("result"):
        if result_name(recipe) == MODEL:
            on_main(lambda: save_model(network, job.processor, folder / MODEL))
        result = score_result(job, network, results, selection, evaluators)
    sections: dict[str, Any] = {"kept": dataclasses.asdict(selection)}
    for evaluator in evaluators:
        with measuring(evaluator):
            section = evaluator.after_run(job, result)
        sections |= {} if section is None else {evaluator.name: section}
    with failures_explained("result"):
        on_main(lambda: write_results(folder, recipe, job.images, dict(result.scores), seconds, sections))
    if recipe.report:
        on_main(lambda: _write_page(job))
    else:
        _LOG.info(f"figures and report.html were left out; `hfft report {folder}` makes them")


def _write_page(job: Job) -> None:
    from hfft.commands.report import try_page  # and matplotlib

    try_page(job.folder, job.images, trust_remote_code=job.recipe.model.trust_remote_code)


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.monotonic() - begun
