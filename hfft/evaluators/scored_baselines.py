"""A result's scores, and beside them those of what is simpler: the baselines of metrics.json."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, concatenate_datasets

from hfft.data.images.batches import Examples
from hfft.data.images.transforms import Transform
from hfft.data.sources.labels import is_multi_label, label_array
from hfft.evaluators.baselines import NEIGHBOURS, majority, nearest_neighbours
from hfft.evaluators.pretrained import Reference
from hfft.metrics.probabilities import log_odds, sigmoid, softmax
from hfft.metrics.scores import Scores, measured
from hfft.metrics.scoring import Logits, Run, compute, divided
from hfft.metrics.thresholds import choose_thresholds
from hfft.model.checkpoint import restore_weights
from hfft.replay.replay import Replay, TrainingActivations
from hfft.replay.split_point import find_split_point
from hfft.runs.record import PhaseRecord, PhaseResult
from hfft.training.model_selection import Selection
from hfft.training.phase_data import PhaseData, PhaseRun
from hfft.training.plan import prepare_phase
from hfft.training.settings import training_arguments

_MOST_KNOWN = 20_000  # training images whose features are compared with
_WORTH = 0.25  # of a run's own work: what baselines may take
_BACKWARD = 3  # forward passes that a training step is worth where all of the network trains

_LOG = get_logger(__name__)


@dataclass(frozen=True)
class Trained:
    """What a run has done when its result is scored.

    Attributes:
        phases: Its phases.
        results: Of those.
        kept: Which of them the result is.
        data: What they were trained on.
        replay: What they were fed from.
        load: Loads the pretrained network, with a head; None where the caller brought it.
    """

    phases: Sequence[PhaseRun]
    results: Sequence[PhaseResult]
    kept: Selection
    data: PhaseData
    replay: Replay | None
    load: Callable[[], Any] | None

    @property
    def head_phase(self) -> str | None:
        """Name of the first phase, if it trained the head alone: its encoder is the pretrained one."""
        spec = self.phases[0].spec
        return spec.name if spec.adapter is None and spec.unfreeze == "head" else None

    @property
    def labels(self) -> np.ndarray:
        """Of the training images, (N,), or (N, K) of 0 and 1."""
        return label_array(self.data.train.rows)

    @property
    def work(self) -> int:
        """Forward passes of an image that training was worth, at least."""
        total = 0
        for phase, result in zip(self.phases, self.results, strict=True):
            record = PhaseRecord(phase.folder)
            images = result.steps * record.plan.batch
            if record.engine() is not None:
                total += len(self.data.train)  # recorded once
            else:
                total += images * (1 if phase.spec.adapter is None and phase.spec.unfreeze == "head" else _BACKWARD)
        return total


@dataclass(frozen=True)
class Way:
    """How images are passed through networks.

    Attributes:
        transform: The evaluation transform.
        batch_size: Images per forward pass and process.
        workers: Processes that read images.
        choose_run: As for `compute`.
    """

    transform: Transform
    batch_size: int
    workers: int
    choose_run: Callable[[torch.nn.Module, torch.Tensor], Run] | None

    def over(
        self,
        splits: Mapping[str, Dataset],
        network: torch.nn.Module,
        then: Callable[..., Sequence[torch.Tensor]] | None = None,
    ) -> list[dict[str, np.ndarray]]:
        """What `compute` gives, by split."""
        examples = Examples(concatenate_datasets(list(splits.values())), self.transform.pixels)
        found = compute(
            network,
            examples,
            self.transform.floats,
            batch_size=self.batch_size,
            workers=self.workers,
            choose_run=self.choose_run,
            then=then,
        )
        return [divided(array, splits) for array in found]

    def pixels(self, rows: Dataset, device: torch.device) -> torch.Tensor:
        """The first image, (1, C, H, W)."""
        return self.transform.floats(Examples(rows, self.transform.pixels)[0]["pixel_values"][None].to(device))


def score_beside(
    model: Any, splits: Mapping[str, Dataset], way: Way, trained: Trained, *, classes: Sequence[str]
) -> tuple[dict[str, Scores], dict[str, Any]]:
    """Score a result, and its baselines in the same pass over the images where the networks have a part in common.

    Args:
        model: The result, reopened, on the device.
        splits: Validation and test images, as far as there are any.
        way: How images are passed through networks.
        trained: What the run has done.
        classes: Class names.

    Returns:
        Scores by split, the same on every process; and for the main process, baseline to `about`, a sentence, and
        metrics with intervals by split.
    """
    if not splits:
        return {}, {}
    reference = _open_reference(model, way, trained)
    joint = None if reference is None else reference.beside(model)
    if joint is None:
        (logits,) = way.over(splits, Logits(model))
        found = {} if reference is None else _alone(reference, splits, way, trained)
    else:
        logits, *rest = way.over(splits, *joint)
        found = dict(zip(("logits", "features"), rest, strict=True))
    known = None if reference is None or "features" not in found else _known(reference, way, trained)
    scores = _measured(_values(logits, trained), splits, classes)
    if not PartialState().is_main_process:
        return scores, {}
    beside = _Beside(splits, scores, trained)
    baselines = {
        "prevalence" if trained.data.is_multi_label else "majority": beside.majority(),
        "knn": beside.neighbours(found.get("features"), known),
        **beside.head(found.get("logits")),
    }
    _tell(scores, baselines)
    return scores, baselines


def _values(logits: Mapping[str, np.ndarray], trained: Trained) -> dict[str, np.ndarray]:
    """What `measured` takes, by split."""
    return dict(logits) if trained.data.is_multi_label else {split: softmax(part) for split, part in logits.items()}


def _measured(
    values: Mapping[str, np.ndarray], splits: Mapping[str, Dataset], classes: Sequence[str]
) -> dict[str, Scores]:
    """Scores by split; thresholds of labels, where there are any number, are those chosen on validation images."""
    thresholds = None
    if "validation" in values and is_multi_label(splits["validation"]):
        thresholds = choose_thresholds(sigmoid(values["validation"]), label_array(splits["validation"]))
    return {split: measured(part, splits[split], classes, thresholds) for split, part in values.items()}


def _open_reference(model: Any, way: Way, trained: Trained) -> Reference | None:
    """The pretrained network, with the head of the head phase if there was one; the result itself where it is that."""
    if trained.head_phase is not None:
        network = model
        if trained.kept.number > 0:
            network = copy.deepcopy(model)
            restore_weights(network, trained.phases[0].folder / trained.results[0].checkpoint)
    elif trained.load is not None:
        network = trained.load().to(model.device).eval()
    else:
        return None
    return Reference(network, way.pixels(trained.data.train.rows, model.device))


def _alone(
    reference: Reference, splits: Mapping[str, Dataset], way: Way, trained: Trained
) -> dict[str, dict[str, np.ndarray]]:
    """Logits and features where nothing is in common: of the validation images only, if all would take long."""
    if sum(map(len, splits.values())) > _WORTH * trained.work and "validation" in splits:
        splits = {"validation": splits["validation"]}
    return dict(zip(("logits", "features"), way.over(splits, *reference.alone()), strict=False))


def _known(reference: Reference, way: Way, trained: Trained) -> tuple[np.ndarray, np.ndarray, str] | None:
    """Features (M, D) and labels (M,) of training images, and in words what they are; None if that would take long."""
    labels = trained.labels
    places = np.linspace(0, len(labels) - 1, min(len(labels), _MOST_KNOWN)).astype(int)
    words = f"{len(places):,} training images"
    recorded = _recorded(reference, trained)
    if recorded is not None:
        words += " as augmented in the first epoch" if recorded.is_augmented else ""
        return reference.features(recorded, places.tolist()).numpy(), labels[places], words
    if len(places) > _WORTH * trained.work:
        return None
    _, features = way.over({"train": trained.data.train.rows.select(places.tolist())}, *reference.alone())
    return features["train"], labels[places], words


def _recorded(reference: Reference, trained: Trained) -> TrainingActivations | None:
    """What the first phase has recorded, if anything."""
    phase, data = trained.phases[0], trained.data
    if trained.replay is None or phase.spec.adapter is not None:
        return None
    split_point = reference.head
    if trained.head_phase is None:
        network = prepare_phase(reference.model, phase.spec)
        split_point = find_split_point(network, reference.pixels, phase.spec.batchnorm)
    arguments = training_arguments(phase.spec, phase.folder, seed=phase.seed, validate=data.validation is not None)
    frozen = data.frozen_pass(reference.model, arguments, "baselines")
    return None if split_point is None else trained.replay.recorded(frozen, split_point, phase.folder)


@dataclass(frozen=True)
class _Beside:
    """The baselines of a result.

    Attributes:
        splits: Rows by split.
        scores: Of the result.
        trained: What the run has done.
    """

    splits: Mapping[str, Dataset]
    scores: Mapping[str, Scores]
    trained: Trained

    @property
    def _classes(self) -> tuple[str, ...]:
        return next(iter(self.scores.values())).classes

    def majority(self) -> dict[str, Any]:
        """The most frequent class; of labels by themselves, how frequent each is."""
        labels = self.trained.labels
        found = {s: majority(labels, len(self._classes), len(part.labels)) for s, part in self.scores.items()}
        if labels.ndim == 2:
            about = "each label's share of the training images as its probability, for every image"
        else:
            most = self._classes[int(np.bincount(labels).argmax())]
            about = (
                f"always {most}, the most frequent class of the training images; probabilities are the classes' shares"
            )
        return {"about": about, **self._metrics_of_shares(found)}

    def neighbours(
        self, features: Mapping[str, np.ndarray] | None, known: tuple[np.ndarray, np.ndarray, str] | None
    ) -> dict[str, Any]:
        """Nearest neighbours of features, or why there are none."""
        trained = self.trained
        if features is None and trained.load is None and trained.head_phase is None:
            return {"about": "left out: the pretrained network was given as an object, and trained in place"}
        if features is None:
            return {"about": "left out: what enters this network's head is no function of the image alone"}
        if known is None:
            return {
                "about": "left out: a pass over the training images would have taken more than a quarter of this run"
            }
        near, labels, words = known
        classes = len(self._classes)
        found = {s: nearest_neighbours(near, labels, asked, classes=classes) for s, asked in features.items()}
        about = (
            f"the {min(NEIGHBOURS, len(near))} nearest of {words}, by cosine similarity of what enters the pretrained "
            f"network's head ({near.shape[1]:,} numbers)"
        )
        return {"about": about + self._restricted(found), **self._metrics_of_shares(found)}

    def head(self, logits: Mapping[str, np.ndarray] | None) -> dict[str, dict[str, Any]]:
        """The model of the head phase, if there was one."""
        trained = self.trained
        if trained.head_phase is None:
            return {}
        if trained.kept.number == 0:
            metrics = {split: part.metrics for split, part in self.scores.items()}
            return {"head": {"about": f"the model after {trained.head_phase}, which is the result", **metrics}}
        assert logits is not None
        found = _values(logits, trained)
        about = f"the model after {trained.head_phase}" + self._restricted(found)
        return {"head": {"about": about, **self._metrics(found)}}

    def _restricted(self, found: Mapping[str, np.ndarray]) -> str:
        lacking = [split for split in self.scores if split not in found]
        why = "which would have taken more than a quarter of this run"
        return f"; without another pass over the {lacking[0]} images, {why}" if lacking else ""

    def _metrics_of_shares(self, found: Mapping[str, np.ndarray]) -> dict[str, Any]:
        if not self.trained.data.is_multi_label:
            return self._metrics(found)
        return self._metrics({split: log_odds(part) for split, part in found.items()})

    def _metrics(self, found: Mapping[str, np.ndarray]) -> dict[str, Any]:
        measured_ones = _measured(found, self.splits, self._classes)
        return {split: part.metrics for split, part in measured_ones.items()}


def _tell(scores: Mapping[str, Scores], baselines: Mapping[str, Mapping[str, Any]]) -> None:
    split = "test" if "test" in scores else next(iter(scores))
    name = scores[split].headline
    names = {
        "majority": "the most frequent class",
        "prevalence": "how frequent each label is",
        "knn": "nearest neighbours",
        "head": "the head phase",
    }
    told = [f"{row[split][name]['value']:.4f} {names[n]}" for n, row in baselines.items() if split in row]
    result = scores[split].metrics[name]["value"]
    _LOG.info(f"{name.replace('_', ' ')} on {split}: {result:.4f}; beside it {', '.join(told)}")
