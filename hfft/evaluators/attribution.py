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

from hfft.data.images.decoding import decode_row
from hfft.data.images.transforms import evaluation_transform, pixel_scale
from hfft.data.sources.reading import ImageData
from hfft.errors import DataError, HfftError, ModelError, first_line
from hfft.evaluators.grad_cam import attribute
from hfft.evaluators.pictures import Shown, as_image, pictures_of, rows_in, rows_of, small
from hfft.evaluators.protocol import Evaluator, Job, Result
from hfft.runs.facts import HELD_OUT, RunFacts
from hfft.runs.record import MISTAKES, PREDICTIONS
from hfft.system.distributed import on_main
from hfft.system.files import read_json, write_folder, write_json

_LISTED = 24
_HEAT = 0.6  # of the colour, where most speaks for the answer

_LOG = logging.getLogger(__name__)  # the main process alone gets here


@dataclass(frozen=True)
class Mistakes:
    """The worst mistakes on a split: wrong answers, those with the highest probability first.

    Attributes:
        split: Its name.
        images: How many it has.
        wrong: How many of them were taken for another class.
        shown: The worst of these.
        block: Which block's output the overlays show; empty where there are none.
        no_overlay: Why there are none; empty where there are.
    """

    split: str
    images: int
    wrong: int
    shown: tuple[Shown, ...]
    block: str = ""
    no_overlay: str = ""


@dataclass(frozen=True)
class _Overlays:
    """By place in the list of mistakes, what the network sees; or why there is nothing."""

    pictures: dict[int, Image.Image]
    block: str
    reason: str


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

    Args:
        facts: Of a finished run.
        images: The run's; looked for where its recipe says when None.
        open_model: Folder of the result -> its network, on the device, and its image processor; is called where
            pictures are missing.

    Returns:
        None where nothing was measured, or not as one class for each image.
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


def _named(mistakes: Mistakes) -> list[tuple[Any, ...]]:
    return [(mistakes.split, one.file, one.prediction, one.probability) for one in mistakes.shown]


def _illustrate(
    folder: Path,
    chosen: Mistakes,
    labels: Sequence[str],
    find_rows: Callable[[], Sequence[dict[str, Any] | None]],
    open_model: Callable[[], tuple[Any, Any]],
) -> Mistakes:
    """Write pictures and mistakes.json, unless they are there; the mistakes with the names of their pictures."""
    before = read_mistakes(folder)
    if before is not None and _named(before) == _named(chosen) and not any(one.missing for one in before.shown):
        return before
    files: dict[str, Image.Image] = {}
    try:
        rows = find_rows() if chosen.shown else []
    except DataError as error:
        _LOG.warning(f"{folder}: no pictures of mistakes: {error.__cause__ or error}")
        found = _without_pictures(chosen, str(error))
    else:
        pictures, missing = pictures_of(rows)
        there = {place: row for place, row in enumerate(rows) if row and place in pictures}
        overlays = _overlays([labels.index(chosen.shown[place].prediction) for place in there], there, open_model)
        shown = []
        for place, one in enumerate(chosen.shown):
            if place in missing:
                shown.append(dataclasses.replace(one, missing=missing[place]))
                continue
            overlay = f"{place}_seen.jpg" if place in overlays.pictures else None
            files[f"{place}.jpg"] = pictures[place]
            files |= {} if overlay is None else {overlay: overlays.pictures[place]}
            shown.append(dataclasses.replace(one, picture=f"{place}.jpg", overlay=overlay))
        found = dataclasses.replace(chosen, shown=tuple(shown), block=overlays.block, no_overlay=overlays.reason)

    def write(aside: Path) -> None:
        for name, picture in files.items():
            picture.save(aside / name, quality=82)
        write_json(aside / "mistakes.json", dataclasses.asdict(found))

    write_folder(folder / MISTAKES, write)
    return found


def _without_pictures(chosen: Mistakes, reason: str) -> Mistakes:
    shown = tuple(dataclasses.replace(one, missing=reason) for one in chosen.shown)
    return dataclasses.replace(chosen, shown=shown, no_overlay=reason)


def _overlays(
    targets: Sequence[int], rows: Mapping[int, dict[str, Any]], open_model: Callable[[], tuple[Any, Any]]
) -> _Overlays:
    """Where the network looked for each target class, in rows by place in the list of mistakes."""
    if not rows:
        return _Overlays({}, "", "there are no pictures")
    try:
        model, processor = open_model()
        transform = evaluation_transform(processor)
        pixels = [transform.pixels(decode_row(row)) for row in rows.values()]  # each (C, H, W)
        if len({one.shape for one in pixels}) > 1:
            raise ModelError("the model takes images of several sizes")
        inputs = transform.floats(torch.stack(pixels).to(model.device))
        found = attribute(model, inputs, torch.tensor(targets, device=inputs.device))
        seen = _as_pictures(pixels, processor)
    except (HfftError, RuntimeError) as error:  # such as an accelerator without room for the gradients
        return _Overlays({}, "", first_line(error))
    pictures = {
        place: small(_with_heat(picture, heat.numpy()))
        for place, picture, heat in zip(rows, seen, found.maps, strict=True)
    }
    return _Overlays(pictures, found.block, "")


def _as_pictures(pixels: Sequence[torch.Tensor], processor: Any) -> list[Image.Image]:
    """What the network gets to see, of pixels (C, H, W) before they are scaled, or after."""
    if pixels[0].dtype == torch.uint8:
        levels = list(pixels)
    else:
        scale = pixel_scale(processor)
        shown = [((one - scale.black) / (scale.white - scale.black) * 255).round().clamp(0, 255) for one in pixels]
        order = [scale.channels.index(color) for color in range(3)]
        levels = [one.to(torch.uint8)[order] for one in shown]
    return [as_image(one) for one in levels]


def _with_heat(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """The picture in grays, and over it colours where most spoke for the answer; heat is (h, w)."""
    from matplotlib import colormaps  # which takes long to import

    wide = Image.fromarray((heat * 255).astype(np.uint8)).resize(picture.size, Image.Resampling.BICUBIC)
    strength = np.asarray(wide, dtype=np.float32)[..., None] / 255  # (H, W, 1)
    colors = colormaps["inferno"](strength[..., 0])[..., :3] * 255  # (H, W, 3)
    grays = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32)
    share = _HEAT * strength
    return Image.fromarray((grays * (1 - share) + colors * share).round().astype(np.uint8))
