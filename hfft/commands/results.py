"""The end of a run: the selected phase's model is saved, scored and measured, and its numbers are written down."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate.logging import get_logger

from hfft.commands.report import try_page, write_examples
from hfft.commands.scoring import score_result
from hfft.data.sources.reading import ImageData
from hfft.evaluators.protocol import Evaluator, Job
from hfft.evaluators.registry import measuring
from hfft.metrics.scores import Scores
from hfft.metrics.thresholds import describe_confidence, store_confidence
from hfft.model.checkpoint import save_model
from hfft.recipe.spec import Recipe
from hfft.report.card import write_report
from hfft.runs.record import MODEL, PhaseResult, result_name, write_metrics, write_predictions
from hfft.system.distributed import on_main
from hfft.system.progress import timed
from hfft.training.failures import failures_explained
from hfft.training.model_selection import restore_selected, select_phase

_LOG = get_logger(__name__)


def finish_run(
    job: Job,
    network: Any,
    results: Sequence[PhaseResult],
    evaluators: Sequence[Evaluator],
    seconds: dict[str, float],
) -> None:
    """Save the model of the best phase, measure it, and write what a finished run holds.

    Args:
        job: Of the run.
        network: As the last phase left it.
        results: Of all phases.
        evaluators: Have seen all phases.
        seconds: By step of the run.
    """
    recipe, folder = job.recipe, job.folder
    selection = select_phase(recipe, results)
    _LOG.info(selection.reason)
    with failures_explained("result"):
        restore_selected(network, recipe, selection, folder)
    for evaluator in evaluators:
        with measuring(evaluator, seconds):
            evaluator.before_saving(job, network)
    with timed(seconds, "evaluation"), failures_explained("result"):
        if result_name(recipe) == MODEL:
            on_main(lambda: save_model(network, job.processor, folder / MODEL))
        result = score_result(job, network, results, selection, evaluators)
    sections: dict[str, Any] = {"kept": asdict(selection)}
    for evaluator in evaluators:
        with measuring(evaluator, seconds):
            section = evaluator.after_run(job, result)
        sections |= {} if section is None else {evaluator.name: section}
    with failures_explained("result"):
        on_main(lambda: write_results(folder, recipe, job.images, dict(result.scores), seconds, sections))
    if recipe.report:
        on_main(lambda: try_page(folder, job.images, trust_remote_code=recipe.model.trust_remote_code))
    else:
        _LOG.info(f"figures and report.html were left out; `hfft report {folder}` makes them")


def write_results(
    folder: Path,
    recipe: Recipe,
    images: ImageData,
    scores: Mapping[str, Scores],
    seconds: Mapping[str, float],
    more: Mapping[str, Any],
) -> None:
    """Write predictions, card, the figures that are wanted and, as the mark of a finished run, metrics.json.

    Args:
        folder: The run folder.
        recipe: The run's.
        images: For the examples in the model folder.
        scores: By split.
        seconds: By step of the run.
        more: Further sections of metrics.json.
    """
    result = folder / result_name(recipe)
    if scores:
        tables = [found.table(split) for split, found in scores.items()]
        write_predictions(folder, pd.concat(tables, ignore_index=True))
    confidence = describe_confidence(scores)
    if confidence is not None:
        store_confidence(result, confidence)
        more = {**more, "confidence": confidence}
    content = {
        **{split: found.metrics for split, found in scores.items()},
        "by_class": {split: found.by_class for split, found in scores.items()},
        "confusion": {split: found.confusion for split, found in scores.items()},
        "details": {split: found.details for split, found in scores.items()},
        "calibration": {split: found.calibration for split, found in scores.items()},
        "examples": write_examples(result, images, recipe.widget or 0),
        **more,
        "seconds": {step: round(value, 3) for step, value in {**seconds, "total": sum(seconds.values())}.items()},
    }
    write_report(folder, metrics=content, draws=recipe.report)
    write_metrics(folder, content)
