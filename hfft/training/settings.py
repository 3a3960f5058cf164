"""A phase's keys to transformers.TrainingArguments, in which nothing but the recipe has a say; tried before a run."""

import copy
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import patch_environment
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from hfft.errors import ModelError, RecipeError, first_line
from hfft.model.freezing import Freeze
from hfft.recipe.arguments import as_mapping
from hfft.recipe.contradictions import PLATEAU
from hfft.recipe.spec import PhaseSpec
from hfft.runs.record import Group
from hfft.system.launch import spread_by
from hfft.system.machine import cpus_per_process
from hfft.training.callbacks import HEADLINES
from hfft.training.losses import ImageLoss
from hfft.training.trainer import PhaseTrainer

EVAL_BATCH = 32  # images per forward pass and process, where a recipe does not say
_SHARDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")  # others look at whole weights, as Adafactor does
_NOT_SHARDED = {
    "fp16": "its gradient scaler was not tried there; use bf16",
    "torch_compile": "it was not tried there",
}
_CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
# Options of torch.utils.checkpoint: the reentrant variant gives no gradient where what enters a block has none, as
# behind a frozen front; without the state of the random generator, dropout differs when a block is computed again.
_EXACT = {"use_reentrant": False, "preserve_rng_state": True}

_LOG = get_logger(__name__)


def training_arguments(
    spec: PhaseSpec, folder: Path, *, seed: int, validate: bool, metric: str = HEADLINES[0]
) -> TrainingArguments:
    """The Trainer's settings for a phase.

    Args:
        spec: The phase.
        folder: Its folder.
        seed: The recipe's.
        validate: Whether there are validation images.
        metric: What the phase is judged by, unless it says otherwise.

    Raises:
        RecipeError: If transformers refuses a value or a combination, or this machine can't do what is asked.
    """
    asked = spec.arguments
    strategy = asked.get("eval_strategy", "epoch") if validate else "no"
    has_accelerator = torch.accelerator.is_available()
    settings = {
        "metric_for_best_model": metric,
        "per_device_eval_batch_size": EVAL_BATCH,
        "save_total_limit": 1,
        "logging_steps": 50,
        "report_to": "none",
        "disable_tqdm": not sys.stderr.isatty(),
        "dataloader_num_workers": min(cpus_per_process(), 8),
        "dataloader_pin_memory": has_accelerator,
        **asked,
        "use_cpu": not has_accelerator,
        "output_dir": str(folder),
        "seed": seed,
        "eval_strategy": strategy,
        "save_strategy": strategy if strategy != "no" else "epoch",
        "load_best_model_at_end": strategy != "no",
        "restore_callback_states_from_checkpoint": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "logging_nan_inf_filter": False,  # such a loss ends the phase
        "auto_find_batch_size": False,  # of the Trainer, whose schedule it changes
        "ddp_find_unused_parameters": asked.get("ddp_find_unused_parameters", False),
    }
    if strategy == "steps":
        settings["save_steps"] = settings["eval_steps"] = asked.get("eval_steps", settings["logging_steps"])
    try:
        with patch_environment(ACCELERATE_MIXED_PRECISION="no"):  # of the launch, which would count in its place
            arguments = TrainingArguments(**settings)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"phases.{spec.name}: {first_line(error)}") from error
    _check_machine(spec, arguments, has_accelerator=has_accelerator)
    if arguments.lr_scheduler_type in PLATEAU:  # torch's and transformers' own mode is `min`, whatever the metric
        mode = "max" if arguments.greater_is_better else "min"
        arguments.lr_scheduler_kwargs = {"mode": mode, **(as_mapping(arguments.lr_scheduler_kwargs) or {})}
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several would be torch's DataParallel, which hfft isn't made for
    return arguments


def try_arguments(spec: PhaseSpec, *, seed: int, validate: bool) -> None:
    """Make a Trainer, an optimizer and a schedule with a phase's settings, around a network of one weight.

    Raises:
        RecipeError: If that fails; much is refused by the Trainer only, or by a package that is not installed.
    """
    with TemporaryDirectory() as scratch:
        arguments = training_arguments(spec, Path(scratch), seed=seed, validate=validate)
        arguments.label_smoothing_factor = 0.0  # which Trainer asks a network's config for
        network = torch.nn.Linear(1, 1)
        try:
            trainer = PhaseTrainer(
                network,
                arguments,
                groups=[Group("head", ("weight", "bias"), arguments.learning_rate, arguments.weight_decay)],
                freeze=Freeze(network),
                loss=ImageLoss(),
                floats=torch.Tensor.float,
                eval_dataset=Dataset.from_dict({"label": [0]}),
            )
            steps = 100 + math.ceil(arguments.warmup_steps)
            trainer.create_optimizer_and_scheduler(num_training_steps=steps)
            _check_schedule(spec, trainer.lr_scheduler, steps - 1)
            _check_optimizer_options(spec, arguments)
        except RecipeError:
            raise
        except Exception as error:  # whatever an integration, an optimizer's or a scheduler's package raises
            raise RecipeError(f"phases.{spec.name}: {first_line(error)}") from error


def check_activation_checkpointing(network: Any, arguments: Mapping[str, Any]) -> None:
    """Switch activation checkpointing on in a network where a phase's arguments ask for it.

    Raises:
        ModelError: If its architecture can't.
    """
    asked = next((name for name in _CHECKPOINTING if arguments.get(name)), None)
    if asked is None:
        return
    enable = getattr(network, "activation_checkpointing_enable", network.gradient_checkpointing_enable)
    try:
        enable()
    except (ValueError, AssertionError, NotImplementedError, AttributeError) as error:
        raise ModelError(
            f"{asked}: the architecture {network.config.model_type} can't ({first_line(error).rstrip('.')}); leave it "
            "out, and take a smaller batch with gradient_accumulation_steps where memory is short"
        ) from error


def end_activation_checkpointing(network: Any) -> None:
    """Undo what an earlier phase's Trainer has switched on in a plain network."""
    if getattr(network, "supports_gradient_checkpointing", False):
        getattr(network, "activation_checkpointing_disable", network.gradient_checkpointing_disable)()


def make_checkpointing_exact(arguments: TrainingArguments) -> None:
    """Set back options of activation checkpointing that would change a gradient, and log that."""
    if not arguments.activation_checkpointing:
        return
    asked: Any = arguments.activation_checkpointing_kwargs
    options = dict(asked or {})
    changed = [f"{key}: {str(value).lower()}" for key, value in _EXACT.items() if options.get(key, value) != value]
    if changed:
        _LOG.info(f"activations are computed again with {', '.join(changed)}: the other way changes gradients")
    options |= _EXACT
    arguments.activation_checkpointing_kwargs = arguments.gradient_checkpointing_kwargs = options


def _check_machine(spec: PhaseSpec, arguments: TrainingArguments, *, has_accelerator: bool) -> None:
    """Refuse what this machine's device would quietly do otherwise, and under FSDP what that can't."""
    where, sharded = f"phases.{spec.name}", spread_by()
    if has_accelerator and spec.arguments.get("use_cpu"):
        advice = "hide it, as with CUDA_VISIBLE_DEVICES=''"
        raise RecipeError(f"{where}.use_cpu: hfft trains on the accelerator that it sees; {advice}")
    if spec.arguments.get("fp16") and not has_accelerator:
        why = "accelerate would train in float32 on a CPU without saying so"
        raise RecipeError(f"{where}.fp16: needs a GPU, as {why}; bf16: true is for both")
    if sharded is None:
        return
    if spec.solver == "lbfgs":
        raise RecipeError(f"{where}.solver: lbfgs is not under {sharded}; set solver: steps")
    if spec.average is not None:
        raise RecipeError(f"{where}.average: not under {sharded}: no process holds all weights; leave it out")
    for name, reason in _NOT_SHARDED.items():
        if getattr(arguments, name):
            raise RecipeError(f"{where}.{name}: not under {sharded}: {reason}")
    kind = OptimizerNames(arguments.optim).value
    if kind not in _SHARDED_OPTIMIZERS:
        allowed = ", ".join(_SHARDED_OPTIMIZERS)
        raise RecipeError(f"{where}.optim: found {kind!r}; allowed under {sharded}: {allowed}")


def _check_optimizer_options(spec: PhaseSpec, arguments: TrainingArguments) -> None:
    """Refuse options that the phase's optimizer doesn't read: no value of them makes a difference."""
    where, optim = f"phases.{spec.name}", OptimizerNames(arguments.optim).value
    options = (arguments.optim_args or "").replace(" ", "").split(",")
    for name in (option.partition("=")[0] for option in options if option):
        if not _is_read(arguments, "optim_args", f"{name}=0", f"{name}=1", None):
            raise RecipeError(f"{where}.optim_args: the optimizer {optim} has no {name}, or takes it from elsewhere")
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        is_for_others = name in spec.inherited and "optim" not in spec.inherited  # phases with another optimizer
        if name in spec.arguments and not is_for_others and not _is_read(arguments, name, 0.25, 0.5):
            raise RecipeError(f"{where}.{name}: the optimizer {optim} doesn't take it; leave it out")


def _check_schedule(spec: PhaseSpec, scheduler: Any, step: int) -> None:
    """Refuse schedule options that fail when they are first computed with: after the warm-up, or at an evaluation."""
    rates = getattr(scheduler, "lr_lambdas", None)
    try:
        if rates is None:  # it follows a metric
            scheduler.step(0.5)
        else:
            rates[0](step)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise RecipeError(f"phases.{spec.name}.lr_scheduler_kwargs: {error}") from error


def _is_read(arguments: TrainingArguments, name: str, *values: Any) -> bool:
    """Whether the optimizer is another one, or can't be made, with some of these values of a setting."""
    found: list[Any] = []
    for value in values:
        trial = copy.copy(arguments)
        setattr(trial, name, value)
        try:
            found.append(Trainer.get_optimizer_cls_and_kwargs(trial))
        except (ValueError, TypeError, AttributeError):  # a value of another type than the optimizer's
            return True
    return any(one != found[0] for one in found)
