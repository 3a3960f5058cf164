"""The run folder: the names of its files, and all that reads and writes those that every run has."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfft.errors import RunError
from hfft.recipe.loading import RECIPE, dump_recipe, read_recipe
from hfft.recipe.spec import Recipe
from hfft.runs.phase_record import PhaseRecord
from hfft.system.files import read_json, write_file, write_json, write_text
from hfft.system.paths import expanded

if TYPE_CHECKING:
    import pandas as pd

ENVIRONMENT, DATA = "environment.json", "data.json"  # and recipe.yaml
METRICS, PREDICTIONS = "metrics.json", "predictions.parquet"
MODEL, ADAPTER = "model", "adapter"  # folders of the result
GIVEN = "given"  # folder of a model object that the run began with, where an adapter sits on it
PAGE, FIGURES = "report.html", "figures"
LABEL_ISSUES = "label_issues.json"
HINT_PICTURES, MISTAKES = "label_hints", "mistakes"  # folders of pictures for the page
PUSHES = "hub.json"  # what was pushed where
REPORTING, BOARD = "reporting.json", "tensorboard"  # what was sent to integrations; a folder
CARD, EXAMPLES = "README.md", "examples"  # in the result's folder; the second is a folder
ADAPTER_CONFIG = "adapter_config.json"  # as PEFT calls it
EXPORT = "onnx"  # folder of an export
SUMMARY = "summary.json"  # of a cross-validation, beside the run folders of its folds


class RunRecord:
    """A view of a run folder; each value is read when it is asked for, and nothing is changed."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Choose a folder, which needn't hold a run yet."""
        self.folder = Path(expanded(folder))

    def __fspath__(self) -> str:
        """The folder, wherever a path is asked for."""
        return str(self.folder)

    @property
    def is_run(self) -> bool:
        """Whether the folder holds a run, or what was pushed of one."""
        return (self.folder / RECIPE).is_file()

    @property
    def is_finished(self) -> bool:
        """Whether all phases ran and the result was measured."""
        return (self.folder / METRICS).is_file()

    def check_run(self) -> None:
        """Refuse a folder that holds no run.

        Raises:
            RunError: If it doesn't.
        """
        if not self.is_run:
            raise RunError(f"{self.folder} is no run folder: it has no {RECIPE}")

    def check_finished(self) -> None:
        """Refuse a folder that holds no finished run.

        Raises:
            RunError: If it doesn't.
        """
        self.check_run()
        if not self.is_finished:
            raise RunError(
                f"{self.folder}: this run is not finished; run its `hfft train` command again to continue it"
            )

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return read_recipe(self.folder / RECIPE)

    @property
    def model_dir(self) -> Path:
        """The result: a plain transformers model folder, or an adapter folder where nothing was merged."""
        there = [name for name in (MODEL, ADAPTER) if (self.folder / name).is_dir()] if self.is_finished else []
        return self.folder / (there[0] if there else result_name(self.recipe))

    @property
    def metrics(self) -> dict[str, Any]:
        """Content of metrics.json: split to metric to value and interval, and what else was measured.

        `by_class`, `confusion` and `calibration` are by split, `seconds` by stage; `examples` lie beside the model.
        """
        self.check_finished()
        return read_json(self.folder / METRICS)

    @property
    def data(self) -> dict[str, Any]:
        """Content of data.json: labels, splits with their fingerprints, skipped images, findings."""
        return read_json(self.folder / DATA)

    @property
    def skipped(self) -> list[dict[str, str]]:
        """Images that were left out as they can't be read: file, label and reason."""
        return self.data.get("skipped", []) if (self.folder / DATA).is_file() else []

    @property
    def environment(self) -> dict[str, Any]:
        """Content of environment.json; empty where the run was killed before, or only its result is here."""
        path = self.folder / ENVIRONMENT
        return read_json(path) if path.is_file() else {}

    @property
    def predictions(self) -> "pd.DataFrame":
        """One row per validation and test image."""
        import pandas as pd  # `hfft push` needs none

        path = self.folder / PREDICTIONS
        try:
            return pd.read_parquet(path)
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: the predictions can't be read: {error}") from error

    @property
    def pushes(self) -> list[dict[str, Any]]:
        """What was pushed where, in order."""
        path = self.folder / PUSHES
        return read_json(path) if path.is_file() else []

    def phase(self, number: int, name: str) -> PhaseRecord:
        """The record of a phase, counted from 0."""
        return PhaseRecord(self.folder / f"{number}-{name}")

    @property
    def phases(self) -> list[PhaseRecord]:
        """The records of all phases of the recipe."""
        return [self.phase(number, spec.name) for number, spec in enumerate(self.recipe.phases)]

    def phase_dir(self, number: int) -> Path:
        """Folder of a phase, counted from 0."""
        return self.phases[number].folder


def write_start(folder: Path, recipe: Recipe, environment: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Write what is known before the first phase."""
    folder.mkdir(parents=True, exist_ok=True)
    write_recipe(folder, recipe)
    write_json(folder / ENVIRONMENT, environment)
    write_json(folder / DATA, data)


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write the resolved recipe."""
    write_text(folder / RECIPE, dump_recipe(recipe))


def write_predictions(folder: Path, table: "pd.DataFrame") -> None:
    """Write one row per validation and test image."""
    write_file(folder / PREDICTIONS, lambda aside: table.to_parquet(aside, index=False))


def write_metrics(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Write what was measured, which marks the run as finished."""
    write_json(folder / METRICS, metrics)


def write_pushes(folder: Path, pushes: Sequence[Mapping[str, Any]]) -> None:
    """Write what was pushed where."""
    write_json(folder / PUSHES, list(pushes))


def result_name(recipe: Recipe) -> str:
    """Name of the folder that a run ends with: `model`, or `adapter` where it stays apart."""
    last = recipe.phases[-1].adapter
    return MODEL if last is None or last.merge else ADAPTER
