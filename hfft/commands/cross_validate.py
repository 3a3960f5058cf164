"""Cross-validation: one run for each fold of the training images, and what all of them say together."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accelerate.logging import get_logger
from datasets import DatasetDict
from transformers import TrainerCallback

from hfft.commands.finetune import ddp_timeout, finetune
from hfft.commands.run import Run
from hfft.errors import RecipeError, RunError
from hfft.metrics.intervals import Interval, with_intervals
from hfft.metrics.multilabel import LabelOutcomes, label_intervals
from hfft.metrics.scores import indicators_of, is_multi_label_table, logits_of
from hfft.recipe.loading import check_recipe
from hfft.recipe.spec import Recipe
from hfft.recipe.values import Fold
from hfft.replay.replay import replay_folder
from hfft.runs.record import SUMMARY, RunRecord, write_predictions
from hfft.system.distributed import join
from hfft.system.files import write_json
from hfft.system.locking import RunLock

_LOG = get_logger(__name__)
_COLUMN = "probability "  # and the class, in a table of predictions


@dataclass(frozen=True)
class Folds:
    """The runs of a cross-validation.

    Attributes:
        folder: Holds the run folders, summary.json and predictions.parquet.
        runs: One for each fold.
        metrics: `test`, with every image predicted by the run that had not trained on it: metric to `value` over all
            images, with the 95 % interval (`low`, `high`; None where there are too few images to say) that comes from
            the choice of images, and `mean` and standard deviation (`std`) over folds.
    """

    folder: Path
    runs: tuple[Run, ...]
    metrics: dict[str, dict[str, Interval]]


def cross_validate(
    recipe: Recipe,
    *,
    data: DatasetDict | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    overwrite: bool = False,
) -> Folds:
    """Run a recipe once for each fold, or finish what was interrupted; each is tested on the images of its fold.

    Folds are stratified, and keep groups together where the recipe has `data.group_column`. They divide the training
    split; a test split that the source has is left alone.

    Args:
        recipe: With `folds`.
        data: Data already in memory, instead of `recipe.data.source`.
        callbacks: More Trainer callbacks, for every phase of every run.
        overwrite: Start anew where there are runs of that name.

    Raises:
        HfftError: As `hfft.finetune`; or if the recipe has no folds, or a run lies where the folds would.
    """
    recipe = check_recipe(recipe)
    if recipe.folds is None:
        raise RecipeError("folds: this recipe asks for none; hfft.finetune runs it")
    folder = Path(recipe.output_dir) / recipe.name
    if RunRecord(folder).is_run:
        raise RunError(f"{folder} holds a run without folds; choose another name or output_dir, or remove it")
    state, runs = join(ddp_timeout(recipe)), []
    with RunLock(folder) as lock:
        for number in range(recipe.folds):
            lock.take_if_there()  # from the first fold's end on; until then, that fold's own lock holds
            _LOG.info(f"fold {number + 1} of {recipe.folds}")
            runs.append(finetune(_of_fold(recipe, number), data=data, callbacks=callbacks, overwrite=overwrite))
    tables = [run.predictions.assign(fold=number) for number, run in enumerate(runs)]
    table = pd.concat(tables).query("split == 'test'").reset_index(drop=True)
    metrics = {"test": _summary(table, runs)}
    if state.is_main_process:
        write_predictions(folder, table)
        folds = [{"folder": run.folder.name, "test": run.metrics["test"]} for run in runs]
        write_json(folder / SUMMARY, {**metrics, "folds": folds})
    return Folds(folder, tuple(runs), metrics)


def _of_fold(recipe: Recipe, number: int) -> Recipe:
    """The recipe of one fold; its recordings lie where those of runs without folds do."""
    folds = recipe.folds or 1
    splits = dataclasses.replace(recipe.data.splits, test=Fold(fold=number, of=folds))
    replay = dataclasses.replace(recipe.replay, folder=str(replay_folder(recipe)))
    return dataclasses.replace(
        recipe,
        name=f"fold-{number}",
        output_dir=str(Path(recipe.output_dir) / recipe.name),
        data=dataclasses.replace(recipe.data, splits=splits),
        replay=replay,
        folds=None,
    )


def _summary(table: pd.DataFrame, runs: Sequence[Run]) -> dict[str, Any]:
    """Metrics of all predictions, with mean and deviation over the folds."""
    classes = [name.removeprefix(_COLUMN) for name in table.columns if name.startswith(_COLUMN)]
    if is_multi_label_table(table):  # each run has given labels by its own thresholds
        flags = (indicators_of(table[column], classes) for column in ("label", "prediction"))
        together: dict[str, Any] = label_intervals(LabelOutcomes.of_logits(logits_of(table, classes), *flags))
    else:
        labels = pd.Categorical(table["label"], categories=classes).codes.astype(np.int64)
        together = with_intervals(table[[f"{_COLUMN}{name}" for name in classes]].to_numpy(np.float32), labels)
    for name, values in together.items():
        by_fold = [run.metrics["test"][name]["value"] for run in runs]
        values |= {"mean": float(np.mean(by_fold)), "std": float(np.std(by_fold, ddof=1))}
    return together
