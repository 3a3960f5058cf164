"""The worst mistakes of a run: their pictures, and where the network looked, kept in the run's folder `mistakes/`."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from hfft.data.images.augmentation import as_pillow
from hfft.data.images.decoding import decode_row
from hfft.data.images.transforms import evaluation_transform, pixel_scale
from hfft.data.sources.reading import ImageData
from hfft.errors import HfftError, ModelError, first_line
from hfft.evaluators.grad_cam import attribute
from hfft.evaluators.pictures import Shown, find_pictures, rows_in, rows_of, small, write_pictures
from hfft.evaluators.protocol import Evaluator, Job, Result
from hfft.runs.facts import HELD_OUT, RunFacts
from hfft.runs.record import MISTAKES, PREDICTIONS
from hfft.system.distributed import on_main
from hfft.system.files import read_json

_LISTED = 24
_HEAT = 0.6  # of the colour, where most speaks for the answer

_LOG = logging.getLogger(__name__)  # the main process alone gets here


@dataclass(frozen=True)
class Mistakes:
    """The worst mistakes on a split: wrong answers, those with the highest probability first."""

    split: str
    images: int  # of the split
    wrong: int  # of them
    shown: tuple[Shown, ...]
    block: str = ""  # whose output the overlays show; empty where there are none
    no_overlay: str = ""  # why there are none


class Attribution(Evaluator):
    """Keeps the pictures of the worst mistakes, and of what the network looked at, for the page of the run."""

    name = "attribution"

    def after_run(self, job: Job, result: Result) -> Mapping[str, Any] | None:
        """Write the folder `mistakes/`; metrics.json gets nothing."""
        on_main(lambda: _try_mistakes(job, result))
        return None


def _try_mistakes(job: Job, result: Result) -> None:
    """A run has succeeded whatever becomes of these pictures."""
    split = next((split for split in HELD_OUT if split in result.scores), None)
    if split is None or not result.scores[split].confusion:
        return
    table = result.scores[split].table(split)
    try:
        chosen = _worst_mistakes(split, lambda columns: table.loc[:, columns])
        find_rows = partial(rows_in, job.images, split, chosen.shown)
        _illustrate(job.folder, chosen, job.images.labels, find_rows, lambda: (result.model, result.processor))
    except Exception as error:  # hours of training are not lost for a picture
        _LOG.warning(f"{job.folder}: no pictures of mistakes: {type(error).__name__}: {first_line(error)}")


def keep_mistakes(
    facts: RunFacts, images: ImageData | None = None, *, open_model: Callable[[Path], tuple[Any, Any]]
) -> Mistakes | None:
    """Choose the worst mistakes of a finished run and write their pictures, unless all of them are there already.

    Images as for `rows_of`. `open_model` makes of the result's folder its network, on the device, and its image
    processor; it is called where pictures are missing. None where nothing was measured, or not as one class for each
    image.
    """
    chosen = choose_mistakes(facts)
    if chosen is None:
        return None
    find_rows = partial(rows_of, facts, chosen.split, chosen.shown, images)
    return _illustrate(facts.folder, chosen, facts.labels, find_rows, partial(open_model, facts.result))


def choose_mistakes(facts: RunFacts) -> Mistakes | None:
    """The worst mistakes by predictions.parquet, without pictures; None as for `keep_mistakes`."""
    path, split = facts.folder / PREDICTIONS, facts.judged
    if split is None or not split.confusion or not path.is_file():
        return None
    return _worst_mistakes(split.name, lambda columns: pd.read_parquet(path, columns=columns))


def _worst_mistakes(split: str, read: Callable[[list[str]], pd.DataFrame]) -> Mistakes:
    """The worst mistakes on a split; `read` gives columns of a table as predictions.parquet."""
    answers = read(["split", "file", "label", "prediction", "probability"])
    answers = answers.loc[answers["split"] == split]
    wrong = answers.loc[answers["label"] != answers["prediction"]]
    worst = wrong.sort_values("probability", ascending=False, kind="stable").head(_LISTED)
    names = [f"probability {label}" for label in worst["label"].unique()]
    known = read(names).loc[worst.index] if names else worst
    shown = tuple(
        Shown(
            row.file, row.label, row.prediction, float(known.loc[place, f"probability {row.label}"]), row.probability
        )
        for place, row in zip(worst.index, worst.itertuples(), strict=True)
    )
    return Mistakes(split, len(answers), len(wrong), shown)


def read_mistakes(folder: Path) -> Mistakes | None:
    """What a run folder keeps; None where it keeps nothing that can be read."""
    try:
        content = read_json(folder / MISTAKES / "mistakes.json")
        return Mistakes(**{**content, "shown": tuple(Shown(**one) for one in content["shown"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _answers(mistakes: Mistakes) -> list[tuple[Any, ...]]:
    return [(mistakes.split, one.file, one.prediction, one.probability) for one in mistakes.shown]


def _illustrate(
    run: Path,
    chosen: Mistakes,
    labels: Sequence[str],
    find_rows: Callable[[], Sequence[dict[str, Any] | None]],
    open_model: Callable[[], tuple[Any, Any]],
) -> Mistakes:
    """Write pictures and mistakes.json, unless they are there; the mistakes with the names of their pictures."""
    before = read_mistakes(run)
    if before is not None and _answers(before) == _answers(chosen) and not any(one.missing for one in before.shown):
        return before
    found = find_pictures(run / MISTAKES, chosen.shown, find_rows)
    shown, block, reason = list(found.shown), "", next((one.missing for one in found.shown), "there are no pictures")
    if found.rows:
        try:
            targets = [labels.index(shown[place].prediction) for place in found.rows]
            overlays, block = _overlays(targets, list(found.rows.values()), *open_model())
            reason = ""
            for place, overlay in zip(found.rows, overlays, strict=True):
                name = f"{place}_seen.jpg"
                found.files[name], shown[place] = overlay, dataclasses.replace(shown[place], overlay=name)
        except (HfftError, RuntimeError) as error:  # such as an accelerator without room for the gradients
            reason = first_line(error)
    mistakes = dataclasses.replace(chosen, shown=tuple(shown), block=block, no_overlay=reason)
    write_pictures(run / MISTAKES, found.files, "mistakes.json", dataclasses.asdict(mistakes))
    return mistakes


def _overlays(
    targets: Sequence[int], rows: Sequence[dict[str, Any]], model: Any, processor: Any
) -> tuple[list[Image.Image], str]:
    """Where the network looked for the target class of each row, and in which block."""
    transform = evaluation_transform(processor)
    pixels = [transform.pixels(decode_row(row)) for row in rows]  # each (C, H, W)
    if len({one.shape for one in pixels}) > 1:
        raise ModelError("the model takes images of several sizes")
    inputs = transform.floats(torch.stack(pixels).to(model.device))
    found = attribute(model, inputs, torch.tensor(targets, device=inputs.device))
    seen = _as_pictures(pixels, processor)
    return [small(_with_heat(*pair)) for pair in zip(seen, found.maps.numpy(), strict=True)], found.block


def _as_pictures(pixels: Sequence[torch.Tensor], processor: Any) -> list[Image.Image]:
    """What the network gets to see, of pixels (C, H, W) before they are scaled, or after."""
    if pixels[0].dtype == torch.uint8:
        return [as_pillow(one) for one in pixels]
    scale = pixel_scale(processor)
    order = [scale.channels.index(color) for color in range(3)]
    levels = [((one - scale.black) / (scale.white - scale.black) * 255).round().clamp(0, 255) for one in pixels]
    return [as_pillow(one.to(torch.uint8)[order]) for one in levels]


def _with_heat(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """The picture in grays, and over it colours where most spoke for the answer; heat is (h, w)."""
    from matplotlib import colormaps  # which takes long to import

    wide = Image.fromarray((heat * 255).astype(np.uint8)).resize(picture.size, Image.Resampling.BICUBIC)
    strength = np.asarray(wide, dtype=np.float32)[..., None] / 255  # (H, W, 1)
    colors = colormaps["inferno"](strength[..., 0])[..., :3] * 255  # (H, W, 3)
    grays = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32)
    share = _HEAT * strength
    return Image.fromarray((grays * (1 - share) + colors * share).round().astype(np.uint8))
