"""Folders of finished runs with any classes, written by the run's own functions, without a network or a phase."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import toy
from datasets import Dataset
from PIL import Image

from hfft.commands.results import write_results
from hfft.data.audit.filtering import Checked, describe_images
from hfft.data.sources.reading import ImageData
from hfft.data.sources.rows import row_features
from hfft.metrics.intervals import with_intervals
from hfft.metrics.scores import Scores, class_scores
from hfft.recipe.loading import load_recipe
from hfft.runs.opening import describe_start, open_folder
from hfft.runs.record import Group, PhaseRecord, PhaseResult, Plan, result_name

PICTURE = toy.png(Image.new("RGB", (8, 8)))


def make_run(
    folder: Path,
    labels: Sequence[str] = ("ant", "bee"),
    *,
    counts: dict[str, int] | None = None,
    origin: dict[str, Any] | None = None,
    base: str = "somewhere/base",
    picture: bytes = PICTURE,
    more: dict[str, Any] | None = None,
    **recipe: Any,
) -> Path:
    """A finished run; three of four held-out images of a class are right, the others taken for the next class.

    Figures are drawn with `report=True`; `more` are further sections of metrics.json.
    """
    content = {
        "name": "run",
        "model": {"checkpoint": "somewhere/base"},
        "data": {"source": "somewhere/photos"},
        "phases": [{"name": "head", "learning_rate": 0.01}, {"name": "last", "unfreeze": {"blocks": 2}}],
        "report": False,  # drawing takes ten times as long as all the rest
        **recipe,
    }
    asked = load_recipe(content)
    counts = {"train": 8, "validation": 4, "test": 4} if counts is None else counts
    rows = {split: _rows(labels, count, picture) for split, count in counts.items()}
    images = ImageData(rows, tuple(labels), carved=("test",))
    checked = Checked(images, dict.fromkeys(rows, "f"))
    environment = describe_start(asked, precision="float32")
    environment |= {} if origin is None else {"origin": origin}
    open_folder(folder, asked, environment, describe_images(checked), overwrite=False)
    for number, phase in enumerate(asked.phases):
        _write_phase(folder / f"{number}-{phase.name}", phase.name, len(rows["train"]))
    result = folder / result_name(asked)
    result.mkdir()
    (result / "config.json").write_text(json.dumps({"model_type": "vit"}))
    if result.name == "adapter":
        (result / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    scores = {split: _scores(labels, rows[split]) for split in ("validation", "test") if split in rows}
    write_results(folder, asked, images, scores, {"data": 1.0, "0-head": 2.0}, more or {})
    return folder


def _rows(labels: Sequence[str], count: int, picture: bytes) -> Dataset:
    content = [
        {"image": {"bytes": picture, "path": None}, "label": label, "file": f"{label}/{number}"}
        for label in range(len(labels))
        for number in range(count)
    ]
    return Dataset.from_list(content, features=row_features(tuple(labels)))


def _scores(names: Sequence[str], rows: Dataset) -> Scores:
    labels = np.asarray(rows["label"])
    predicted = np.where(np.arange(len(labels)) % 4 == 3, (labels + 1) % len(names), labels)
    probabilities = np.full((len(labels), len(names)), 0.2 / len(names), np.float32)
    probabilities[np.arange(len(labels)), predicted] += 0.8
    return Scores(
        classes=tuple(names),
        files=tuple(rows["file"]),
        labels=labels,
        probabilities=probabilities,
        metrics=with_intervals(probabilities, labels),
        by_class=class_scores(predicted, labels, names),
    )


def _write_phase(folder: Path, name: str, images: int) -> None:
    folder.mkdir()
    plan = Plan(
        phase=name,
        trains="blocks 2-3 of 4, head",
        trainable=1234,
        total=56789,
        groups=(Group("block 2", ("a",), 2e-4, 0.01), Group("head", ("b",), 1e-3, 0.0)),
        images=images,
        batch=8,
        device_batch=8,
        steps=20,
        epochs=2.0,
        state_bytes=1,
    )
    result = PhaseResult("checkpoint-10", 10, 20, {"accuracy": 0.75}, 65.4, 321.0, {"tensors": 9, "changed": 0})
    history = [
        {"loss": 0.7, "epoch": 0.5, "step": 5},
        {"eval_loss": 0.6, "eval_accuracy": 0.75, "eval_macro_f1": 0.7, "epoch": 1.0, "step": 10},
        {"eval_loss": 0.65, "eval_accuracy": 0.7, "eval_macro_f1": 0.6, "epoch": 2.0, "step": 20},
    ]
    record = PhaseRecord(folder)
    record.write_plan(plan)
    record.write_result(result)
    record.write_history(history)
