"""`learning_rate: auto`: rate and weight decay of a head phase, chosen among many before it begins."""

import dataclasses
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from transformers import TrainingArguments

from hfft.errors import ModelError, TrainingError
from hfft.recipe.arguments import AUTO
from hfft.recipe.spec import PhaseSpec
from hfft.replay.dataset import ActivationDataset, ReplayedData
from hfft.runs.phase_record import PhaseRecord
from hfft.system.distributed import on_main
from hfft.training.phase_data import PhaseData, PhaseRun
from hfft.training.probe import HeadInputs, search_head

_LOG = get_logger(__name__)


def with_rate(
    model: Any, data: PhaseData, replayed: ReplayedData | None, arguments: TrainingArguments, phase: PhaseRun
) -> PhaseSpec:
    """The phase with numbers in the place of `auto`, found once and kept in its folder (search.json).

    Args:
        model: As `prepare_phase` left it.
        data: Of the phase.
        replayed: What enters the head.
        arguments: Of the phase.
        phase: The phase.

    Raises:
        ModelError: If the head isn't one linear layer behind one vector per image.
        RecipeError: If the phase has an optimizer or a schedule that can't be tried.
        TrainingError: If what enters the head isn't recorded, or no rate works.
    """
    if phase.spec.arguments.get("learning_rate") != AUTO:
        return phase.spec
    record = PhaseRecord(phase.folder)
    if replayed is None:
        raise TrainingError(f"{phase.title}: learning_rate: auto needs what enters the head recorded; give a number")
    recorded = replayed

    def choose() -> dict[str, Any]:
        found = record.search or _search(model, data, recorded, arguments, phase)
        record.write_search(found)
        return found

    choice = on_main(choose)
    rate, decay = choice["learning_rate"], choice["weight_decay"]
    _LOG.info(f"{phase.title}: learning rate {rate:g} and weight decay {decay:g}, the best of {len(choice['table'])}")
    chosen = {**phase.spec.arguments, "learning_rate": rate, "weight_decay": decay}
    return dataclasses.replace(phase.spec, arguments=chosen)


def _search(
    model: Any, data: PhaseData, replayed: ReplayedData, arguments: TrainingArguments, phase: PhaseRun
) -> dict[str, Any]:
    layer = model.get_submodule(replayed.split_point.path)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    is_whole = {id(parameter) for parameter in trainable} == {id(parameter) for parameter in layer.parameters()}
    if not is_whole or [tensor.ndim for tensor in replayed.train[0]["activations"]] != [1]:
        raise ModelError(
            f"phases.{phase.spec.name}.learning_rate: auto needs a head that is one linear layer with nothing "
            f"random in front of it; here {len(trainable)} tensors train behind {replayed.split_point.path}; give "
            "a number"
        )
    assert replayed.validation is not None
    views = [_rows(replayed.train, view) for view in range(len(replayed.train.views))]
    parts = (replayed.train, replayed.validation)
    labels, validation_labels = (torch.from_numpy(np.asarray(part.labels)) for part in parts)
    inputs = HeadInputs(
        views, labels, _rows(replayed.validation, 0), validation_labels, is_multi_label=data.is_multi_label
    )
    choice = search_head(
        layer,
        inputs,
        arguments=arguments,
        loss=data.loss(arguments.label_smoothing_factor),
        metrics=data.metrics,
        patience=phase.spec.early_stopping,
    )
    return dataclasses.asdict(choice)


def _rows(examples: ActivationDataset, view: int) -> torch.Tensor:
    """What enters the head for all images of a view, (N, D) float32."""
    return examples.views[view].rows(range(len(examples)))[0].float()
