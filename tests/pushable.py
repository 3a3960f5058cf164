"""Small finished runs to push, and what of a folder must not change."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import toy

import hfft

CLASSES = ("amber", "blue")
SPLITS = {"train": 12, "validation": 6, "test": 6}


def make_photos(folder: Path) -> Path:
    """Class folders of each split."""
    rng = np.random.default_rng(0)
    for split, count in SPLITS.items():
        for label, name in enumerate(CLASSES):
            place = folder / split / name
            place.mkdir(parents=True)
            for number in range(count // 2):
                toy.picture(label, rng).save(place / f"{number:03d}.png")
    return folder


def recipe(place: Path, *, checkpoint: str | None = None, **changes: Any) -> dict[str, Any]:
    """A head phase and one with LoRA, whose adapter is merged and kept, unless `merge=False`."""
    merge = changes.pop("merge", True)
    return {
        "name": "cells",
        "model": {"checkpoint": checkpoint or str(place / "vit")},
        "data": {"source": str(place / "photos")},
        "training": {"per_device_train_batch_size": 6, "dataloader_num_workers": 0, "num_train_epochs": 1},
        "precision": "float32",
        "keep": "last",
        "replay": {"mode": "off"},
        "phases": [
            {"name": "head", "unfreeze": "head", "learning_rate": 1e-2},
            {"name": "lora", "adapter": {"on": "attention", "merge": merge}, "learning_rate": 1e-2},
        ],
        "output_dir": str(place / "runs"),
        **changes,
    }


def make_run(place: Path, **changes: Any) -> Path:
    """Make photos, a checkpoint of ten classes, and a finished run of two; the run's folder."""
    if not (place / "photos").exists():
        make_photos(place / "photos")
        tiny.save(place / "vit", "vit", classes=10)
    return hfft.finetune(hfft.load_recipe(recipe(place, **changes))).folder


def contents(folder: Path) -> dict[str, str]:
    """Hash of each file, but for the note of what was pushed."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "hub.json"
    }


def shown(run: Path) -> set[str]:
    """What every push of the run holds beside model and adapter, as paths in the repository."""
    figures = {f"figures/{path.name}" for path in (run / "figures").iterdir()} - {"figures/first_batch.png"}
    assert len(figures) > 3
    return {"README.md", "hfft_files.json", "metrics.json", "recipe.yaml", *figures}
