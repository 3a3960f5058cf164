"""A result's folder is reopened, compared with the network in memory, and scored."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from hfft.data.images.transforms import evaluation_transform
from hfft.errors import TrainingError
from hfft.evaluators.protocol import Evaluator, ForwardPass, Job, Result, score_held_out
from hfft.inference.classifier import Classifier
from hfft.metrics.scoring import check_logits, check_validation
from hfft.model.checkpoint import set_memory_format
from hfft.replay.engine import scoring_engine
from hfft.runs.record import PhaseRecord, PhaseResult, result_name
from hfft.system.distributed import on_main
from hfft.system.text import listed
from hfft.training.model_selection import Selection


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
