"""Images that a model was not trained on, the split that a run left out or new data, and its scores on them."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from accelerate.logging import get_logger
from datasets import Dataset

from hfft.data.audit.filtering import describe_split, fingerprint_of, readable_rows
from hfft.data.images.batches import worker_deaths_explained
from hfft.data.images.resize_mode import check_processor
from hfft.data.sources.reading import images_of_run, load_rows
from hfft.errors import DataError, RunError
from hfft.inference.classifier import Classifier
from hfft.inference.opening import Opening
from hfft.metrics.scoring import Scores, score
from hfft.recipe.spec import DataSpec
from hfft.runs.record import RunRecord
from hfft.system.distributed import join
from hfft.system.files import expanded
from hfft.system.machine import cpus_per_process
from hfft.system.text import listed
from hfft.training.settings import EVAL_BATCH

if TYPE_CHECKING:
    from typing_extensions import Unpack

_LOG = get_logger(__name__)


def evaluate(
    source: str | Path,
    *,
    data: str | None = None,
    split: str | None = None,
    batch_size: int = EVAL_BATCH,
    workers: int | None = None,
    bad_images: Literal["skip", "stop"] = "skip",
    **opening: "Unpack[Opening]",
) -> Scores:
    """Score a finished run or any classifier on labelled images.

    The images may lack classes that the model knows, which is logged: macro F1 takes such a class as 0, as it is the
    mean over all classes of the model, and balanced accuracy leaves it out.

    Args:
        source: Run folder, model folder, adapter folder or Hub id.
        data: Folder or Hub id of labelled images; the run's own data when None.
        split: Which split; `test` of a run's own data, everything of new data when None.
        batch_size: Images per forward pass and process.
        workers: Processes that read images; one per core, but 8 at most, when None.
        bad_images: What to do about images of new data that can't be read: leave them out and list them, or stop.
        **opening: As for `Classifier.from_pretrained`.

    Raises:
        HfftError: If model, data or split can't be used, the images have a class that the model doesn't know, or they
            aren't those that the run left out of its training.
    """
    source = expanded(source)
    join()
    if data is None and not RunRecord(source).is_run:
        raise RunError(f"{source} is no run folder, which would have images of its own; give some with --data")
    classifier = Classifier.from_pretrained(source, **opening)
    check_processor(classifier.processor)
    if data is not None:
        task = "multi_label" if classifier.is_multi_label else "single_label"
        spec = DataSpec(source=data, task=task, bad_images=bad_images)
        rows = readable_rows(load_rows(spec, classifier.classes, split), classifier.classes, spec)
    else:
        rows = _own_rows(Path(source), split or "test")
    name = split or "test"
    with worker_deaths_explained("evaluation", "fewer --workers need less"):
        scores = score(
            classifier.model,
            {name: rows},
            classifier.transform,
            classes=classifier.classes,
            batch_size=batch_size,
            workers=min(cpus_per_process(), 8) if workers is None else workers,
        )[name]
    absent = [name for name, row in scores.by_class.items() if row["images"] == 0]
    if absent:
        left_out = "balanced accuracy" if scores.labels.ndim == 1 else "mean average precision"
        _LOG.info(
            f"no image is labelled with {len(absent)} of the model's {len(scores.classes)} classes "
            f"({listed(absent)}): macro F1 takes each of them as 0, {left_out} leaves them out"
        )
    return scores


def _own_rows(folder: Path, split: str) -> Dataset:
    """A split of the run's own data, as it was when the run began: another one could hold images it was trained on."""
    try:
        images = images_of_run(folder)
    except DataError as error:
        raise DataError(f"{error}; give labelled images with --data") from error
    if split not in images.splits:
        raise RunError(f"{folder}: no split {split!r}; found: {', '.join(images.splits)}")
    fingerprint = fingerprint_of(images.splits[split])
    if describe_split(images, split, fingerprint) != RunRecord(folder).data["splits"][split]:
        source = RunRecord(folder).recipe.data.source
        raise RunError(
            f"{folder}: the {split} images of {source} aren't those of the run any more, and "
            "some may have been trained on; give labelled images with --data"
        )
    return images.splits[split]
