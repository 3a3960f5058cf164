"""The run folder on disk: opened for one recipe and one set of images, and filled with results."""

import dataclasses
import difflib
import hashlib
import os
import shutil
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from accelerate import PartialState
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hfft.data.audit.filtering import Checked
from hfft.data.audit.findings import described
from hfft.data.images.decoding import decode, read_content
from hfft.data.sources.labels import labels_of, spoken_label, strata_of
from hfft.data.sources.reading import ImageData
from hfft.data.sources.targets import targets_of
from hfft.errors import RecipeError, RunError
from hfft.metrics.scores import Scores
from hfft.metrics.selective import describe_confidence, store_confidence
from hfft.model.given import other_model
from hfft.model.locating import files_fingerprint
from hfft.recipe.loading import dump_recipe, load_recipe
from hfft.recipe.sameness import what_trains
from hfft.recipe.spec import Recipe
from hfft.runs.facts import read_facts, result_name
from hfft.system.distributed import meet, on_main
from hfft.system.files import read_json, write_file, write_folder, write_json, write_text
from hfft.system.launch import spread_by
from hfft.system.machine import describe_environment
from hfft.system.paths import expanded, is_same_place

_EXAMPLES = "examples"  # folder beside the model's weights
_EXAMPLE_SIDE = 512  # pixels at most


def is_done(folder: Path, recipe: Recipe, *, overwrite: bool = False) -> bool:
    """Whether this very recipe has been run, and is not to be run again.

    Raises:
        RunError: If the folder can't be made, is no run folder, or holds a run of another recipe that is not to be
            overwritten.
    """
    parent = next(path for path in folder.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RunError(f"output_dir: no folder can be made in {parent}")
    if not folder.exists():
        return False
    if not (folder / "recipe.yaml").is_file() and not _is_empty(folder):
        raise RunError(f"{folder} exists and is no run folder; choose another name or output_dir, or remove it")
    if overwrite or _is_empty(folder):
        return False
    before, now = _trained_before(folder, recipe), dump_recipe(what_trains(recipe))
    if before != now:
        lines = difflib.unified_diff(before.splitlines(), now.splitlines(), "there", "asked", lineterm="", n=0)
        raise RunError(
            "\n".join(
                [
                    f"{folder} holds a run of another recipe; --overwrite replaces it, name=... makes a new one:",
                    *(f"  {line}" for line in lines if not line.startswith("@@")),
                ]
            )
        )
    return (folder / "metrics.json").is_file()


def _trained_before(folder: Path, now: Recipe) -> str:
    """What the run in a folder was made by, with the recipe's places of what is the same, or will be compared."""
    try:
        before = _read_recipe(folder / "recipe.yaml")
    except RecipeError:  # of another version of hfft
        return (folder / "recipe.yaml").read_text(encoding="utf-8")
    noted = _noted(folder)
    model, data = before.model, before.data
    if _is_same_checkpoint(model.checkpoint, now.model.checkpoint, noted):
        model = dataclasses.replace(model, checkpoint=now.model.checkpoint)
    is_local = _origin(now.data.source, None, given=False)["kind"] == "local"
    was_local = noted.get("origin", {}).get("data", {}).get("kind") == "local"
    if is_same_place(data.source, now.data.source) or (is_local and was_local):  # images are compared by content
        data = dataclasses.replace(data, source=now.data.source, image_folder=now.data.image_folder)
    return dump_recipe(what_trains(dataclasses.replace(before, model=model, data=data)))


def _noted(folder: Path) -> dict[str, Any]:
    """A run's environment.json; empty where it was killed before it wrote that."""
    path = folder / "environment.json"
    return read_json(path) if path.is_file() else {}


def _is_same_checkpoint(before: str, now: str, noted: Mapping[str, Any]) -> bool:
    """Whether two names are one place, or the second one's files are those that a run began with."""
    if is_same_place(before, now):
        return True
    known = noted.get("checkpoint_files")
    return known is not None and known == files_fingerprint(now)


def has_other_source(folder: Path, recipe: Recipe) -> bool:
    """Whether a recipe takes a run's images from another place than the run did.

    Args:
        folder: Of the run.
        recipe: The same one, but for that.
    """
    before = _read_recipe(folder / "recipe.yaml").data
    return not is_same_place(before.source, recipe.data.source) or before.image_folder != recipe.data.image_folder


def check_same_images(folder: Path, checked: Checked) -> None:
    """Refuse other images than a finished run's.

    Raises:
        RunError: If there is a difference.
    """
    noted = {name: split["fingerprint"] for name, split in read_json(folder / "data.json")["splits"].items()}
    if noted != dict(checked.fingerprints):
        raise RunError(f"{folder}: the images aren't those of this run; --overwrite runs it on them, name=... anew")


def _read_recipe(path: Path) -> Recipe:
    """A run's recipe; one without the license, where that is none of the Hub's."""
    try:
        return load_recipe(path)
    except RecipeError:
        return load_recipe(path, ["license=null"])


def card_changes(folder: Path, recipe: Recipe) -> list[str]:
    """Keys for the card alone that a finished run's recipe has otherwise.

    Args:
        folder: Of the run.
        recipe: The same one, but for such keys.
    """
    before = _read_recipe(folder / "recipe.yaml")
    return [key for key in ("license", "widget") if getattr(before, key) != getattr(recipe, key)]


def update_card(folder: Path, recipe: Recipe, checked: Checked | None) -> None:
    """Let a finished run's recipe and card say what another recipe for it says; the rest of the run stays.

    Args:
        folder: Of the run.
        recipe: From now on.
        checked: The run's images, if `widget` has changed.
    """
    from hfft.report.card import FIGURES, write_card

    measured = read_json(folder / "metrics.json")
    if checked is not None:
        count = recipe.widget or 0
        measured["examples"] = _write_examples(folder / result_name(recipe), checked.images, count)
        write_json(folder / "metrics.json", measured)
        if count == 0:
            shutil.rmtree(folder / result_name(recipe) / _EXAMPLES, ignore_errors=True)
    facts = dataclasses.replace(read_facts(folder), recipe=recipe)
    write_card(facts, sorted((folder / FIGURES).glob("*.png")))  # which show none of this
    write_text(folder / "recipe.yaml", dump_recipe(recipe))


def _is_empty(folder: Path) -> bool:
    """Whether nothing is there, but for what a run leaves that was killed while it wrote its first file."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {".recipe.yaml.partial"}


def describe_origin(recipe: Recipe, *, model_given: bool, data_given: bool) -> dict[str, Any]:
    """Where checkpoint and images come from; of what is on this disk, the last name alone.

    Later, and on other machines, nobody can tell a Hub id from a relative path.

    Args:
        recipe: Names both.
        model_given: Whether a model object replaced the checkpoint's network.
        data_given: Whether data in memory replaced the source.

    Returns:
        For `checkpoint` and `data`: `kind`, one of `hub`, `local` and `memory`; `name`; `revision` of a Hub id.
    """
    return {
        "checkpoint": _origin(recipe.model.checkpoint, recipe.model.revision, given=model_given),
        "data": _origin(recipe.data.source, recipe.data.revision, given=data_given),
    }


def _origin(name: str, revision: str | None, *, given: bool) -> dict[str, str | None]:
    path = Path(expanded(name))
    is_path = path.exists() or not _may_be_hub_id(name)
    kind = "memory" if given else "local" if is_path else "hub"
    shown = path.resolve().name if is_path else name
    return {"kind": kind, "name": shown, "revision": revision if kind == "hub" else None}


def _may_be_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def open_folder(
    folder: Path,
    recipe: Recipe,
    checked: Checked,
    *,
    origin: dict[str, Any],
    precision: str,
    model_given: dict[str, str] | None = None,
    overwrite: bool,
) -> None:
    """Make the run folder, or check that the one there was made from the same images and model, by as many processes.

    Args:
        folder: The run folder.
        recipe: What to do.
        checked: The images.
        origin: From `describe_origin`.
        precision: What the phases train in.
        model_given: Fingerprints of a model object that the run begins with, if any.
        overwrite: Whether the run that is there goes.

    Raises:
        RunError: If the run that is there is of other images, another model, precision or number of processes.
    """
    state = PartialState()
    content = {
        "labels": list(checked.images.labels),
        "task": checked.images.task,
        "splits": {name: describe_split(checked.images, name, print) for name, print in checked.fingerprints.items()},
        "skipped": [dataclasses.asdict(skip) for skip in checked.skipped],
        "findings": [described(finding) for finding in checked.findings],
    }
    environment = {
        **describe_environment(),
        "precision": precision,
        "model_given": model_given,
        "spread_by": spread_by(),
        "origin": origin,
        "may_differ": _may_differ(recipe, state),
        "checkpoint_files": on_main(lambda: files_fingerprint(recipe.model.checkpoint)),
    }
    # Another launch may have been here until a moment ago.
    on_main(lambda: is_done(folder, recipe, overwrite=overwrite))
    if overwrite:
        on_main(lambda: _make_room(folder))
    for name, now, same in (("data.json", content, _same_images), ("environment.json", environment, _same_start)):
        if (folder / name).is_file() and (problem := same(read_json(folder / name), now)):
            raise RunError(f"{folder}: {problem}; --overwrite starts the run anew")
    meet()  # all have looked
    on_main(lambda: _write_start(folder, recipe, environment, content))


def _write_start(folder: Path, recipe: Recipe, environment: dict[str, Any], content: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "recipe.yaml", dump_recipe(recipe))
    write_json(folder / "environment.json", environment)
    write_json(folder / "data.json", content)


def _make_room(folder: Path) -> None:
    """Make the folder anew; the run that was there goes at once, as what a kill would leave of it could seem whole."""
    place = Path(os.path.realpath(folder))
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # of a process that was killed here
    if place.exists():
        os.rename(place, old)
    place.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(old, ignore_errors=True)


def describe_split(images: ImageData, split: str, fingerprint: str) -> dict[str, Any]:
    """What data.json holds of a split."""
    targets = targets_of(images.splits[split], len(images.labels))
    return {
        "images": len(images.splits[split]),
        "counts": images.counts(split),
        "carved": split in images.carved,
        "fingerprint": fingerprint,
        **({} if targets is None else {"targets": hashlib.blake2b(targets.tobytes(), digest_size=16).hexdigest()}),
    }


def _may_differ(recipe: Recipe, state: PartialState) -> list[str]:
    """What can make another run with the same seed, on the same kind of machine, differ in the last bits."""
    found = []
    full = all(phase.arguments.get("full_determinism") for phase in recipe.phases)
    if str(state.device) != "cpu" and not full:
        found.append(
            "kernels of the GPU that are chosen by their speed or add in no fixed order (convolutions, matrix "
            "products, attention, the gradient of interpolation); training.full_determinism makes torch use others, "
            "or refuse"
        )
    if recipe.replay.mode != "off" and recipe.replay.engine == "auto":
        found.append(
            "the engine that was fastest when the recordings were made, which replay.json of the phase names; "
            "replay.engine=torch is the same everywhere"
        )
    if recipe.precision == "auto":
        found.append("the precision that was faster here; precision=float32 is the same everywhere")
    return found


def _same_images(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    # Other versions may find other things; the images are the same all the same.
    keys = ("labels", "splits")
    return None if all(before[key] == now[key] for key in keys) else "the images have changed since this run began"


def _same_start(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    if before.get("checkpoint_files", now["checkpoint_files"]) != now["checkpoint_files"]:
        return "the files of the checkpoint have changed since this run began"
    if before["processes"] != now["processes"]:
        return f"this run began on {before['processes']} processes and can't go on with {now['processes']}"
    problem = other_model(before.get("model_given"), now["model_given"])
    if problem is not None:
        return problem
    if before["precision"] != now["precision"]:
        return f"this run began in {before['precision']} and can't go on in {now['precision']}"
    return None


def write_results(
    folder: Path,
    recipe: Recipe,
    images: ImageData,
    scores: dict[str, Scores],
    seconds: dict[str, float],
    more: Mapping[str, Any],
) -> None:
    """Write predictions, card, the figures that are wanted and, as the mark of a finished run, metrics.json.

    Args:
        folder: The run folder.
        recipe: The run's.
        images: For the examples beside the model.
        scores: By split.
        seconds: By stage.
        more: Further sections of metrics.json.
    """
    from hfft.report.card import write_report

    if scores:
        table = pd.concat([found.table(split) for split, found in scores.items()], ignore_index=True)
        write_file(folder / "predictions.parquet", lambda aside: table.to_parquet(aside, index=False))
    confidence = describe_confidence(scores)
    if confidence is not None:
        store_confidence(folder / result_name(recipe), confidence)
        more = {**more, "confidence": confidence}
    rounded = {stage: round(value, 3) for stage, value in {**seconds, "total": sum(seconds.values())}.items()}
    content = {
        **{split: found.metrics for split, found in scores.items()},
        "by_class": {split: found.by_class for split, found in scores.items()},
        "confusion": {split: found.confusion for split, found in scores.items()},
        "details": {split: found.details for split, found in scores.items()},
        "calibration": {split: found.calibration for split, found in scores.items()},
        "examples": _write_examples(folder / result_name(recipe), images, recipe.widget or 0),
        **more,
        "seconds": rounded,
    }
    write_report(folder, metrics=content, draws=recipe.report)
    write_json(folder / "metrics.json", content)


def _write_examples(folder: Path, images: ImageData, count: int) -> list[dict[str, str]]:
    """Put some held-out images beside the model, of each class in turn; small, and without what cameras note."""
    rows = images.splits.get("test", images.splits.get("validation"))
    if rows is None or count == 0:
        return []
    labels = strata_of(labels_of(rows))
    by_class = [np.flatnonzero(labels == number).tolist() for number in np.unique(labels)]
    turns = [row for turn in zip_longest(*by_class) for row in turn if row is not None]
    chosen = [rows[row] for row in turns[:count]]

    def write(aside: Path) -> None:
        for number, row in enumerate(chosen):
            image = decode(read_content(row["image"]))
            image.thumbnail((_EXAMPLE_SIDE, _EXAMPLE_SIDE))
            image.info = {}  # comments of the file
            image.save(aside / f"{number}.jpg", quality=90)

    write_folder(folder / _EXAMPLES, write)
    return [
        {"file": f"{_EXAMPLES}/{number}.jpg", "label": spoken_label(row["label"], images.labels)}
        for number, row in enumerate(chosen)
    ]
