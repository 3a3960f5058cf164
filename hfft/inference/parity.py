"""model.onnx beside torch on the same pixels: the same logits, the same class, whatever the number of images."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch

from hfft.errors import ModelError, first_line

TOLERANCE = 1e-4  # of logits up to 1; of larger ones, of the largest of the image
TOP, LABELS = "class on top", "labels"
_SIZES = (1, 2, 5, 16)  # images in a batch, in turn


class ParityError(ModelError):
    """An exported model that computes something else than the one that it was exported from."""

    exit_code = 1


@dataclass(frozen=True)
class Parity:
    """How far two programs agree.

    Attributes:
        images: How many were compared.
        what: What they were.
        largest_difference: Of two logits.
        tolerance: What was allowed, times the largest logit of an image where that is larger than 1.
        same_top1: Images with the same class on top; of a model for any number of labels, with the same labels. Where
            another one is, both have the same logit within the tolerance: a tie.
        batch_sizes: The numbers of images at once.
        answer: What `same_top1` counts, in words.
    """

    images: int
    what: str
    largest_difference: float
    tolerance: float
    same_top1: int
    batch_sizes: tuple[int, ...]
    answer: str = TOP

    @property
    def in_words(self) -> str:
        """Three lines for the screen."""
        sizes = ", ".join(map(str, self.batch_sizes))
        lines = (
            f"compared with torch on {self.images:,} {self.what}, in batches of {sizes}:",
            f"  logits differ by at most {self.largest_difference:.2g} ({self.tolerance:g} is allowed)",
            f"  the same {self.answer} for {self.same_top1:,} of {self.images:,}",
        )
        return "\n".join(lines)


def compare(
    run: Callable[[np.ndarray], np.ndarray],
    reference: Callable[[torch.Tensor], torch.Tensor],
    images: Iterable[tuple[str, torch.Tensor]],
    what: str,
    limits: np.ndarray | None = None,
) -> Parity:
    """Run both on the same batches of 1, 2, 5 and 16 images, in turn.

    Args:
        run: The exported model, (B, C, H, W) float32 -> (B, K).
        reference: The same in torch.
        images: Their names and pixels, (C, H, W) float32; at least one.
        what: What they are, for the result.
        limits: Of a model for any number of labels, the logit from which each is given, (K,).

    Raises:
        ParityError: If `run` can't take a batch, or a logit differs by more than the tolerance or is no number.
    """
    count = same = 0
    largest, sizes = 0.0, set()
    for batch in _batches(images):
        pixels = torch.stack([one for _, one in batch])  # (B, C, H, W)
        with torch.inference_mode():
            expected = reference(pixels).numpy()  # (B, K)
        found = _run(run, pixels.numpy(), expected.shape)
        differences = np.abs(found - expected).max(axis=1)  # (B,)
        allowed = TOLERANCE * np.maximum(1, np.abs(expected).max(axis=1))
        for (name, _), difference, limit in zip(batch, differences, allowed, strict=True):
            if not difference <= limit:  # NaN too
                raise ParityError(
                    f"model.onnx doesn't compute what torch computes: {name}, in a batch of {len(batch)}, has logits "
                    f"that differ by up to {difference:.3g}; allowed: {limit:.3g}. Nothing was written"
                )
        largest = max(largest, float(differences.max()))
        same += _same_answers(found, expected, limits)
        count += len(batch)
        sizes.add(len(batch))
    return Parity(count, what, largest, TOLERANCE, same, tuple(sorted(sizes)), TOP if limits is None else LABELS)


def _same_answers(found: np.ndarray, expected: np.ndarray, limits: np.ndarray | None) -> int:
    if limits is None:
        return int((found.argmax(axis=1) == expected.argmax(axis=1)).sum())
    return int(((found >= limits) == (expected >= limits)).all(axis=1).sum())


def _batches(images: Iterable[tuple[str, torch.Tensor]]) -> Iterator[list[tuple[str, torch.Tensor]]]:
    remaining, sizes = iter(images), cycle(_SIZES)
    while batch := list(islice(remaining, next(sizes))):
        yield batch


def _run(run: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    try:
        found = run(pixels)
    except Exception as error:  # onnxruntime has no base class of its own
        raise ParityError(
            f"model.onnx can't run a batch of {len(pixels)} images: {first_line(error)}; nothing written"
        ) from error
    if found.shape != shape:
        raise ParityError(f"model.onnx answers {len(pixels)} images with {found.shape} numbers, torch with {shape}")
    return found
