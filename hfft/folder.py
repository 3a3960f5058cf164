"""The run folder on disk: opened for one recipe and one set of images, and filled with results."""

import difflib
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import PartialState

from hfft.data.audit import Audit
from hfft.data.sources import ImageData
from hfft.errors import RunError
from hfft.evaluation.scoring import Scores
from hfft.files import read_json, write_file, write_json, write_text
from hfft.recipe.loading import dump_recipe
from hfft.recipe.spec import Recipe
from hfft.report.card import write_card
from hfft.training.callbacks import cpus_per_process


def is_done(folder: Path, recipe: Recipe) -> bool:
    """Whether this very recipe has been run; refuses a folder of another one."""
    parent = next(path for path in folder.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RunError(f"output_dir: no folder can be made in {parent}")
    if not folder.exists():
        return False
    if not (folder / "recipe.yaml").is_file():
        raise RunError(f"{folder} exists and is no run folder; choose another name or output_dir, or remove it")
    before, now = (folder / "recipe.yaml").read_text(encoding="utf-8"), dump_recipe(recipe)
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


def open_folder(folder: Path, recipe: Recipe, images: ImageData, audits: dict[str, Audit], *, overwrite: bool) -> None:
    """Make the run folder, or check that the one there was made from the same images."""
    state = PartialState()
    content = {
        "labels": list(images.labels),
        "splits": {
            split: {"counts": images.counts(split), "fingerprint": audits[split].fingerprint}
            for split in images.splits
        },
    }
    state.wait_for_everyone()
    if state.is_main_process:
        if overwrite and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "recipe.yaml", dump_recipe(recipe))
        write_json(folder / "environment.json", _environment())
    state.wait_for_everyone()
    if (folder / "data.json").is_file() and read_json(folder / "data.json") != content:
        raise RunError(f"{folder}: the images have changed since this run began; --overwrite starts it anew")
    state.wait_for_everyone()
    if state.is_main_process:
        write_json(folder / "data.json", content)


def _environment() -> dict[str, Any]:
    packages = (
        "torch",
        "torchvision",
        "transformers",
        "datasets",
        "accelerate",
        "evaluate",
        "peft",
        "numpy",
        "pillow",
    )
    state = PartialState()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "hfft": version("hfft"),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "machine": platform.machine(),
        "system": platform.platform(),
        "cores": cpus_per_process(),
        "device": str(state.device),
        "processes": state.num_processes,
        "command": sys.argv,
        "git_commit": commit.stdout.strip() or None,
    }


def write_results(folder: Path, recipe: Recipe, scores: dict[str, Scores], seconds: dict[str, float]) -> None:
    """Write card, predictions and, as the mark of a finished run, metrics.json."""
    metrics: dict[str, Any] = {split: found.metrics for split, found in scores.items()}
    by_class = {split: found.by_class for split, found in scores.items()}
    write_card(folder / "model", recipe, metrics=metrics, data=read_json(folder / "data.json"))
    if scores:
        table = pd.concat([found.table(split) for split, found in scores.items()], ignore_index=True)
        write_file(folder / "predictions.parquet", lambda aside: table.to_parquet(aside, index=False))
    rounded = {stage: round(value, 3) for stage, value in seconds.items()}
    write_json(folder / "metrics.json", {**metrics, "by_class": by_class, "seconds": rounded})
