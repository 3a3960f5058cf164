"""Run a phase, from the best weights of the one before; a killed run goes on where it was."""

import dataclasses
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from accelerate.logging import get_logger
from transformers import TrainerCallback, set_seed
from transformers.debug_utils import DebugUnderflowOverflow

from hfft.errors import TrainingError
from hfft.model.freezing import Freeze
from hfft.model.restoring import synchronised
from hfft.recipe.spec import PhaseSpec
from hfft.replay.dataset import ReplayedData
from hfft.replay.replay import Replay
from hfft.runs.record import PhaseRecord, PhaseResult
from hfft.system.distributed import meet
from hfft.system.launch import is_fsdp_asked
from hfft.training.averaging import AVERAGE, average_checkpoints, begin_average
from hfft.training.callbacks import (
    EpochSetter,
    FirstSteps,
    HistoryWriter,
    PhaseEarlyStopping,
    PhaseProgress,
    Stopper,
    is_evaluation,
)
from hfft.training.failures import failures_explained, is_out_of_memory, smaller_batch
from hfft.training.phase_data import PhaseData, PhaseRun
from hfft.training.plan import plan_phase, prepare_phase, with_solver
from hfft.training.settings import end_activation_checkpointing, make_checkpointing_exact, training_arguments
from hfft.training.sharding import Shards, make_trainer
from hfft.training.solved_head import ends_in, solvable_head
from hfft.training.trainer import PhaseTrainer, clear_partial, damage, restore

_LOG = get_logger(__name__)


def run_phase(
    model: Any,
    phase: PhaseRun,
    data: PhaseData,
    *,
    replay: Replay | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[Any, PhaseResult]:
    """Train one phase, finish it from its newest whole checkpoint, or reload it where it has ended.

    Args:
        model: A plain classifier with the weights to start from.
        phase: The phase.
        data: Images and metrics.
        replay: Decides whether the frozen part is computed once; without it, it never is.
        callbacks: The user's.

    Returns:
        The model with the phase's best weights, its adapter still attached, and the result.

    Raises:
        TrainingError: If a frozen tensor changed, memory or disk ran out, or the weights of a finished phase are
            damaged.
    """
    set_seed(phase.seed)
    end_activation_checkpointing(model)
    pixels = data.floats(data.train[0]["pixel_values"].unsqueeze(0)).to(model.device)  # (1, C, H, W)
    model = prepare_phase(model, phase.spec, pixels)
    result = PhaseRecord(phase.folder).result
    if result is not None:
        _LOG.info(f"{phase.title}: was finished")
        checkpoint = phase.folder / result.checkpoint
        problem = damage(checkpoint, weights_only=True)
        if problem is not None:
            raise TrainingError(
                f"{checkpoint}: the weights of this finished phase can't be read ({problem}); remove {phase.folder} "
                "and the folders of later phases to train them again"
            )
        restore(model, checkpoint)
        return model, result
    finds_batch = phase.spec.arguments.get("auto_find_batch_size")  # on one process: planning refuses it on several
    start = {name: value.cpu().clone() for name, value in model.state_dict().items()} if finds_batch else None
    while True:
        try:
            with synchronised(model, phase.title) if phase.spec.batchnorm == "sync" else nullcontext():
                return _finish(model, phase, data, replay, callbacks)
        except TrainingError as error:
            asked = phase.spec.arguments
            accumulated = asked.get("gradient_accumulation_steps", 1)
            smaller = smaller_batch(asked.get("per_device_train_batch_size", 8), accumulated)
            if start is None or smaller is None or error.__cause__ is None or not is_out_of_memory(error.__cause__):
                raise
            _LOG.warning(f"{error}; tries that")
        model.load_state_dict(start)
        phase = dataclasses.replace(phase, spec=dataclasses.replace(phase.spec, arguments={**asked, **smaller}))


def _finish(
    model: Any, phase: PhaseRun, data: PhaseData, replay: Replay | None, callbacks: Sequence[TrainerCallback]
) -> tuple[Any, PhaseResult]:
    """Train a phase from its start or its newest whole checkpoint to its end."""
    spec, folder, title = phase.spec, phase.folder, phase.title
    validate = data.validation is not None
    arguments = training_arguments(spec, folder, seed=phase.seed, validate=validate, metric=data.headline)
    shards = Shards(model) if is_fsdp_asked() else None
    model = model if shards is None else shards.network
    with failures_explained(title, arguments):
        replayed = None
        if replay is not None:
            replayed = replay.open(data.frozen_pass(model, arguments, title), phase.number, folder)
    spec = _with_solver(model, phase, replayed)
    plan = plan_phase(model, spec, images=len(data.train), processes=arguments.world_size)
    freeze = Freeze(model, batchnorm=spec.batchnorm)
    make_checkpointing_exact(arguments)
    trainer = make_trainer(model, data, replayed, arguments, groups=plan.groups, freeze=freeze, shards=shards)
    begin_average(trainer, spec.average, freeze.names)
    progress = PhaseProgress(title, len(data.train))
    record = PhaseRecord(folder)
    own = [progress, FirstSteps(title, plan.groups), EpochSetter(), HistoryWriter(record), Stopper(title)]
    own += [PhaseEarlyStopping(spec.early_stopping)] if spec.early_stopping is not None else []
    for callback in (*callbacks, *([HistoryWriter(record)] if spec.is_solved else own)):
        trainer.add_callback(callback)
    if trainer.is_world_process_zero():
        clear_partial(folder)
        record.write_plan(plan)
    _LOG.info(f"{title}: trains {plan.trains}; {plan.trainable:,} of {plan.total:,} parameters, {plan.steps_in_words}")
    begun = time.monotonic()
    try:
        with (
            failures_explained(title, arguments),
            nullcontext() if replayed is None else replayed.split_point.bypassed(),
        ):
            trainer.train_to_end(title)
            mean = None if trainer.average is None else average_checkpoints(trainer, freeze.names, title)
    finally:
        progress.close()
        model = _released(trainer)
    if shards is not None:
        model = shards.gather(everything=True).to(arguments.device)
    result = _result(trainer, time.monotonic() - begun, freeze.prove(model), mean)
    if trainer.is_world_process_zero():
        record.write_result(result)
    meet()
    return model, result


def _with_solver(model: Any, phase: PhaseRun, replayed: ReplayedData | None) -> PhaseSpec:
    """The phase as it is run: solved, where the vectors that enter a linear head are recorded, or in steps."""
    spec = with_solver(model, phase.spec)
    if spec.solver == "steps":
        return spec
    head = solvable_head(model)
    if replayed is not None and head is not None and ends_in(model, head, replayed):
        return spec
    why = "nothing is replayed" if replayed is None else "the logits are not what leaves a layer that vectors enter"
    if phase.spec.solver == "lbfgs":
        raise TrainingError(f"{phase.title}: solver: lbfgs: {why}; set solver: steps")
    _LOG.info(f"{phase.title}: takes steps: {why}")
    return dataclasses.replace(spec, solver="steps")


def _released(trainer: PhaseTrainer) -> Any:
    """The model as it was before Accelerate prepared it.

    Mixed precision wraps `forward`: once more in every phase if it stays, and in none but the first if the mark of a
    prepared model does (accelerate 1.15). The hooks of `debug` would look at whatever else the model is used for.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    for module in model.modules():
        for number, hook in list(module._forward_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), DebugUnderflowOverflow):
                del module._forward_hooks[number]
    if hasattr(model, "_is_accelerate_prepared"):
        del model._is_accelerate_prepared
    return model


def _result(trainer: PhaseTrainer, seconds: float, frozen: dict[str, int], mean: dict[str, Any] | None) -> PhaseResult:
    is_mean = mean is not None and mean["kept"]
    state = trainer.state
    best = state.best_global_step or state.global_step
    logged = [entry for entry in state.log_history if entry.get("step") == best and is_evaluation(entry)]
    left_out = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_loss")
    evaluated = logged[-1] if logged else {}
    metrics = {k[5:]: value for k, value in evaluated.items() if k.startswith("eval_") and k not in left_out}
    speed = next((e["train_samples_per_second"] for e in reversed(state.log_history) if "train_runtime" in e), 0.0)
    return PhaseResult(
        checkpoint=AVERAGE if is_mean else f"checkpoint-{best}",
        best_step=best,
        steps=state.global_step,
        metrics=mean["metrics"] if mean is not None and is_mean else metrics,
        seconds=round(seconds, 3),
        images_per_second=speed,
        frozen=frozen,
        mean=mean,
    )
