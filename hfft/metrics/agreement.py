"""Whether the model of the folder that a run wrote answers as the network that the run trained and measured."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from hfft.data.images.batches import Examples
from hfft.data.images.transforms import Transform
from hfft.errors import TrainingError
from hfft.metrics.scores import Scores
from hfft.model.restoring import left_as_it_was

_IMAGES = 4
_LOGITS = 1e-3  # relative to the largest where that is above 1
_LOGITS_ELSEWHERE = 5e-3  # kernels of an accelerator may round to TF32
# By a type that a phase was measured in: how far its validation numbers may be from the folder's, in float32. Of log
# loss absolute, or relative where it is above 1; of accuracy absolute, and one image more.
_TOLERANCES = {"float32": 0.005, "float16": 0.02, "bfloat16": 0.05}
_COMPARED = ("log_loss", "accuracy", "mean_average_precision")


def check_logits(
    trained: tuple[Any, Transform], reopened: tuple[Any, Transform], rows: Dataset, where: str
) -> float | None:
    """Compare the network in memory with the reopened one on a few images, each through its own transform.

    Args:
        trained: The network and its evaluation transform; the network's modes are left as they were.
        reopened: The same of the folder.
        rows: Images.
        where: The folder, for the message.

    Returns:
        The largest difference of two logits.

    Raises:
        TrainingError: If they differ by more than rounding.
    """
    places = np.linspace(0, len(rows) - 1, min(_IMAGES, len(rows))).astype(int).tolist()
    expected, found = (_logits(*one, rows.select(places)) for one in (trained, reopened))  # (N, K)
    limit = _LOGITS if trained[0].device.type == "cpu" else _LOGITS_ELSEWHERE
    limit *= max(1.0, float(expected.abs().max()))
    difference = float((expected - found).abs().max()) if expected.shape == found.shape else float("inf")
    if not difference <= limit:  # NaN too
        raise TrainingError(
            f"{where}: reopened, the model isn't the one that was trained: the logits of {len(places)} training "
            f"images are up to {difference:.3g} apart ({limit:.2g} is allowed); its scores were not reported"
        )
    return difference


def check_validation(
    measured: Mapping[str, float], scores: Scores, *, types: Collection[str], phase: str, where: str
) -> None:
    """Compare a phase's own validation numbers with those of the folder that was written.

    Args:
        measured: Metrics in the phase's result.json; those that are chosen anew for the folder are left out.
        scores: Of the reopened folder on the validation images.
        types: What the phase was computed in, and its activations were kept in; `auto` doesn't count.
        phase: Its name, for the message.
        where: The folder, for the message.

    Raises:
        TrainingError: If a number is further away than the tolerance; both numbers are in the message.
    """
    gaps = []
    allowed = max(_TOLERANCES[one] for one in _TOLERANCES.keys() & types)
    for name in _COMPARED:
        if name not in measured or name not in scores.metrics:
            continue
        before: float = measured[name]
        after: Any = scores.metrics[name]["value"]
        limit = allowed * max(1.0, abs(before)) if name == "log_loss" else allowed + 1 / len(scores.labels)
        if not abs(before - after) <= limit:
            gaps.append(f"{name.replace('_', ' ')} {before:.4f}, and {after:.4f} reopened ({limit:.2g} is allowed)")
    if gaps:
        raise TrainingError(
            f"{where}: reopened, the model answers otherwise than {phase} did while it trained. On validation: "
            f"{'; '.join(gaps)}. Nothing was reported; replay.mode=off in a new run tells whether recorded "
            "activations are the cause"
        )


def _logits(network: Any, transform: Transform, rows: Dataset) -> torch.Tensor:
    """(N, K) float32 on the CPU, in evaluation mode."""
    examples = Examples(rows, transform.pixels)
    pixels = torch.stack([examples[place]["pixel_values"] for place in range(len(rows))])  # (N, C, H, W)
    with left_as_it_was(network), torch.no_grad():
        return network.eval()(pixel_values=transform.floats(pixels.to(network.device))).logits.float().cpu()
