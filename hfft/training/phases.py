"""Run phases in order, each from the best weights of the one before; a killed run goes on where it was."""

import dataclasses
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.debug_utils import DebugUnderflowOverflow

from hfft.errors import RecipeError, TrainingError, first_line
from hfft.model.batchnorm import synchronised
from hfft.model.freezing import Freeze
from hfft.recipe.spec import PhaseSpec
from hfft.replay.dataset import ReplayedData
from hfft.replay.replay import Replay
from hfft.runs.record import Group, PhaseRecord, PhaseResult
from hfft.system.distributed import meet
from hfft.system.launch import is_fsdp_asked
from hfft.system.signals import patient
from hfft.training.callbacks import (
    EpochSetter,
    HistoryWriter,
    PhaseEarlyStopping,
    PhaseProgress,
    Stopper,
    is_evaluation,
)
from hfft.training.checkpoints import damage, newest_checkpoint
from hfft.training.failures import failures_explained, is_out_of_memory, smaller_batch
from hfft.training.first_steps import FirstSteps
from hfft.training.losses import ImageLoss
from hfft.training.phase_data import PhaseData, PhaseRun
from hfft.training.plan import plan_phase, prepare_phase
from hfft.training.probe import with_rate
from hfft.training.recomputation import end_recomputation, exact_recomputation
from hfft.training.settings import check_options, check_schedule, training_arguments
from hfft.training.sharding import ShardedTrainer, Shards
from hfft.training.trainer import PhaseTrainer, clear_partial, restore

_LOG = get_logger(__name__)


def try_arguments(spec: PhaseSpec, *, seed: int, validate: bool) -> None:
    """Make a Trainer, an optimizer and a schedule with a phase's settings, around a network of one weight.

    Args:
        spec: The phase.
        seed: The recipe's seed.
        validate: Whether there are validation images.

    Raises:
        RecipeError: If that fails; much is refused by the Trainer only, or by a package that is not installed.
    """
    with TemporaryDirectory() as scratch:
        arguments = training_arguments(spec, Path(scratch), seed=seed, validate=validate)
        arguments.label_smoothing_factor = 0.0  # which Trainer asks a network's config for
        network = torch.nn.Linear(1, 1)
        group = Group("head", ("weight", "bias"), arguments.learning_rate, arguments.weight_decay)
        rows = Dataset.from_dict({"label": [0]})
        try:
            trainer = PhaseTrainer(
                network,
                arguments,
                groups=[group],
                freeze=Freeze(network),
                loss=ImageLoss(),
                floats=torch.Tensor.float,
                eval_dataset=rows,
            )
            steps = 100 + math.ceil(arguments.warmup_steps)
            trainer.create_optimizer_and_scheduler(num_training_steps=steps)
            check_schedule(spec, trainer.lr_scheduler, steps - 1)
            check_options(spec, arguments)
        except RecipeError:
            raise
        except Exception as error:  # whatever an integration, an optimizer's or a scheduler's package raises
            raise RecipeError(f"phases.{spec.name}: {first_line(error)}") from error


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
    end_recomputation(model)
    pixels = data.floats(data.train[0]["pixel_values"].unsqueeze(0)).to(model.device)  # (1, C, H, W)
    model = prepare_phase(model, phase.spec, pixels)
    result = PhaseRecord(phase.folder).result
    if result is not None:
        _LOG.info(f"{phase.title}: was finished")
        _reload(model, phase.folder, result)
        return model, result
    finds_batch = phase.spec.arguments.get("auto_find_batch_size")  # on one process: planning refuses it on several
    start = {name: value.cpu().clone() for name, value in model.state_dict().items()} if finds_batch else None
    while True:
        try:
            with synchronised(model, phase.title) if phase.spec.batchnorm == "sync" else nullcontext():
                return _finish(model, phase, data, replay, callbacks)
        except TrainingError as error:
            smaller = _with_half_the_batch(phase.spec)
            if start is None or smaller is None or error.__cause__ is None or not is_out_of_memory(error.__cause__):
                raise
            _LOG.warning(f"{error}; tries that")
        model.load_state_dict(start)
        phase = dataclasses.replace(phase, spec=smaller)


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
        spec = with_rate(model, data, replayed, arguments, phase)
    arguments.learning_rate = spec.arguments.get("learning_rate", arguments.learning_rate)
    plan = plan_phase(model, spec, images=len(data.train), processes=arguments.world_size)
    freeze = Freeze(model, batchnorm=spec.batchnorm)
    trainer = _trainer(model, data, replayed, arguments, groups=plan.groups, freeze=freeze, shards=shards)
    progress = PhaseProgress(title, len(data.train))
    for callback in (*callbacks, progress, FirstSteps(title, plan.groups), *_own_callbacks(spec, folder, title)):
        trainer.add_callback(callback)
    if trainer.is_world_process_zero():
        clear_partial(folder)
        PhaseRecord(folder).write_plan(plan)
    _LOG.info(f"{title}: trains {plan.trains}; {plan.trainable:,} of {plan.total:,} parameters, {plan.steps_in_words}")
    begun = time.monotonic()
    try:
        with (
            failures_explained(title, arguments),
            nullcontext() if replayed is None else replayed.split_point.bypassed(),
            patient(),
        ):
            _train(trainer, newest_checkpoint(folder, is_scaled=bool(trainer.accelerator.scaler)), title)
    finally:
        progress.close()
        model = _released(trainer)
    if shards is not None:
        model = shards.gather_all().to(arguments.device)
    result = _result(trainer, time.monotonic() - begun, dataclasses.asdict(freeze.prove(model)))
    if trainer.is_world_process_zero():
        PhaseRecord(folder).write_result(result)
    meet()
    return model, result


def _with_half_the_batch(spec: PhaseSpec) -> PhaseSpec | None:
    """The phase with smaller forward passes and the same optimizer steps; None where one image is too many."""
    smaller = smaller_batch(
        spec.arguments.get("per_device_train_batch_size", 8), spec.arguments.get("gradient_accumulation_steps", 1)
    )
    return None if smaller is None else dataclasses.replace(spec, arguments={**spec.arguments, **smaller})


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


def _reload(model: Any, folder: Path, result: PhaseResult) -> None:
    problem = damage(folder / result.checkpoint)
    if problem is not None:
        raise TrainingError(
            f"{folder / result.checkpoint}: the weights of this finished phase can't be read ({problem}); remove "
            f"{folder} and the folders of later phases to train them again"
        )
    restore(model, folder / result.checkpoint)


def _trainer(
    model: Any,
    data: PhaseData,
    replayed: ReplayedData | None,
    arguments: TrainingArguments,
    *,
    groups: Sequence[Group],
    freeze: Freeze,
    shards: Shards | None,
) -> PhaseTrainer:
    if replayed is not None:  # rows of a file that is mapped into memory: no work for others
        arguments.dataloader_num_workers, arguments.dataloader_prefetch_factor = 0, None
        arguments.dataloader_persistent_workers, arguments.dataloader_multiprocessing_context = False, None
    if arguments.activation_checkpointing:
        asked: Any = arguments.activation_checkpointing_kwargs
        options, changed = exact_recomputation(asked)
        arguments.activation_checkpointing_kwargs = arguments.gradient_checkpointing_kwargs = options
        if changed:
            _LOG.info(f"activations are computed again with {', '.join(changed)}: the other way changes gradients")
    arguments.report_to = []  # a Trainer's own would begin an experiment for each phase: training/reporting.py
    source: PhaseData | ReplayedData = data if replayed is None else replayed
    loss = data.loss(arguments.label_smoothing_factor)
    if data.is_multi_label:
        arguments.label_smoothing_factor = 0.0  # Trainer's own, which it would warn of; the loss has it
    kind = PhaseTrainer if shards is None else ShardedTrainer
    trainer = kind(
        model,
        arguments,
        groups=groups,
        freeze=freeze,
        loss=loss,
        replayed=replayed,
        floats=data.floats,
        train_dataset=source.train,
        eval_dataset=source.validation,
        data_collator=source.collate,
        compute_metrics=data.measure,
        preprocess_logits_for_metrics=data.reduce,
    )
    trainer.chances = data.chances
    if shards is not None and isinstance(trainer, ShardedTrainer):
        shards.set_up(trainer.accelerator, freeze.names, None if replayed is None else replayed.split_point)
        trainer.shards = shards
    for replaced in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(replaced)
    return trainer


def _train(trainer: PhaseTrainer, unfinished: Path | None, title: str) -> None:
    """Train to the end, from an unfinished checkpoint if there is one; leaves the best weights in the model."""
    if unfinished is None:
        trainer.train()
    else:
        _LOG.info(f"{title}: continues from {unfinished.name}")
        state = TrainerState.load_from_json(str(unfinished / "trainer_state.json"))
        if _was_stopped(state):  # by a callback; Trainer would go on to the next evaluation
            trainer.end_with(state)
        else:
            trainer.train(resume_from_checkpoint=str(unfinished))
    trainer.save_result()


def _was_stopped(state: TrainerState) -> bool:
    """Whether a callback had ended the phase before its last step when the state was saved."""
    callbacks: Any = state.stateful_callbacks
    control = callbacks.get("TrainerControl", {}).get("args", {})
    return bool(control.get("should_training_stop")) and state.global_step < state.max_steps


def _own_callbacks(spec: PhaseSpec, folder: Path, title: str) -> list[TrainerCallback]:
    own = [EpochSetter(), HistoryWriter(PhaseRecord(folder)), Stopper(title)]
    return own if spec.early_stopping is None else [*own, PhaseEarlyStopping(spec.early_stopping)]


def _result(trainer: PhaseTrainer, seconds: float, frozen: dict[str, int]) -> PhaseResult:
    state = trainer.state
    best = state.best_global_step or state.global_step
    logged = [entry for entry in state.log_history if entry.get("step") == best and is_evaluation(entry)]
    left_out = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_loss")
    metrics = {key[5:]: value for key, value in (logged[-1] if logged else {}).items() if key[:5] == "eval_"}
    speed = next((e["train_samples_per_second"] for e in reversed(state.log_history) if "train_runtime" in e), 0.0)
    return PhaseResult(
        checkpoint=f"checkpoint-{best}",
        best_step=best,
        steps=state.global_step,
        metrics={key: value for key, value in metrics.items() if f"eval_{key}" not in left_out},
        seconds=round(seconds, 3),
        images_per_second=speed,
        frozen=frozen,
    )
