"""The folder of one phase: what it planned, its log, and how it ended."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfft.system.files import read_json, write_json, write_text

RESULT = "result.json"
RETENTION = "retention.json"  # in a phase's folder, and in the run's
_PLAN, _HISTORY, _ENGINE, _SEARCH = "plan.json", "history.jsonl", "replay.json", "search.json"


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate and a weight decay.

    Attributes:
        part: The part they belong to.
        names: Their names.
        learning_rate: Highest rate of the schedule; None while it is still to be found.
        weight_decay: As AdamW takes it.
    """

    part: str
    names: tuple[str, ...]
    learning_rate: float | None
    weight_decay: float


@dataclass(frozen=True)
class Plan:
    """What a phase will do.

    Attributes:
        phase: Its name.
        trains: The trainable parts in words.
        trainable: Parameters that train.
        total: Parameters of the network, adapter included.
        groups: Parameter groups of the optimizer.
        images: Training images per epoch.
        batch: Images per optimizer step at most, over all processes.
        device_batch: Images per forward pass of one process.
        steps: Optimizer steps.
        epochs: Passes over the training images.
        state_bytes: Weights, gradients and AdamW's two moments in float32, without activations.
        activation_bytes: Kept by one step for its backward pass in float32; None where it was not estimated.
        processes: That share the images.
        shares: Images per epoch of the process that sees fewest and of the one that sees most.
        frozen_share: Of the network, counted in blocks, that is in front of all that trains.
    """

    phase: str
    trains: str
    trainable: int
    total: int
    groups: tuple[Group, ...]
    images: int
    batch: int
    device_batch: int
    steps: int
    epochs: float
    state_bytes: int
    activation_bytes: int | None = None
    processes: int = 1
    shares: Sequence[int] = ()
    frozen_share: float = 0.0

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
        return f"{self.steps:,} {'step' if self.steps == 1 else 'steps'} of {self.batch_in_words}"


@dataclass(frozen=True)
class PhaseResult:
    """How a phase ended; result.json.

    Attributes:
        checkpoint: Folder of its best weights, below the phase's folder.
        best_step: Optimizer step of those weights.
        steps: Steps taken.
        metrics: Validation metrics of the best weights; empty without validation images.
        seconds: Time of training and evaluation in the process that finished the phase.
        images_per_second: Training images in that time.
        frozen: Tensors and bytes compared before and after, and how many changed.
    """

    checkpoint: str
    best_step: int
    steps: int
    metrics: dict[str, float]
    seconds: float
    images_per_second: float
    frozen: dict[str, int]


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
        path = self.folder / RESULT
        return PhaseResult(**read_json(path)) if path.is_file() else None

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
        path = self.folder / RESULT
        if not path.is_file():
            return None
        return self.merged if self.merged.is_dir() else self.folder / read_json(path)["checkpoint"]

    @property
    def merged(self) -> Path:
        """Folder for the network with the phase's adapter merged."""
        return self.folder / "merged"

    @property
    def search(self) -> dict[str, Any] | None:
        """What the search for a learning rate found; None where there was none."""
        path = self.folder / _SEARCH
        return read_json(path) if path.is_file() else None

    @property
    def retention(self) -> Path:
        """File with what was measured after the phase of the pretrained network's knowledge."""
        return self.folder / RETENTION

    def engine(self, default: str | None = None) -> str | None:
        """What computes the frozen part once, for replay; None where every step does. `default` if undecided."""
        path = self.folder / _ENGINE
        return read_json(path)["engine"] if path.is_file() else default

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

    def write_search(self, found: Mapping[str, Any]) -> None:
        """Keep what the search for a learning rate found."""
        write_json(self.folder / _SEARCH, dict(found))
