"""The run folder and the folders of its phases: the names of their files, and what reads and writes them."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfft.errors import RunError
from hfft.recipe.loading import RECIPE, dump_recipe, holds_recipe, read_recipe
from hfft.recipe.spec import Recipe
from hfft.system.files import expanded, read_json, write_file, write_json, write_text

if TYPE_CHECKING:
    import pandas as pd

ENVIRONMENT, DATA = "environment.json", "data.json"  # and recipe.yaml
METRICS, PREDICTIONS = "metrics.json", "predictions.parquet"
MODEL, ADAPTER = "model", "adapter"  # folders of the result
GIVEN = "given"  # folder of a model object that the run began with, where an adapter sits on it
PAGE, FIGURES = "report.html", "figures"
FIRST_BATCH = "first_batch.png"  # in the figures, as it was when training began
LABEL_ISSUES, LABEL_HINTS = "label_issues.json", "label_hints.json"  # the second of earlier versions
LABEL_PICTURES, MISTAKES = "label_issues", "mistakes"  # folders of pictures for the page
PUSHES = "hub.json"  # what was pushed where
REPORTING, BOARD = "reporting.json", "tensorboard"  # what was sent to integrations; a folder
CARD, EXAMPLES = "README.md", "examples"  # in the result's folder; the second is a folder
ADAPTER_CONFIG = "adapter_config.json"  # as PEFT calls it
EXPORT = "onnx"  # folder of an export
SUMMARY = "summary.json"  # of a cross-validation, next to the run folders of its folds
RESULT = "result.json"
RETENTION = "retention.json"  # in a phase's folder, and in the run's
_PLAN, _HISTORY, _ENGINE = "plan.json", "history.jsonl", "replay.json"


@dataclass(frozen=True)
class Group:
    """Parameters of one part that share a learning rate and a weight decay."""

    part: str
    names: tuple[str, ...]
    learning_rate: float | None  # highest rate of the schedule; None while it is still to be found
    weight_decay: float


@dataclass(frozen=True)
class Plan:
    """What a phase will do."""

    phase: str
    trains: str  # the trainable parts in words
    trainable: int  # parameters
    total: int  # parameters, those of an adapter included
    groups: tuple[Group, ...]  # of the optimizer
    images: int  # training images per epoch
    batch: int  # images per optimizer step at most, over all processes
    device_batch: int  # images per forward pass of one process
    steps: int
    epochs: float  # passes over the training images
    state_bytes: int  # weights, gradients and AdamW's two moments in float32, without activations
    # Kept by one step for its backward pass in float32; None where it was not estimated.
    activation_bytes: int | None = None
    processes: int = 1  # that share the images
    shares: Sequence[int] = ()  # images per epoch of the process that sees fewest and of the one that sees most
    frozen_share: float = 0.0  # of the network, counted in blocks, that is in front of all that trains
    solver: str = "steps"  # or `lbfgs`, whose steps are weight decays

    @property
    def batch_in_words(self) -> str:
        """For example `64 images (8 at once on each of 4 processes, 2 accumulated)`."""
        accumulated = self.batch // (self.device_batch * self.processes)
        place = f" on each of {self.processes} processes" if self.processes > 1 else ""
        more = f", {accumulated} accumulated" if accumulated > 1 else ""
        made = "" if self.batch == self.device_batch else f"{self.device_batch} at once{place}{more}"
        if self.images < self.batch:
            room = f"there is room for {self.batch}"
            return f"all {self.images} images ({f'{room}: {made}' if made else room})"
        return f"{self.batch} images ({made})" if made else f"{self.batch} images"

    @property
    def steps_in_words(self) -> str:
        """For example `1,000 steps of 8 images`."""
        if self.solver == "lbfgs":
            return f"solved by L-BFGS for up to {self.steps} weight decays"
        return f"{self.steps:,} {'step' if self.steps == 1 else 'steps'} of {self.batch_in_words}"


@dataclass(frozen=True)
class PhaseResult:
    """How a phase ended; result.json."""

    checkpoint: str  # folder of its best weights, below the phase's folder
    best_step: int  # optimizer step of those weights
    steps: int
    metrics: dict[str, float]  # validation metrics of the best weights; empty without validation images
    seconds: float  # time of training and evaluation in the process that finished the phase
    images_per_second: float  # training images in that time
    frozen: dict[str, int]  # tensors and bytes compared before and after, and how many changed
    mean: dict[str, Any] | None = None  # of a phase that averages checkpoints: which, is it kept, and its metrics


@dataclass(frozen=True)
class PhaseRecord:
    """Reads and writes the folder of a phase; the checkpoints in it are the Trainer's."""

    folder: Path

    @property
    def has_begun(self) -> bool:
        """Whether the folder is that of a phase."""
        return (self.folder / _PLAN).is_file()

    @property
    def plan(self) -> Plan:
        """What the phase was to do."""
        content = read_json(self.folder / _PLAN)
        return Plan(**{**content, "groups": tuple(Group(**group) for group in content["groups"])})

    @property
    def result(self) -> PhaseResult | None:
        """How the phase ended; None before that."""
        found = _read(self.folder / RESULT)
        return None if found is None else PhaseResult(**found)

    @property
    def history(self) -> tuple[Mapping[str, float], ...]:
        """The Trainer's log: one entry per logged step or evaluation, each with `step` and `epoch`."""
        lines = (self.folder / _HISTORY).read_text(encoding="utf-8").splitlines()
        return tuple(json.loads(line) for line in lines)

    @property
    def weights(self) -> Path | None:
        """Folder with the weights that the phase ended with; None before that.

        Of a phase with an adapter: the network with the adapter merged, where another phase follows, else the
        adapter alone.
        """
        result = _read(self.folder / RESULT)
        if result is None:
            return None
        return self.merged if self.merged.is_dir() else self.folder / result["checkpoint"]

    @property
    def merged(self) -> Path:
        """Folder for the network with the phase's adapter merged."""
        return self.folder / "merged"

    @property
    def retention(self) -> Path:
        """File with what was measured after the phase of the pretrained network's knowledge."""
        return self.folder / RETENTION

    def engine(self, default: str | None = None) -> str | None:
        """What computes the frozen part once, for replay; None where every step does. `default` if undecided."""
        return _read(self.folder / _ENGINE, {"engine": default})["engine"]

    def write_plan(self, plan: Plan) -> None:
        """Keep what the phase is to do."""
        write_json(self.folder / _PLAN, dataclasses.asdict(plan))

    def write_result(self, result: PhaseResult) -> None:
        """Keep how the phase ended, which marks it as finished."""
        write_json(self.folder / RESULT, dataclasses.asdict(result))

    def write_history(self, entries: Sequence[Mapping[str, float]]) -> None:
        """Keep the Trainer's log."""
        write_text(self.folder / _HISTORY, "".join(json.dumps(entry) + "\n" for entry in entries))

    def write_engine(self, engine: str | None) -> None:
        """Keep how the phase is replayed, so that it goes on in the same way."""
        write_json(self.folder / _ENGINE, {"engine": engine})


def _read(path: Path, default: Any = None) -> Any:
    return read_json(path) if path.is_file() else default


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
        """Refuse a folder that holds no run, with a RunError."""
        if not self.is_run:
            raise RunError(f"{self.folder} is no run folder: it has no {RECIPE}")

    def check_finished(self) -> None:
        """Refuse a folder that holds no finished run, with a RunError."""
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
        there = [name for name in (MODEL, ADAPTER) if self.is_finished and (self.folder / name).is_dir()]
        return self.folder / (there[0] if there else result_name(self.recipe))

    @property
    def metrics(self) -> dict[str, Any]:
        """Content of metrics.json: split to metric to value and interval, and what else was measured.

        `by_class`, `confusion` and `calibration` are by split, `seconds` by step of the run; `examples` lie in the
        model folder.
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
        return _read(self.folder / DATA, {}).get("skipped", [])

    @property
    def environment(self) -> dict[str, Any]:
        """Content of environment.json; empty where the run was killed before, or only its result is here."""
        return _read(self.folder / ENVIRONMENT, {})

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
        return _read(self.folder / PUSHES, [])

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


def write_start(
    folder: Path,
    recipe: Recipe,
    environment: Mapping[str, Any],
    data: Mapping[str, Any],
    comments: Mapping[str, str] | None = None,
) -> None:
    """Write what is known before the first phase."""
    folder.mkdir(parents=True, exist_ok=True)
    write_recipe(folder, recipe, comments)
    write_json(folder / ENVIRONMENT, environment)
    write_json(folder / DATA, data)


def write_recipe(folder: Path, recipe: Recipe, comments: Mapping[str, str] | None = None) -> None:
    """Write the resolved recipe; one that is there already keeps its comments."""
    if comments or not holds_recipe(folder / RECIPE, recipe):
        write_text(folder / RECIPE, dump_recipe(recipe, comments))


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
