"""What a run measures of the pretrained network's knowledge after each phase, and takes back of it at the end."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from hfft.data.sources.reading import ImageData
from hfft.errors import RecipeError, TrainingError
from hfft.evaluators.out_of_distribution import find_novelty
from hfft.evaluators.retention import Retention, choose_sample
from hfft.evaluators.weight_interpolation import Interpolation, Trial, find_alpha, interpolate
from hfft.inference.classifier import Classifier
from hfft.model.checkpoint import saved_weights
from hfft.recipe.dependencies import is_greater_better
from hfft.recipe.spec import Recipe
from hfft.runs.record import RETENTION, PhaseRecord
from hfft.system.distributed import meet
from hfft.training.phase_data import PhaseData, PhaseRun
from hfft.training.settings import EVAL_BATCH

_INTERPOLATED = "interpolated"


class Retaining:
    """Follows the network through the phases of a run."""

    def __init__(
        self,
        recipe: Recipe,
        network: Any,
        images: ImageData,
        processor: Any,
        phases: Sequence[PhaseRun],
        *,
        is_loaded: bool,
    ) -> None:
        """Look at the network before the first phase.

        Args:
            recipe: What to do; its gradual phases are written out.
            network: As it was loaded; is left as it was.
            images: For the sample that the encoders are compared on.
            processor: The network's.
            phases: The phases.
            is_loaded: Whether the network is the recipe's checkpoint, which may have a head for an old task.
        """
        self._recipe = recipe
        self._phases = phases
        self._retention: Retention | None = None
        if recipe.retain.measure:
            files = [phase.folder / RETENTION for phase in phases]
            files += [self._run_folder / RETENTION] if recipe.retain.interpolate is not None else []
            self._retention = Retention(
                network,
                choose_sample(images, processor, recipe.seed),
                checkpoint=recipe.model if is_loaded else None,
                files=files,
            )

    @property
    def _run_folder(self) -> Path:
        return self._phases[0].folder.parent

    def after_phase(self, network: Any, phase: PhaseRun) -> None:
        """Measure how much is left; the network is left as it was."""
        if self._retention is not None:
            self._retention.measure(network, phase.spec.name, phase.folder / RETENTION, phase.title)

    def finish(self, network: Any, data: PhaseData) -> dict[str, Any]:
        """Interpolate the weights of the main process's network, if the recipe says so.

        Args:
            network: With the final weights, without adapters.
            data: With the validation images that decide.

        Returns:
            What metrics.json holds under `interpolation` and `retention`.
        """
        found: dict[str, Any] = {}
        if self._recipe.retain.interpolate is not None:
            if PartialState().is_main_process:
                found["interpolation"] = dataclasses.asdict(self._interpolate(network, data))
            if self._retention is not None:
                self._retention.measure(network, _INTERPOLATED, self._run_folder / RETENTION, "interpolated")
        if self._retention is not None:
            found["retention"] = self._retention.summary()
        meet()
        return found

    def _interpolate(self, network: Any, data: PhaseData) -> Interpolation:
        phase = _last_head_phase(self._phases)
        weights = PhaseRecord(phase.folder).weights
        if weights is None:
            raise TrainingError(f"{phase.folder}: no result.json, so the interpolation has nowhere to begin")
        start = saved_weights(network, weights)
        asked = self._recipe.retain.interpolate
        found = find_alpha(network, start, self._trial(data)) if asked == "auto" else Interpolation(float(asked or 0))
        interpolate(network, start, found.alpha)
        return found

    def _trial(self, data: PhaseData) -> Trial:
        if data.validation is None:
            raise RecipeError("retain.interpolate: 'auto' needs validation images, and there are none")
        arguments = self._phases[-1].spec.arguments
        metric = str(arguments.get("metric_for_best_model") or data.headline).removeprefix("eval_")
        return Trial(
            examples=data.validation,
            floats=data.floats,
            metric=metric,
            is_multi_label=data.is_multi_label,
            greater_is_better=is_greater_better(arguments),
            seed=self._recipe.seed,
            batch_size=arguments.get("per_device_eval_batch_size", EVAL_BATCH),
            device=torch.device(str(PartialState().device)),
        )


def keep_novelty(folder: Path, images: ImageData, recipe: Recipe) -> None:
    """Write the features that tell how unlike the training images others are, beside a model.

    Args:
        folder: Of the model or adapter, as it will be opened.
        images: The run's.
        recipe: Its seed chooses among them.
    """
    classifier = Classifier.from_pretrained(folder, trust_remote_code=recipe.model.trust_remote_code)
    find_novelty(classifier.model, images, classifier.transform, seed=recipe.seed).save(folder)


def _last_head_phase(phases: Sequence[PhaseRun]) -> PhaseRun:
    """The last of the phases at the beginning that train the head alone."""
    heads = [phase for place, phase in enumerate(phases) if all(s.spec.trains_head_alone for s in phases[: place + 1])]
    return heads[-1]
