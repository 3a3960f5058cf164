"""The result of a run: the folder that was written is reopened and scored, and its numbers are written down."""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hfft.data.images.decoding import decode, read_content
from hfft.data.images.transforms import evaluation_transform
from hfft.data.sources.labels import label_array, spoken_label, strata_of
from hfft.data.sources.reading import ImageData
from hfft.errors import TrainingError
from hfft.evaluators.protocol import Evaluator, ForwardPass, Job, Result, score_held_out
from hfft.inference.classifier import Classifier
from hfft.metrics.scores import Scores
from hfft.metrics.scoring import check_logits, check_validation
from hfft.metrics.thresholds import describe_confidence, store_confidence
from hfft.model.checkpoint import set_memory_format
from hfft.recipe.spec import Recipe
from hfft.replay.engine import scoring_engine
from hfft.runs.record import (
    EXAMPLES,
    PhaseRecord,
    PhaseResult,
    result_name,
    write_metrics,
    write_predictions,
)
from hfft.system.distributed import on_main
from hfft.system.files import write_folder
from hfft.system.text import listed
from hfft.training.model_selection import Selection

_EXAMPLE_SIDE = 512  # pixels at most


def score_result(
    job: Job, network: Any, results: Sequence[PhaseResult], selection: Selection, evaluators: Sequence[Evaluator]
) -> Result:
    """Score the folder that was written and not the network in memory: that is what users will open.

    Args:
        job: Of the run.
        network: What the run ends with, in memory.
        results: Of all phases.
        selection: Which phase's model it is.
        evaluators: One may compute more in the same pass over the images.

    Raises:
        TrainingError: If the folder doesn't hold what was trained.
    """
    recipe, folder = job.recipe, job.folder / result_name(job.recipe)
    classifier = Classifier.from_pretrained(folder, trust_remote_code=recipe.model.trust_remote_code)
    if classifier.classes != job.images.labels:
        found, wanted = listed(classifier.classes), listed(job.images.labels)
        raise TrainingError(f"{folder}: reopened, the model's labels are {found} instead of {wanted}")
    set_memory_format(classifier.model, recipe.model.memory_format)
    in_memory, reopened = (network, evaluation_transform(job.processor)), (classifier.model, classifier.transform)
    on_main(lambda: check_logits(in_memory, reopened, job.images.splits["train"], str(folder)))
    engine = scoring_engine(PhaseRecord(job.phases[0].folder).engine())
    forward = ForwardPass.evaluating(classifier.transform, recipe.phases[-1].arguments, engine)
    result = Result(folder, classifier.model, classifier.processor, forward, results, selection, {})
    asked = [evaluator.join_pass(job, result) for evaluator in evaluators] if job.held_out else []
    joint = next((one for one in asked if one is not None), None)
    scores = score_held_out(job, result, joint)
    if "validation" in scores and recipe.retain.interpolate is None:  # which gives it other weights on purpose
        check_validation(
            results[selection.number].metrics,
            scores["validation"],
            types={job.phases[selection.number].spec.precision, recipe.replay.dtype},
            phase=selection.phase,
            where=str(folder),
        )
    return dataclasses.replace(result, scores=scores)


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
    from hfft.report.card import write_report

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


def write_examples(result: Path, images: ImageData, count: int) -> list[dict[str, str]]:
    """Put some held-out images into the model folder, of each class in turn; small, and without what cameras note."""
    rows = images.splits.get("test", images.splits.get("validation"))
    if rows is None or count == 0:
        shutil.rmtree(result / EXAMPLES, ignore_errors=True)
        return []
    labels = strata_of(label_array(rows))
    by_class = [np.flatnonzero(labels == number).tolist() for number in np.unique(labels)]
    turns = [row for turn in zip_longest(*by_class) for row in turn if row is not None]
    chosen = [rows[row] for row in turns[:count]]

    def write(aside: Path) -> None:
        for number, row in enumerate(chosen):
            image = decode(read_content(row["image"]))
            image.thumbnail((_EXAMPLE_SIDE, _EXAMPLE_SIDE))
            image.info = {}  # comments of the file
            image.save(aside / f"{number}.jpg", quality=90)

    write_folder(result / EXAMPLES, write)
    return [
        {"file": f"{EXAMPLES}/{number}.jpg", "label": spoken_label(row["label"], images.labels)}
        for number, row in enumerate(chosen)
    ]
