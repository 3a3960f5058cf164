"""Scores of what is simpler than the result: most frequent class, nearest neighbours, the model of the head phase."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.logging import get_logger

from hfft.data.sources.labels import label_array
from hfft.evaluators.pretrained import Reference
from hfft.evaluators.protocol import Evaluator, Job, JointPass, Result, measure_logits, measure_splits
from hfft.metrics.probabilities import log_odds
from hfft.metrics.scores import Scores
from hfft.model.checkpoint import restore_weights
from hfft.runs.record import PhaseRecord

NEIGHBOURS = 20  # and the temperature: the protocol of DINO, https://hf.co/papers/2104.14294
_TEMPERATURE = 0.07
_NUMBERS_AT_ONCE = 2**24  # float32, of a matrix of similarities
_MOST_KNOWN = 20_000  # training images whose features are compared with
_WORTH = 0.25  # of a run's own work: what baselines may take
_BACKWARD = 3  # forward passes that a training step is worth where all of the network trains
_TITLES = {
    "majority": "most frequent class",
    "prevalence": "share of each label",
    "knn": "nearest neighbours",
    "head": "head phase",
}
_ByName = Mapping[str, np.ndarray]

_LOG = get_logger(__name__)


class Baselines(Evaluator):
    """Scores baselines, in the result's own pass where it has layers in common with the pretrained network."""

    name = "baselines"

    def __init__(self) -> None:
        """Begin with nothing computed."""
        self._reference: Reference | None = None
        self._found: dict[str, dict[str, np.ndarray]] = {}  # logits and features of the reference, by split

    def join_pass(self, job: Job, result: Result) -> JointPass | None:
        """Compute the reference's logits and features from what the result's layers compute of each image."""
        self._reference = _open_reference(job, result)
        joint = None if self._reference is None else self._reference.joint(result.model)
        return None if joint is None else JointPass(*joint, self._take)

    def _take(self, values: list[dict[str, np.ndarray]]) -> None:
        self._found = dict(zip(("logits", "features"), values, strict=True))

    def after_run(self, job: Job, result: Result) -> Mapping[str, Any] | None:
        """By baseline `about`, a sentence, and metrics with intervals by split."""
        if not result.scores:
            return {}
        if self._reference is not None and not self._found:
            self._pass_alone(self._reference, job, result)
        known = self._training_features(job, result)
        if not PartialState().is_main_process:
            return None
        sections = {"prevalence" if job.data.is_multi_label else "majority": _majority(job, result)}
        sections["knn"] = self._neighbours(job, result, known)
        if _head_phase(job) is not None:
            sections["head"] = self._head(job, result)
        _log(result.scores, sections)
        return sections

    def _pass_alone(self, reference: Reference, job: Job, result: Result) -> None:
        """A pass over the validation images only, if one over all held-out images would take long."""
        splits = job.held_out
        if sum(map(len, splits.values())) > _WORTH * _work(job, result) and "validation" in splits:
            splits = {"validation": splits["validation"]}
        self._found = dict(zip(("logits", "features"), result.forward.over(splits, *reference.alone()), strict=False))

    def _training_features(self, job: Job, result: Result) -> tuple[np.ndarray, np.ndarray, str] | str:
        """Features (M, D) and labels of training images, and in words what they are; or why there are none."""
        if self._reference is None:
            return "the pretrained network was given as an object, and trained in place"
        if "features" not in self._found:
            return "what enters this network's head is no function of the image alone"
        labels = label_array(job.data.train.rows)
        places = np.linspace(0, len(labels) - 1, min(len(labels), _MOST_KNOWN)).astype(int)
        words = f"{len(places):,} training images"
        recorded = self._reference.training_activations(job)
        if recorded is not None:
            words += " as augmented in the first epoch" if recorded.is_augmented else ""
            return self._reference.features(recorded, places.tolist()).numpy(), labels[places], words
        if len(places) > _WORTH * _work(job, result):
            return "a pass over the training images would have taken more than a quarter of this run"
        rows = job.data.train.rows.select(places.tolist())
        _, features = result.forward.over({"train": rows}, *self._reference.alone())
        return features["train"], labels[places], words

    def _neighbours(self, job: Job, result: Result, known: tuple[np.ndarray, np.ndarray, str] | str) -> dict[str, Any]:
        if isinstance(known, str):
            return {"about": f"left out: {known}"}
        near, labels, words = known
        found = {
            split: nearest_neighbours(near, labels, asked, classes=len(job.images.labels))
            for split, asked in self._found["features"].items()
        }
        about = (
            f"the {min(NEIGHBOURS, len(near))} nearest of {words}, by cosine similarity of what enters the pretrained "
            f"network's head ({near.shape[1]:,} numbers)"
        )
        return {"about": about + _left_out(found, result), **_metrics_of_shares(found, job)}

    def _head(self, job: Job, result: Result) -> dict[str, Any]:
        about = f"the model after {_head_phase(job)}"
        if result.selection.number == 0:
            metrics = {split: scores.metrics for split, scores in result.scores.items()}
            return {"about": f"{about}, which is the result", **metrics}
        logits = self._found["logits"]
        metrics = {split: scores.metrics for split, scores in measure_logits(logits, job).items()}
        return {"about": about + _left_out(logits, result), **metrics}


def nearest_neighbours(known: np.ndarray, labels: np.ndarray, asked: np.ndarray, *, classes: int) -> np.ndarray:
    """Classify features (N, D) by their nearest neighbours among (M, D): cosine similarity, the nearer the heavier.

    Each of the 20 neighbours votes with exp(similarity / 0.07), as in DINO's protocol, for its label of (M,), or for
    its labels of (M, K) of 0 and 1. The probabilities, (N, K) float32, are the shares of the votes, with one more
    neighbour that is of each class by its share of the known images: none is 0.
    """
    near = torch.nn.functional.normalize(torch.from_numpy(known).float(), dim=1)  # (M, D)
    targets = torch.from_numpy(labels)
    targets = (targets if labels.ndim == 2 else torch.nn.functional.one_hot(targets, classes)).float()  # (M, K)
    count = min(NEIGHBOURS, len(known))
    prior = torch.from_numpy(class_frequencies(labels, classes))
    found = []
    for part in torch.from_numpy(asked).float().split(max(1, _NUMBERS_AT_ONCE // len(known))):
        similarity, places = (torch.nn.functional.normalize(part, dim=1) @ near.T).topk(count)  # (B, count)
        weights = torch.softmax(similarity / _TEMPERATURE, dim=1)
        votes = torch.einsum("bn,bnk->bk", weights, targets[places])
        found.append((count * votes + prior) / (count + 1))
    return torch.cat(found).numpy()


def class_frequencies(labels: np.ndarray, classes: int) -> np.ndarray:
    """Share of the images that have each class, of labels (N,) or (N, K) of 0 and 1: (K,) float32."""
    if labels.ndim == 2:
        return labels.mean(axis=0, dtype=np.float64).astype(np.float32)
    return (np.bincount(labels, minlength=classes) / len(labels)).astype(np.float32)


def _head_phase(job: Job) -> str | None:
    """Name of the first phase, if it trains the head alone: its encoder is the pretrained one."""
    spec = job.phases[0].spec
    return spec.name if spec.trains_head_alone else None


def _open_reference(job: Job, result: Result) -> Reference | None:
    """The pretrained network, with the head of the head phase if there was one; the result itself where it is that."""
    if _head_phase(job) is not None:
        network = result.model
        if result.selection.number > 0:
            network = copy.deepcopy(result.model)
            restore_weights(network, job.phases[0].folder / result.phases[0].checkpoint)
    elif job.load is not None:
        network = job.load().to(result.model.device).eval()
    else:
        return None
    return Reference(network, result.forward.first_pixels(job.data.train.rows, result.model.device))


def _work(job: Job, result: Result) -> int:
    """Forward passes of an image that training was worth, at least."""
    total = 0
    for phase, found in zip(job.phases, result.phases, strict=True):
        record = PhaseRecord(phase.folder)
        if record.engine() is not None:
            total += len(job.data.train)  # recorded once
        else:
            total += found.steps * record.plan.batch * (1 if phase.spec.trains_head_alone else _BACKWARD)
    return total


def _majority(job: Job, result: Result) -> dict[str, Any]:
    """The most frequent class; of labels by themselves, how frequent each is."""
    labels, classes = label_array(job.data.train.rows), job.images.labels
    frequencies = class_frequencies(labels, len(classes))
    if labels.ndim == 2:
        about = "each label's share of the training images as its probability, for every image"
    else:
        most = classes[int(np.bincount(labels).argmax())]
        about = f"always {most}, the most frequent class of the training images; probabilities are the classes' shares"
    found = {split: np.tile(frequencies, (len(scores.labels), 1)) for split, scores in result.scores.items()}
    return {"about": about, **_metrics_of_shares(found, job)}


def _left_out(found: _ByName, result: Result) -> str:
    lacking = [split for split in result.scores if split not in found]
    why = "which would have taken more than a quarter of this run"
    return f"; without another pass over the {lacking[0]} images, {why}" if lacking else ""


def _metrics_of_shares(shares: _ByName, job: Job) -> dict[str, Any]:
    """Metrics by split of probabilities (N, K)."""
    if job.data.is_multi_label:
        shares = {split: log_odds(part) for split, part in shares.items()}
    return {split: one.metrics for split, one in measure_splits(shares, job).items()}


def _log(scores: Mapping[str, Scores], sections: Mapping[str, Mapping[str, Any]]) -> None:
    split = "test" if "test" in scores else next(iter(scores))
    name = scores[split].headline
    others = [f"{row[split][name]['value']:.4f} {_TITLES[key]}" for key, row in sections.items() if split in row]
    result = scores[split].metrics[name]["value"]
    _LOG.info(f"{name.replace('_', ' ')} on {split}: {result:.4f}; baselines: {', '.join(others)}")
