"""What the encoder still knows of its old task: after each phase it is compared with the pretrained one.

The same images go through both, with the head that the checkpoint came with, if it came with one. The old head's
answers to them may be nonsense, as the images needn't show anything that it knows; how many answers change says how
far its inputs have moved.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from hfft.evaluators.features import HEAD_INPUT, Features, as_before, collect_features
from hfft.evaluators.protocol import Evaluator, Job, Result
from hfft.evaluators.similarity import agreement, cosine_drift, kl_divergence, knn_accuracy, linear_cka
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
_SAME = 1e-3  # of the largest logit: far above rounding

_LOG = get_logger(__name__)


@dataclass(frozen=True)
class Sample:
    """The images that all encoders are compared on.

    Attributes:
        split: `validation`, or `train` where there is no validation.
        examples: At most 128 images, chosen by the seed.
        labels: Their class indices, (N,), or which labels they have, (N, K).
        floats: Pixels of a batch to what the network takes.
    """

    split: str
    examples: Examples
    labels: np.ndarray
    floats: Callable[[torch.Tensor], torch.Tensor]


def choose_sample(images: ImageData, processor: Any, seed: int) -> Sample:
    """Choose images at random, and how they are read: as in evaluation."""
    split = "validation" if "validation" in images.splits else "train"
    rows = images.splits[split]
    chosen = np.sort(np.random.default_rng(seed).permutation(len(rows))[:_IMAGES])
    rows = rows.select(chosen.tolist())
    transform = evaluation_transform(processor)
    return Sample(split, Examples(rows, transform.pixels), label_array(rows), transform.floats)


@dataclass(frozen=True)
class _Pretrained:
    """The pretrained encoder.

    Attributes:
        hashes: Of all tensors outside of the head.
        head: Path to module of the head that the checkpoint came with; None where it came without.
        features: Of the sample, with that head's answers if there is one.
    """

    hashes: Mapping[str, bytes]
    head: Mapping[str, nn.Module] | None
    features: Features


class Retention(Evaluator):
    """Compares the encoder with the pretrained one; what was measured before is read from its file."""

    name = "retention"

    def __init__(self, network: Any, sample: Sample, *, checkpoint: ModelSpec | None, files: Sequence[Path]) -> None:
        """Measure the encoder before any phase.

        Args:
            network: The model as it was loaded; is left as it was.
            sample: Images.
            checkpoint: Where the network came from, for its old head; None where that is not known.
            files: That will be asked for; nothing is computed where all of them are there.
        """
        self._sample = sample
        self._before: _Pretrained | None = None
        self._found: dict[str, dict[str, Any]] = {}
        if PartialState().is_main_process and not all(file.is_file() for file in files):
            head = None if checkpoint is None else _old_head(network, checkpoint, sample)
            self._before = _Pretrained(_encoder_hashes(network), head, _features(network, head, sample))
        meet()

    @classmethod
    def of_job(cls, job: Job, network: Any) -> "Retention":
        """The evaluator of a run, whose network is as it was loaded."""
        files = [phase.folder / RETENTION for phase in job.phases]
        files += [job.folder / RETENTION] if job.recipe.retain.interpolate is not None else []
        sample = choose_sample(job.images, job.processor, job.recipe.seed)
        return cls(network, sample, checkpoint=None if job.load is None else job.recipe.model, files=files)

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
        "blocks": _compare_parts(before.features, after),
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
    device = torch.device(str(PartialState().device))
    batch_size = 8 if device.type == "cpu" else 64  # on a CPU few at once are faster: more leave its cache
    with _with_head(network, head or {}):
        return collect_features(network, sample.examples, sample.floats, device=device, batch_size=batch_size)


@contextmanager
def _with_head(network: nn.Module, head: Mapping[str, nn.Module]) -> Iterator[None]:
    """The modules replace those of the network's head for a while."""
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
    return {
        "classes": before.shape[1],
        "agreement": agreement(before, after),
        "kl_divergence": kl_divergence(before, after),
    }


def _compare_parts(before: Features, after: Features) -> dict[str, dict[str, float | None]]:
    return {
        name: {
            "cka": linear_cka(features, after.by_part[name]),
            "cosine_drift": cosine_drift(features, after.by_part[name]),
        }
        for name, features in before.by_part.items()
    }


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
