"""What the encoder still knows of its old task: after each phase it is compared with the pretrained one.

The same images go through both, with the checkpoint's own head, if there is one. Its answers may be nonsense, as the
images needn't show anything that it knows; how many of them change says how far its inputs have moved.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from torch import nn

from hfft.data.images.batches import Examples
from hfft.data.images.transforms import evaluation_transform
from hfft.data.sources.labels import label_array
from hfft.data.sources.reading import ImageData
from hfft.evaluators.features import HEAD_INPUT, Features, as_before, collect_features, unit_rows
from hfft.evaluators.protocol import Evaluator, Job, Result
from hfft.model.anatomy import dissect, head_modules, tensor_names
from hfft.model.checkpoint import load_original
from hfft.model.freezing import hash_tensors
from hfft.recipe.spec import ModelSpec
from hfft.runs.record import RETENTION
from hfft.system.distributed import meet
from hfft.system.files import read_json, write_json
from hfft.training.phase_data import PhaseRun

_INTERPOLATED = "interpolated"
_IMAGES = 128
_NEIGHBOURS = 10
_SAME = 1e-3  # of the largest logit: far above rounding

_LOG = get_logger(__name__)


@dataclass(frozen=True)
class Sample:
    """The images that all encoders are compared on."""

    split: str
    examples: Examples
    labels: np.ndarray  # class indices, (N,), or which labels they have, (N, K)
    floats: Callable[[torch.Tensor], torch.Tensor]  # pixels of a batch to what the network takes


def choose_sample(images: ImageData, processor: Any, seed: int) -> Sample:
    """Choose at most 128 validation images at random, or training images where there are none."""
    split = "validation" if "validation" in images.splits else "train"
    rows = images.splits[split]
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:_IMAGES])
    rows = rows.select(chosen.tolist())
    transform = evaluation_transform(processor)
    return Sample(split, Examples(rows, transform.pixels), label_array(rows), transform.floats)


@dataclass(frozen=True)
class _Pretrained:
    """The pretrained encoder."""

    hashes: Mapping[str, bytes]  # of all tensors outside of the head
    head: Mapping[str, nn.Module] | None  # path to module of the head that the checkpoint came with, if with one
    features: Features  # of the sample, with that head's answers if there is one


class Retention(Evaluator):
    """Compares the encoder with the pretrained one; what was measured before is read from its file."""

    name = "retention"

    def __init__(self, job: Job, network: Any) -> None:
        """Measure the encoder of the network as it was loaded, unless all files of the run are there."""
        self._sample = sample = choose_sample(job.images, job.processor, job.recipe.seed)
        self._before: _Pretrained | None = None
        self._found: dict[str, dict[str, Any]] = {}
        files = [phase.folder / RETENTION for phase in job.phases]
        files += [job.folder / RETENTION] if job.recipe.retain.interpolate is not None else []
        if PartialState().is_main_process and not all(file.is_file() for file in files):
            head = None if job.load is None else _old_head(network, job.recipe.model, sample)
            self._before = _Pretrained(_encoder_hashes(network), head, _features(network, head, sample))
        meet()

    def after_phase(self, job: Job, phase: PhaseRun, network: Any) -> None:
        """Measure the encoder, in the main process, and write the phase's retention.json."""
        self._measure(phase.spec.name, phase.folder / RETENTION, phase.title, network)

    def before_saving(self, job: Job, network: Any) -> None:
        """Measure the encoder of interpolated weights."""
        if job.recipe.retain.interpolate is not None:
            self._measure(_INTERPOLATED, job.folder / RETENTION, _INTERPOLATED, network)

    def after_run(self, job: Job, result: Result) -> Mapping[str, Any] | None:
        """The sample, and by phase what was measured, without the single blocks."""
        phases = {}
        for name, found in self._found.items():
            kept = {key: value for key, value in found.items() if key not in ("blocks", "sample")}
            phases[name] = {**kept, HEAD_INPUT.replace(" ", "_"): found["blocks"].get(HEAD_INPUT)}
        return {"sample": {"split": self._sample.split, "images": len(self._sample.labels)}, "phases": phases}

    def _measure(self, name: str, file: Path, title: str, network: Any) -> None:
        if PartialState().is_main_process:
            if not file.is_file():
                assert self._before is not None
                write_json(file, _compare(self._before, network, self._sample, title))
            self._found[name] = read_json(file)
        meet()


def _compare(before: _Pretrained, network: Any, sample: Sample, title: str) -> dict[str, Any]:
    changed = _changed_parts(network, before.hashes)
    after = _features(network, before.head, sample) if changed else before.features
    found = {
        "sample": {"split": sample.split, "images": len(sample.labels)},
        "changed": changed,
        "old_task": None if before.head is None else _compare_answers(before.features.logits, after.logits),
        "knn_accuracy": {"before": _nearest(before.features, sample), "after": _nearest(after, sample)},
        "blocks": {
            name: {"cka": linear_cka(old, after.by_part[name]), "cosine_drift": cosine_drift(old, after.by_part[name])}
            for name, old in before.features.by_part.items()
        },
    }
    _LOG.info(f"{title}: {_in_words(found)}")
    return found


def _encoder_hashes(network: Any) -> dict[str, bytes]:
    head = set(dissect(network).part("head").tensors)
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return hash_tensors({name: tensors[name] for name in tensor_names(network) if name not in head})


def _changed_parts(network: Any, before: Mapping[str, bytes]) -> list[str]:
    """Names of the parts of the encoder with another tensor than the pretrained one's."""
    now = _encoder_hashes(network)
    parts = [part for part in dissect(network).parts if part.name != "head"]
    return [part.name for part in parts if any(before.get(name) != now[name] for name in part.tensors)]


def _features(network: Any, head: Mapping[str, nn.Module] | None, sample: Sample) -> Features:
    with _with_head(network, head or {}):
        return collect_features(network, sample.examples, sample.floats)


@contextmanager
def _with_head(network: nn.Module, head: Mapping[str, nn.Module]) -> Iterator[None]:
    own = {path: network.get_submodule(path) for path in head}
    try:
        for path, module in head.items():
            network.set_submodule(path, module)
        yield
    finally:
        for path, module in own.items():
            network.set_submodule(path, module)


def _old_head(network: Any, checkpoint: ModelSpec, sample: Sample) -> dict[str, nn.Module] | None:
    """The head that the checkpoint came with, if the network computes with it what the checkpoint does."""
    original = load_original(checkpoint)
    if original is None:
        return None
    paths = head_modules(dissect(original))
    if paths != head_modules(dissect(network)):
        return None
    head = {path: original.get_submodule(path) for path in paths}
    pixels = sample.floats(sample.examples[0]["pixel_values"].unsqueeze(0))  # (1, C, H, W)
    with as_before(network), _with_head(network, head), torch.no_grad():
        found = network.to("cpu").eval()(pixel_values=pixels).logits  # (1, K)
        expected = original(pixel_values=pixels).logits
    if found.shape != expected.shape or (found - expected).abs().max() > _SAME * expected.abs().max():
        _LOG.warning(f"retention: {checkpoint.checkpoint}: the old head doesn't fit; its task is not measured")
        return None
    return head


def _compare_answers(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    same, divergence = agreement(before, after), kl_divergence(before, after)
    return {"classes": before.shape[1], "agreement": same, "kl_divergence": divergence}


def _nearest(features: Features, sample: Sample) -> float | None:
    """None where sets of labels would have to agree, which few neighbours' do."""
    if HEAD_INPUT not in features.by_part or sample.labels.ndim == 2:
        return None
    return knn_accuracy(features.by_part[HEAD_INPUT], sample.labels)


def _in_words(found: Mapping[str, Any]) -> str:
    images = f"{found['sample']['images']} {found['sample']['split']} images"
    if not found["changed"]:
        return "the encoder is the pretrained one"
    old, nearest = found["old_task"], found["knn_accuracy"]
    words = []
    if old is not None:
        words.append(f"the checkpoint's own head answers the same to {old['agreement']:.0%} of {images}")
    if HEAD_INPUT in found["blocks"]:
        words.append(f"features drifted by {found['blocks'][HEAD_INPUT]['cosine_drift']:.3f} (1 - cosine)")
    if nearest["after"] is not None:
        words.append(f"nearest neighbours are right in {nearest['after']:.0%} (pretrained: {nearest['before']:.0%})")
    return "; ".join(words) or "the encoder has changed"


def linear_cka(before: np.ndarray, after: np.ndarray) -> float | None:
    """Centred kernel alignment of features (N, D) and (N, E) with a linear kernel.

    It is 1 for features that differ by rotation, scale and shift, and about 0 for unrelated ones. The estimate is the
    unbiased one, which leaves each image's similarity to itself out: the usual one is far above 0 for unrelated
    features of more dimensions than images, and those of most networks are such. It can be a little below 0 by chance.
    Source: https://hf.co/papers/1905.00414; the unbiased estimate: https://hf.co/papers/2010.15327.

    Returns:
        None for fewer than 4 images, or where all images have the same features.
    """
    if len(before) < 4:
        return None
    first, second = _kernel(before), _kernel(after)
    scale = _independence(first, first) * _independence(second, second)
    return None if scale <= 0 else float(_independence(first, second) / np.sqrt(scale))


def cosine_drift(before: np.ndarray, after: np.ndarray) -> float:
    """Mean over the images of 1 - cosine between features (N, D) and (N, D); 0 is no change, 2 the opposite."""
    if np.array_equal(before, after):
        return 0.0
    first, second = unit_rows(before), unit_rows(after)
    return float(np.mean(1 - np.sum(first * second, axis=1)))


def knn_accuracy(features: np.ndarray, labels: np.ndarray) -> float | None:
    """Share of images whose nearest others, by cosine of features (N, D), have mostly its own label, of (N,).

    Of N images the 10 nearest others vote, or the square root of N if that is less; of classes with as many votes the
    one with more similar neighbours wins. An image whose class has no other image doesn't count: None if none counts.
    """
    _, place, images = np.unique(labels, return_inverse=True, return_counts=True)
    counted = images[place] > 1
    if not counted.any():
        return None
    unit = unit_rows(features)
    cosine = unit @ unit.T  # (N, N)
    np.fill_diagonal(cosine, -np.inf)
    many = min(_NEIGHBOURS, max(round(np.sqrt(len(labels))), 1))
    nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :many]  # (N, many)
    rows = np.arange(len(labels))[:, None]
    votes = np.zeros((len(labels), len(images)))
    np.add.at(votes, (rows, place[nearest]), 1 + cosine[rows, nearest] / (4 * many))  # a tie-break, below one vote
    return float(np.mean((votes.argmax(axis=1) == place)[counted]))


def agreement(before: np.ndarray, after: np.ndarray) -> float:
    """Share of images for which logits (N, K) and (N, K) have the same class on top."""
    return float(np.mean(before.argmax(axis=1) == after.argmax(axis=1)))


def kl_divergence(before: np.ndarray, after: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence of the answers after from those before, both as logits (N, K), in nats."""
    first, second = _log_softmax(before), _log_softmax(after)
    return float(max(np.mean(np.sum(np.exp(first) * (first - second), axis=1)), 0.0))  # rounding aside, never below


def _kernel(features: np.ndarray) -> np.ndarray:
    """Products of centred features without those of an image with itself, (N, N) float64."""
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    kernel = centred @ centred.T
    np.fill_diagonal(kernel, 0)
    return kernel


def _independence(first: np.ndarray, second: np.ndarray) -> float:
    """Unbiased estimate of the Hilbert-Schmidt independence criterion of two kernels without diagonals."""
    count = len(first)
    total = np.sum(first * second)
    total += first.sum() * second.sum() / ((count - 1) * (count - 2))
    total -= 2 / (count - 2) * np.dot(first.sum(axis=0), second.sum(axis=0))
    return float(total / (count * (count - 3)))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
