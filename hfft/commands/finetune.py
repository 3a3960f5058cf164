"""The whole pipeline on one screen."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import DatasetDict
from transformers import PreTrainedModel, TrainerCallback

from hfft.commands.automatic import Automatic, choose_recipe
from hfft.commands.job import open_job
from hfft.commands.plan import InMemory, resolve, with_weights_found
from hfft.commands.report import update_finished
from hfft.commands.results import finish_run
from hfft.commands.run import Run
from hfft.errors import RecipeError
from hfft.evaluators.registry import evaluators_for, measuring
from hfft.hub.following import check_hub, push_result, save_pushers
from hfft.recipe.loading import check_recipe, is_recipe, load_recipe
from hfft.recipe.spec import Recipe
from hfft.system.launch import launched
from hfft.system.locking import RunLock
from hfft.system.progress import timed
from hfft.training.model_selection import plain_network
from hfft.training.phases import run_phase
from hfft.training.reporting import finish_reporting, open_reporting


def finetune(
    recipe: Recipe | Automatic | str | Path,
    *,
    checkpoint: str | None = None,
    minutes: float = 10.0,
    data: DatasetDict | None = None,
    model: PreTrainedModel | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    overwrite: bool = False,
) -> Run:
    """Run a recipe from images to a measured model, or finish a run of it that was interrupted.

    Args:
        recipe: What to do: a recipe or its file; or images, as `data.source` has them, for which one is chosen.
        checkpoint: For images: what to fine-tune; one that suits device and budget when None.
        minutes: For images: what the run may take.
        data: Data already in memory, instead of `recipe.data.source`.
        model: A classifier to start from, instead of loading `recipe.model.checkpoint`; the checkpoint still names
            the image processor. Its head is used as it is.
        callbacks: More Trainer callbacks, for every phase.
        overwrite: Start anew where there is a run of that name.

    Raises:
        HfftError: Whatever the user can mend; nothing was written unless training had begun.
        PushError: If the run was finished and then couldn't be pushed.
    """
    if isinstance(recipe, str | Path) and is_recipe(str(recipe)):
        recipe = load_recipe(recipe)
    elif isinstance(recipe, str | Path):
        if data is not None or model is not None:
            raise RecipeError(f"{recipe}: data= and model= go with a recipe, and not with images on a disk")
        recipe = choose_recipe(str(recipe), checkpoint=checkpoint, minutes=minutes, overwrite=overwrite)
    recipe, comments = (recipe.recipe, recipe.comments) if isinstance(recipe, Automatic) else (recipe, {})
    recipe = check_recipe(recipe)
    if recipe.folds is not None:
        raise RecipeError(f"folds: {recipe.folds} are several runs; hfft.cross_validate makes them")
    recipe = with_weights_found(recipe)
    pushers = save_pushers(recipe)
    with RunLock(Path(recipe.output_dir) / recipe.name) as lock:
        with launched(timeout=ddp_timeout(recipe), shows_bars=not recipe.training.get("disable_tqdm", False)):
            lock.take_if_there()
            given, callbacks = InMemory(data, model), [*callbacks, *pushers]
            run = _finetune(recipe, given, callbacks, comments=comments, overwrite=overwrite, lock=lock)
        push_result(run, recipe, after=pushers)  # the other processes need not wait for it
    return run


def ddp_timeout(recipe: Recipe) -> int | None:
    """Seconds that the phases let a process wait for another one, as far as they say so."""
    asked = [phase.arguments["ddp_timeout"] for phase in recipe.phases if "ddp_timeout" in phase.arguments]
    return max(asked, default=None)


def _finetune(
    recipe: Recipe,
    given: InMemory,
    callbacks: Sequence[TrainerCallback],
    *,
    comments: Mapping[str, str],
    overwrite: bool,
    lock: RunLock,
) -> Run:
    check_hub(recipe, overwrite=overwrite)
    recipe, given = resolve(recipe, given)
    folder = Path(recipe.output_dir) / recipe.name
    if update_finished(recipe, given.data, given.fingerprints, overwrite=overwrite):
        return Run(folder)
    job, network, seconds = open_job(
        recipe, given, comments=comments, callbacks=callbacks, overwrite=overwrite, lock=lock
    )
    reporting = open_reporting(recipe, folder)
    with timed(seconds, "retention"):
        evaluators = evaluators_for(job, network)
    results = []
    for phase in job.phases:
        with timed(seconds, phase.folder.name):
            network, result = run_phase(
                network, phase, job.data, replay=job.replay, callbacks=[*callbacks, *reporting]
            )
            results.append(result)
            network = plain_network(network, job.processor, recipe, results, folder)
        for evaluator in evaluators:
            with measuring(evaluator, seconds):
                evaluator.after_phase(job, phase, network)
    finish_run(job, network, results, evaluators, seconds)
    finish_reporting(reporting, Run(folder).metrics if reporting else {})
    return Run(folder)
