"""The files of a finished run as frozen dataclasses: all that a card, a figure or a page says of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfft.errors import RunError, first_line
from hfft.recipe.spec import PhaseSpec, Recipe
from hfft.runs.locating import adapter_base
from hfft.runs.record import ADAPTER, ENVIRONMENT, RESULT, RETENTION, PhaseRecord, PhaseResult, Plan, RunRecord
from hfft.system.files import read_json

HELD_OUT = ("test", "validation")  # the first that a run has is the one to judge it by
TOO_FEW = "too few images"
_SHARES = ("precision", "recall", "f1")


@dataclass(frozen=True)
class Measured:
    """A number and the ends of its 95 % interval, which are None where there are too few images to say."""

    value: float
    low: float | None
    high: float | None

    @property
    def least(self) -> float:
        """The lower end, or where there is none, the value."""
        return self.value if self.low is None else self.low

    @property
    def percents(self) -> str:
        """The interval of a share in words, in percent."""
        if self.low is None or self.high is None:
            return TOO_FEW
        return f"{100 * self.low:.1f} to {100 * self.high:.1f} %"

    def between(self, digits: int, sign: str = "") -> str:
        """The interval in words, each end with so many digits behind the point, signed where `sign` is `+`."""
        if self.low is None or self.high is None:
            return TOO_FEW
        return f"{self.low:{sign}.{digits}f} to {self.high:{sign}.{digits}f}"


@dataclass(frozen=True)
class ClassScores:
    """How one class is recognised; see metrics/per_class.py."""

    precision: Measured  # without meaning where no image was taken for the class
    recall: Measured  # without meaning where the class has no images
    f1: Measured  # the harmonic mean of both
    images: int
    predicted: int  # images taken for it
    average_precision: float | None = None  # multi-label only; None where no image has the label
    threshold: float | None = None  # multi-label only: the probability from which an image is given the label


@dataclass(frozen=True)
class Bin:
    """Images whose predicted class has a probability in (low, high]; see metrics/calibration.py."""

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class SplitFacts:
    """A split, and how the result does on it; nothing is measured on the training images."""

    name: str  # `train`, `validation` or `test`
    images: int
    counts: Mapping[str, int]  # images by class
    is_carved: bool  # whether it was taken out of the training images at random
    metrics: Mapping[str, Measured]
    by_class: Mapping[str, ClassScores]
    confusion: Mapping[str, Mapping[str, int]]  # class to predicted class to images; zeros are left out
    calibration_error: float | None  # expected
    bins: tuple[Bin, ...]  # what the calibration error is computed from


@dataclass(frozen=True)
class PhaseFacts:
    """A phase: what was asked for, planned and reached; `history` and `engine` as in PhaseRecord."""

    spec: PhaseSpec
    plan: Plan
    result: PhaseResult
    history: tuple[Mapping[str, float], ...]
    engine: str | None


@dataclass(frozen=True)
class SourceFacts:
    """Where the checkpoint or the images come from."""

    kind: str  # `hub`, `local` or `memory`
    name: str  # Hub id; of what is on somebody's disk, the last name of its path
    revision: str | None  # of a Hub id, where the recipe names one

    @property
    def hub_id(self) -> str | None:
        """What others can find on the Hub, if anything."""
        return self.name if self.kind == "hub" else None


@dataclass(frozen=True)
class Example:
    """A held-out image in the model folder: its path below the model's folder, and its class."""

    file: str
    label: str


@dataclass(frozen=True)
class RunFacts:
    """A finished run."""

    folder: Path
    result: Path  # folder of the model or the adapter
    recipe: Recipe
    labels: tuple[str, ...]  # class names, in the order of the model's outputs
    is_multi_label: bool  # whether an image has any number of them
    splits: Mapping[str, SplitFacts]  # by name: train, then what else there is
    phases: tuple[PhaseFacts, ...]
    checkpoint: SourceFacts  # what it was fine-tuned from
    data: SourceFacts  # what it was fine-tuned on
    environment: Mapping[str, Any]  # content of environment.json
    seconds: Mapping[str, float]  # by part of the run, in the process that finished it
    config: Mapping[str, Any]  # content of the result's config.json
    adapter_base: str | None  # checkpoint or folder that an adapter is added to; None for a plain model
    examples: tuple[Example, ...]  # images for the widget
    kept: str  # why the result is the model of `kept_phase`, in a sentence; empty in runs of early versions
    kept_phase: str  # name of the phase whose model the run ended with
    baselines: Mapping[str, Mapping[str, Any]]  # name to `about`, a sentence, and metrics by split
    # As in metrics.json, like `interpolation` and `confidence`; empty where nothing was measured.
    retention: Mapping[str, Any]
    interpolation: Mapping[str, Any]
    confidence: Mapping[str, Any]
    findings: tuple[Mapping[str, Any], ...] = ()  # of the audit, as in data.json, like `skipped`
    skipped: tuple[Mapping[str, str], ...] = ()
    # Phase that changed the encoder to block to `cka` and `cosine_drift`.
    blocks: Mapping[str, Mapping[str, Mapping[str, float | None]]] = field(default_factory=dict)

    @property
    def judged(self) -> SplitFacts | None:
        """The split to judge the model by: test, else validation, else none."""
        return next((self.splits[name] for name in HELD_OUT if name in self.splits), None)

    @property
    def headline(self) -> str:
        """Name of the metric that comes first in every table."""
        return "mean_average_precision" if self.is_multi_label else "accuracy"

    @property
    def model_type(self) -> str:
        """Of the network, as transformers calls it."""
        return self.config["model_type"]

    @property
    def is_adapter(self) -> bool:
        """Whether the result is an adapter folder."""
        return self.adapter_base is not None

    @property
    def has_own_base(self) -> bool:
        """Whether the adapter sits on weights that only this run has, and not on the checkpoint."""
        base = Path(self.adapter_base or "")
        return base.is_absolute() and base.name != self.checkpoint.name


def read_facts(folder: str | Path, *, metrics: Mapping[str, Any] | None = None) -> RunFacts:
    """Read a run folder.

    Args:
        folder: Of a run.
        metrics: Content of metrics.json, where the run is about to write it; read from there when None.

    Raises:
        RunError: If it is no run folder, the run isn't finished, or its files aren't those that a run leaves.
    """
    run = RunRecord(folder)
    run.check_run()
    if metrics is None:
        run.check_finished()
    recipe = run.recipe
    with _readable(run.folder):
        measured = run.metrics if metrics is None else metrics
        data, environment = run.data, read_json(run.folder / ENVIRONMENT)
        result = run.model_dir
        kept = measured.get("kept", {})
        config = read_json(result / "config.json")
        config["model_type"]  # which every model has
        return RunFacts(
            folder=run.folder,
            result=result,
            recipe=recipe,
            labels=tuple(data["labels"]),
            is_multi_label=data.get("task") == "multi_label",
            splits={name: _split(name, part, measured) for name, part in data["splits"].items()},
            phases=tuple(_phase(record, spec) for record, spec in zip(run.phases, recipe.phases, strict=True)),
            checkpoint=SourceFacts(**environment["origin"]["checkpoint"]),
            data=SourceFacts(**environment["origin"]["data"]),
            environment=environment,
            seconds=measured["seconds"],
            config=config,
            adapter_base=adapter_base(result)[0] if result.name == ADAPTER else None,
            examples=tuple(Example(**example) for example in measured["examples"]),
            kept=kept.get("reason", ""),
            kept_phase=kept.get("phase", recipe.phases[-1].name),
            baselines=measured.get("baselines", {}),
            retention=measured.get("retention", {}),
            interpolation=measured.get("interpolation", {}),
            confidence=measured.get("confidence", {}),
            findings=tuple(data.get("findings", ())),
            skipped=tuple(data.get("skipped", ())),
            blocks=_blocks(run),
        )


def most_confused(split: SplitFacts, limit: int) -> list[tuple[str, str, int]]:
    """The pairs of class and other predicted class with the most images, and how many: at most so many pairs."""
    pairs = [
        (label, given, count)
        for label, row in split.confusion.items()
        for given, count in row.items()
        if given != label
    ]
    return sorted(pairs, key=lambda pair: -pair[2])[:limit]


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise RunError(f"{folder}: the run's {Path(error.filename).relative_to(folder)} is missing") from error
    except KeyError as error:
        raise RunError(
            f"{folder}: the run's files lack {error}: they were changed, or written by another version of hfft; "
            "--overwrite runs the recipe again"
        ) from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RunError(f"{folder}: the run's files can't be read: {first_line(error)}") from error


def _split(name: str, part: Mapping[str, Any], measured: Mapping[str, Any]) -> SplitFacts:
    is_measured = name in measured
    calibration = measured["calibration"][name] if is_measured else {"expected_calibration_error": None, "bins": []}
    return SplitFacts(
        name=name,
        images=part["images"],
        counts=part["counts"],
        is_carved=part["carved"],
        metrics={metric: Measured(**values) for metric, values in measured[name].items()} if is_measured else {},
        by_class={label: _class(row) for label, row in measured["by_class"][name].items()} if is_measured else {},
        confusion=measured["confusion"][name] if is_measured else {},
        calibration_error=calibration["expected_calibration_error"],
        bins=tuple(Bin(**row) for row in calibration["bins"]),
    )


def _class(row: Mapping[str, Any]) -> ClassScores:
    return ClassScores(
        **{share: Measured(row[share], row[f"{share}_low"], row[f"{share}_high"]) for share in _SHARES},
        images=row["images"],
        predicted=row["predicted"],
        average_precision=row.get("average_precision"),
        threshold=row.get("threshold"),
    )


def _blocks(run: RunRecord) -> dict[str, Any]:
    """What was measured after each phase that changed the encoder, and of interpolated weights."""
    files = {spec.name: record.retention for record, spec in zip(run.phases, run.recipe.phases, strict=True)}
    files["interpolation"] = run.folder / RETENTION
    found = {name: read_json(path) for name, path in files.items() if path.is_file()}
    return {name: content["blocks"] for name, content in found.items() if content["changed"]}


def _phase(record: PhaseRecord, spec: PhaseSpec) -> PhaseFacts:
    result = record.result
    if result is None:
        raise RunError(f"{record.folder.parent}: the run's {record.folder.name}/{RESULT} is missing")
    return PhaseFacts(spec, record.plan, result, record.history, record.engine())
