"""The run folder on disk: opened for one recipe and one set of images, and filled with results."""

import dataclasses
import difflib
import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import PartialState

from hfft.data.audit import Audit
from hfft.data.sources import ImageData
from hfft.errors import RecipeError, RunError
from hfft.evaluation.scoring import Scores
from hfft.files import read_json, write_file, write_json, write_text
from hfft.machine import describe_environment
from hfft.recipe.loading import dump_recipe, load_recipe
from hfft.recipe.spec import HubSpec, Recipe
from hfft.report.card import write_card


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
    before, now = _without_hub(folder / "recipe.yaml"), dump_recipe(dataclasses.replace(recipe, hub=HubSpec()))
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


def _without_hub(path: Path) -> str:
    """A run's recipe but for where its result is pushed to, which makes it no other run."""
    try:
        return dump_recipe(dataclasses.replace(load_recipe(path), hub=HubSpec()))
    except RecipeError:  # of another version of hfft
        return path.read_text(encoding="utf-8")


def _is_empty(folder: Path) -> bool:
    """Whether nothing is there, but for what a run leaves that was killed while it wrote its first file."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {".recipe.yaml.partial"}


def open_folder(
    folder: Path, recipe: Recipe, images: ImageData, audits: dict[str, Audit], *, precision: str, overwrite: bool
) -> None:
    """Make the run folder, or check that the one there was made from the same images, by as many processes."""
    state = PartialState()
    content = {
        "labels": list(images.labels),
        "splits": {split: describe_split(images, split, audits[split]) for split in images.splits},
    }
    environment = {**describe_environment(), "precision": precision, "may_differ": _may_differ(recipe, state)}
    state.wait_for_everyone()
    if state.is_main_process and overwrite and folder.exists():
        shutil.rmtree(folder)
    state.wait_for_everyone()
    for name, now, same in (("data.json", content, _same_images), ("environment.json", environment, _same_machine)):
        if (folder / name).is_file() and (problem := same(read_json(folder / name), now)):
            raise RunError(f"{folder}: {problem}; --overwrite starts the run anew")
    state.wait_for_everyone()
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "recipe.yaml", dump_recipe(recipe))
        write_json(folder / "environment.json", environment)
        write_json(folder / "data.json", content)


def describe_split(images: ImageData, split: str, audit: Audit) -> dict[str, Any]:
    """What data.json holds of a split."""
    return {"counts": images.counts(split), "fingerprint": audit.fingerprint}


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
    return None if before == now else "the images have changed since this run began"


def _same_machine(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    if before["processes"] != now["processes"]:
        return f"this run began on {before['processes']} processes and can't go on with {now['processes']}"
    if before["precision"] != now["precision"]:
        return f"this run began in {before['precision']} and can't go on in {now['precision']}"
    return None


def result_name(recipe: Recipe) -> str:
    """Name of the folder that a run ends with: `model`, or `adapter` where it stays apart."""
    last = recipe.phases[-1].adapter
    return "model" if last is None or last.merge else "adapter"


def write_results(folder: Path, recipe: Recipe, scores: dict[str, Scores], seconds: dict[str, float]) -> None:
    """Write card, predictions and, as the mark of a finished run, metrics.json."""
    metrics: dict[str, Any] = {split: found.metrics for split, found in scores.items()}
    by_class = {split: found.by_class for split, found in scores.items()}
    write_card(folder / result_name(recipe), recipe, metrics=metrics, data=read_json(folder / "data.json"))
    if scores:
        table = pd.concat([found.table(split) for split, found in scores.items()], ignore_index=True)
        write_file(folder / "predictions.parquet", lambda aside: table.to_parquet(aside, index=False))
    rounded = {stage: round(value, 3) for stage, value in seconds.items()}
    write_json(folder / "metrics.json", {**metrics, "by_class": by_class, "seconds": rounded})
