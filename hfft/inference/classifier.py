"""Images -> labels and probabilities, through the same pixels as the evaluation of the run."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import numpy as np
import torch
from transformers import PreTrainedModel

from hfft.data.images.resize_mode import try_processor
from hfft.data.images.transforms import evaluation_transform
from hfft.errors import DataError, ModelError
from hfft.inference.opening import Opening, local_folder, model_source, move_model, open_model
from hfft.inference.reading import ImageLike, Ready, Skipped, is_one_image, read_ahead
from hfft.metrics.probabilities import to_probabilities
from hfft.metrics.thresholds import at_temperature, kept_temperature, kept_threshold, kept_thresholds
from hfft.model.config import has_many_labels, labels_of
from hfft.system.files import expanded
from hfft.system.text import printable

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hfft.evaluators.out_of_distribution import Novelty

Images = ImageLike | Iterable[ImageLike]
BATCH = 32  # images per forward pass
UNSURE = "unsure"
"""The label of an image whose probability is too low for the wanted precision."""


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        file: Path or URL of the image, or its number in the call.
        label: The most probable class, or UNSURE below the threshold of the wanted precision. Of a multi-label model,
            all of `labels`, joined by `, `.
        probability: The probability of the most probable class.
        top: The most probable classes with their probabilities, best first.
        novelty: Share of the run's validation images that are more like its training images; None if not asked for.
        labels: Of a multi-label model, the labels whose probability reaches their threshold, best first; else None.
    """

    file: str
    label: str
    probability: float
    top: dict[str, float]
    novelty: float | None = None
    labels: dict[str, float] | None = None


class Classifier:
    """A trained model with its processor and label names.

    Attributes:
        is_multi_label: Whether an image can get any number of labels.
        thresholds: Of a multi-label model, the probability from which each label is given, (K,), chosen on the run's
            validation images; else None.
    """

    def __init__(
        self, model: PreTrainedModel, processor: Any, *, calibrated: bool = False, precision: float | None = None
    ) -> None:
        """Wrap a model with id2label set, and the processor that it was evaluated with.

        `calibrated` and `precision` are those of `from_pretrained`.

        Raises:
            ModelError: If the model's config lacks what they need, or the processor can't take an image.
        """
        try_processor(processor)
        self.model = model.eval()
        self.classes = _distinct(list(map(printable, labels_of(model.config))))
        self.processor = processor
        self.transform = evaluation_transform(processor)
        calibrated = calibrated or precision is not None
        self.temperature = kept_temperature(model.config) if calibrated else 1.0
        self.novelty: Novelty | None = None
        self.is_multi_label = has_many_labels(model.config)
        self.thresholds: np.ndarray | None = None
        if self.is_multi_label:
            kept = kept_thresholds(model.config, len(self.classes))
            self.thresholds = at_temperature(kept, self.temperature) if calibrated else kept
        self.threshold = 0.0 if precision is None else kept_threshold(model.config, precision)
        if precision is not None and UNSURE in self.classes:
            raise ModelError(f"precision: one of the model's classes is called {UNSURE!r} itself; leave precision out")

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | str | None = None,
        calibrated: bool = False,
        precision: float | None = None,
        novelty: bool = False,
        **opening: "Unpack[Opening]",
    ) -> "Classifier":
        """Open a run folder, or a model or an adapter in a folder or on the Hub.

        Args:
            source: Folder or Hub id.
            device: The accelerator, if there is one, when None.
            dtype: Of weights and computation, such as `bfloat16`; float32, as in the evaluation, when None.
            calibrated: Divide the logits by the temperature that was fitted on the run's validation images: the same
                labels with better calibrated probabilities.
            precision: 0.9, 0.95 or 0.99: calibrated, and UNSURE below the probability from which that share of the
                predictions on the run's validation images was right.
            novelty: Measure how unlike the training images each image is; for a run with `novelty: true`.
            **opening: `revision`, a branch, tag or commit on the Hub; `trust_remote_code`, whether Python code that
                the model or the run brings may run, whatever its recipe says; `subfolder`, where in the folder or
                the repository the model is, such as `adapter`.

        Raises:
            ModelError: If there is no such model, device or dtype, the model doesn't hold what was asked for, or it
                brings code that isn't trusted.
        """
        source, subfolder = expanded(source), opening.get("subfolder")
        where = source if subfolder is not None else model_source(source)
        model, processor = open_model(where, **opening)
        move_model(model, device, dtype)
        classifier = cls(model, processor, calibrated=calibrated, precision=precision)
        if novelty:
            from hfft.evaluators.out_of_distribution import Novelty  # imports datasets

            classifier.novelty = Novelty.load(local_folder(where, opening.get("revision"), subfolder))
        return classifier

    @overload
    def __call__(self, images: ImageLike, *, top: int = ..., batch_size: int = ...) -> Prediction: ...

    @overload
    def __call__(self, images: Iterable[ImageLike], *, top: int = ..., batch_size: int = ...) -> list[Prediction]: ...

    def __call__(self, images: Images, *, top: int = 1, batch_size: int = BATCH) -> Prediction | list[Prediction]:
        """Classify an image, or several, as `predict` does.

        Returns:
            One prediction for one image, a list for several or none.

        Raises:
            DataError: If an image can't be read; names it.
        """
        predictions = list(self.predict(images, top=top, batch_size=batch_size))
        return predictions[0] if is_one_image(images) else predictions

    @overload
    def predict(
        self, images: Images, *, top: int = ..., batch_size: int = ..., on_error: Literal["stop"] = ...
    ) -> Iterator[Prediction]: ...

    @overload
    def predict(
        self, images: Images, *, top: int = ..., batch_size: int = ..., on_error: Literal["skip", "stop"]
    ) -> Iterator[Prediction | Skipped]: ...

    def predict(
        self, images: Images, *, top: int = 1, batch_size: int = BATCH, on_error: Literal["skip", "stop"] = "stop"
    ) -> Iterator[Prediction | Skipped]:
        """Classify images as they come, in their order; about three batches are in memory at a time.

        Args:
            images: One image or many: paths, encoded bytes, Pillow images, `RemoteImage`s, or numpy arrays and torch
                tensors (H, W) or (H, W, C), uint8, uint16, or floating point from 0 to 1. EXIF's orientation is
                applied. A Pillow image or an array may be closed or changed once it has been taken.
            top: Classes to return for each image, or all of them if they are fewer.
            batch_size: Images per forward pass.
            on_error: `stop` raises at an image that can't be read, after the predictions for all images before it;
                `skip` yields a `Skipped` instead.

        Raises:
            DataError: If an image can't be read and `on_error` is `stop`; names it.
            ValueError: If another argument is invalid.
        """
        if top < 1 or batch_size < 1:
            raise ValueError(f"found top={top}, batch_size={batch_size}; allowed: whole numbers above 0")
        if on_error not in ("skip", "stop"):
            raise ValueError(f"found on_error={on_error!r}; allowed: 'skip', 'stop'")
        several = cast("Iterable[ImageLike]", [images] if is_one_image(images) else images)
        entries = read_ahead(several, self.transform.pixels, ahead=2 * batch_size)
        return self._stream(entries, top, batch_size, stop=on_error == "stop")

    def _stream(
        self, entries: Iterator[Ready | Skipped], top: int, batch_size: int, *, stop: bool
    ) -> Iterator[Prediction | Skipped]:
        while batch := list(islice(entries, batch_size)):
            rows = self._answers([entry for entry in batch if isinstance(entry, Ready)])
            for entry in batch:
                if isinstance(entry, Ready):
                    yield self._prediction(entry.file, *next(rows), top=top)
                elif stop:
                    raise DataError(f"{entry.file}: {entry.reason}")
                else:
                    yield entry

    def _answers(self, batch: Sequence[Ready]) -> Iterator[tuple[np.ndarray, float | None]]:
        """Probabilities (K,) and novelty of each image; as some processors keep the aspect ratio, sizes go apart."""
        for _, group in groupby(batch, lambda entry: entry.pixels.shape):
            pixels = torch.stack([entry.pixels for entry in group]).to(self.model.device)  # (B, C, H, W)
            with torch.inference_mode():
                inputs = self.transform.floats(pixels).to(self.model.dtype)
                logits, novelties = self._run(inputs)
            shares = to_probabilities(logits / self.temperature, is_multi_label=self.is_multi_label)
            yield from zip(shares, novelties, strict=True)

    def _run(self, inputs: torch.Tensor) -> tuple[np.ndarray, Sequence[float | None]]:
        """Logits (B, K) and novelties, of inputs (B, C, H, W)."""
        if self.novelty is None:
            return self.model(pixel_values=inputs).logits.float().cpu().numpy(), [None] * len(inputs)
        from hfft.evaluators.features import head_input

        with head_input(self.model) as entered:
            logits = self.model(pixel_values=inputs).logits.float().cpu().numpy()
            features = entered(len(inputs)).cpu().numpy()  # (B, D)
        return logits, self.novelty.scores(features).tolist()

    def _prediction(self, file: str, probabilities: np.ndarray, novelty: float | None, *, top: int) -> Prediction:
        order = np.argsort(-probabilities, kind="stable")
        best = {self.classes[k]: float(probabilities[k]) for k in order[:top]}
        probability = float(probabilities[order[0]])
        if self.thresholds is not None:
            reached = order[(probabilities >= self.thresholds)[order]]
            labels = {self.classes[k]: float(probabilities[k]) for k in reached}
            return Prediction(file, ", ".join(labels), probability, best, novelty, labels)
        label = self.classes[order[0]] if probability >= self.threshold else UNSURE
        return Prediction(file, label, probability, best, novelty)


def _distinct(labels: Sequence[str]) -> tuple[str, ...]:
    """Repeated labels get their number: ImageNet has two classes `crane`, a bird and a machine."""
    counts = Counter(labels)
    return tuple(f"{label} ({k})" if counts[label] > 1 else label for k, label in enumerate(labels))
