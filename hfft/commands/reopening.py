"""The folder that a run wrote: reopened, compared with what was trained, and scored."""

from typing import Any

from hfft.data.images.transforms import evaluation_transform
from hfft.data.sources.reading import ImageData
from hfft.errors import TrainingError
from hfft.evaluators.scored_baselines import Trained, Way, score_beside
from hfft.inference.classifier import Classifier
from hfft.metrics.agreement import check_logits, check_validation
from hfft.metrics.scores import Scores
from hfft.model.checkpoint import set_memory_format
from hfft.recipe.spec import Recipe
from hfft.replay.engine import scoring_engine
from hfft.runs.phase_record import PhaseRecord
from hfft.runs.record import result_name
from hfft.system.distributed import on_main
from hfft.system.machine import cpus_per_process
from hfft.system.text import listed
from hfft.training.settings import EVAL_BATCH


def score_result(
    network: Any, processor: Any, images: ImageData, recipe: Recipe, trained: Trained
) -> tuple[dict[str, Scores], dict[str, Any]]:
    """Score the folder that was written and not the network in memory: that is what users will open.

    Args:
        network: What the run ends with, in memory.
        processor: Its image processor.
        images: The run's.
        recipe: The run's.
        trained: What the run has done.

    Returns:
        Scores by split, and the baselines.

    Raises:
        TrainingError: If the folder doesn't hold what was trained.
    """
    folder = trained.phases[0].folder.parent / result_name(recipe)
    classifier = Classifier.from_pretrained(folder, trust_remote_code=recipe.model.trust_remote_code)
    if classifier.classes != images.labels:
        found, wanted = listed(classifier.classes), listed(images.labels)
        raise TrainingError(f"{folder}: reopened, the model's labels are {found} instead of {wanted}")
    set_memory_format(classifier.model, recipe.model.memory_format)
    in_memory, reopened = (network, evaluation_transform(processor)), (classifier.model, classifier.transform)
    on_main(lambda: check_logits(in_memory, reopened, images.splits["train"], str(folder)))
    arguments = recipe.phases[-1].arguments
    way = Way(
        classifier.transform,
        batch_size=arguments.get("per_device_eval_batch_size", EVAL_BATCH),
        workers=arguments.get("dataloader_num_workers", min(cpus_per_process(), 8)),
        choose_run=scoring_engine(PhaseRecord(trained.phases[0].folder).engine()),
    )
    splits = {split: images.splits[split] for split in ("validation", "test") if split in images.splits}
    scores, baselines = score_beside(classifier.model, splits, way, trained, classes=images.labels)
    kept = trained.kept.number
    if "validation" in scores and recipe.retain.interpolate is None:  # which gives it other weights on purpose
        check_validation(
            trained.results[kept].metrics,
            scores["validation"],
            types={trained.phases[kept].spec.precision, recipe.replay.dtype},
            phase=trained.kept.phase,
            where=str(folder),
        )
    return scores, baselines
