"""The protocol of all that measures a run and does not train it, and the values that evaluators get."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from datasets import Dataset

from hfft.data.sources.reading import ImageData
from hfft.evaluators.held_out import ForwardPass, JointPass
from hfft.metrics.scores import Scores
from hfft.recipe.spec import Recipe
from hfft.replay.replay import Replay
from hfft.runs.record import PhaseResult
from hfft.training.model_selection import Selection
from hfft.training.phase_data import PhaseData, PhaseRun


@dataclass(frozen=True)
class Job:
    """What a run works with, settled before its first phase.

    Attributes:
        folder: The run folder.
        load: Loads the pretrained network anew, with a new head; None where the caller brought a model object.
    """

    recipe: Recipe
    folder: Path
    images: ImageData
    processor: Any
    phases: Sequence[PhaseRun]
    data: PhaseData
    replay: Replay | None
    load: Callable[[], Any] | None

    @property
    def held_out(self) -> dict[str, Dataset]:
        """Validation and test images, as far as there are any."""
        splits = self.images.splits
        return {split: splits[split] for split in ("validation", "test") if split in splits}


@dataclass(frozen=True)
class Result:
    """The model that a run ends with, reopened from its folder.

    Attributes:
        folder: Of the model, or of the adapter where nothing was merged.
        model: On the device, in evaluation mode.
        forward: How images are passed through it.
        phases: Results of all phases.
        selection: Which phase's model it is.
        scores: By split; empty until they are computed.
    """

    folder: Path
    model: Any
    processor: Any
    forward: ForwardPass
    phases: Sequence[PhaseResult]
    selection: Selection
    scores: Mapping[str, Scores]


class Evaluator(Protocol):
    """Measures a run; every process calls every method, in this order.

    Attributes:
        name: Its key in metrics.json, in the log, and in the seconds that a run notes.
    """

    name: str

    def after_phase(self, job: Job, phase: PhaseRun, network: Any) -> None:
        """Measure the network after a phase, without adapter; leave it as it was."""

    def before_saving(self, job: Job, network: Any) -> None:
        """Look at the network that the run ends with; only weight interpolation changes it."""

    def join_pass(self, job: Job, result: Result) -> JointPass | None:
        """What to compute in the same pass over the held-out images that scores the result, if anything."""

    def after_run(self, job: Job, result: Result) -> Mapping[str, Any] | None:
        """Measure the result; the main process returns the section of metrics.json, None where there is none."""
