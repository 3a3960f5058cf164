"""A phase's keys to transformers.TrainingArguments, in which nothing but the recipe has a say."""

import copy
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import patch_environment
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from hfft.errors import RecipeError, first_line
from hfft.recipe.arguments import AUTO, as_mapping
from hfft.recipe.dependencies import PLATEAU
from hfft.recipe.spec import PhaseSpec
from hfft.system.launch import spread_by
from hfft.system.machine import cpus_per_process
from hfft.training.callbacks import HEADLINES

EVAL_BATCH = 32  # images per forward pass and process, where a recipe does not say
_SHARDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")  # others look at whole weights, as Adafactor does
_NOT_SHARDED = {
    "fp16": "its gradient scaler was not tried there; use bf16",
    "torch_compile": "it was not tried there",
}


def training_arguments(
    spec: PhaseSpec, folder: Path, *, seed: int, validate: bool, metric: str = HEADLINES[0]
) -> TrainingArguments:
    """The Trainer's settings for a phase.

    Args:
        spec: The phase.
        folder: Its folder.
        seed: The recipe's seed.
        validate: Whether there are validation images.
        metric: What the phase is judged by, unless it says otherwise.

    Raises:
        RecipeError: If transformers refuses a value or a combination.
    """
    asked = {name: value for name, value in spec.arguments.items() if value != AUTO}
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
    _check_device(spec, has_accelerator=has_accelerator)
    if arguments.lr_scheduler_type in PLATEAU:  # torch's and transformers' own mode is `min`, whatever the metric
        mode = "max" if arguments.greater_is_better else "min"
        arguments.lr_scheduler_kwargs = {"mode": mode, **(as_mapping(arguments.lr_scheduler_kwargs) or {})}
    _check_shardable(spec.name, arguments)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several would be torch's DataParallel, which hfft isn't made for
    return arguments


def _check_device(spec: PhaseSpec, *, has_accelerator: bool) -> None:
    """Refuse what this machine's device would quietly do otherwise."""
    if has_accelerator and spec.arguments.get("use_cpu"):
        raise RecipeError(
            f"phases.{spec.name}.use_cpu: hfft trains on the accelerator that it sees; hide it, as with "
            "CUDA_VISIBLE_DEVICES=''"
        )
    if spec.arguments.get("fp16") and not has_accelerator:
        raise RecipeError(
            f"phases.{spec.name}.fp16: needs a GPU, as accelerate would train in float32 on a CPU without saying so; "
            "bf16: true is for both"
        )


def _check_shardable(phase: str, arguments: TrainingArguments) -> None:
    """Refuse settings that don't go with FSDP, where this launch is under it."""
    where = spread_by()
    if where is None:
        return
    for name, reason in _NOT_SHARDED.items():
        if getattr(arguments, name):
            raise RecipeError(f"phases.{phase}.{name}: not under {where}: {reason}")
    kind = OptimizerNames(arguments.optim).value
    if kind not in _SHARDED_OPTIMIZERS:
        allowed = ", ".join(_SHARDED_OPTIMIZERS)
        raise RecipeError(f"phases.{phase}.optim: found {kind!r}; allowed under {where}: {allowed}")


def check_options(spec: PhaseSpec, arguments: TrainingArguments) -> None:
    """Refuse what a phase says to its optimizer and the optimizer doesn't read: no value of it makes a difference.

    Args:
        spec: The phase.
        arguments: Its settings, of which an optimizer can be made.

    Raises:
        RecipeError: With the option.
    """
    where, optim = f"phases.{spec.name}", OptimizerNames(arguments.optim).value
    options = (arguments.optim_args or "").replace(" ", "").split(",")
    for name in (option.partition("=")[0] for option in options if option):
        if not _is_read(arguments, "optim_args", f"{name}=0", f"{name}=1", None):
            raise RecipeError(f"{where}.optim_args: the optimizer {optim} has no {name}, or takes it from elsewhere")
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        is_for_others = name in spec.inherited and "optim" not in spec.inherited  # phases with another optimizer
        if name in spec.arguments and not is_for_others and not _is_read(arguments, name, 0.25, 0.5):
            raise RecipeError(f"{where}.{name}: the optimizer {optim} doesn't take it; leave it out")


def check_schedule(spec: PhaseSpec, scheduler: Any, step: int) -> None:
    """Refuse values of a schedule's options that are first computed with behind its warm-up, or at an evaluation.

    Args:
        spec: The phase.
        scheduler: Is changed.
        step: One behind the warm-up.

    Raises:
        RecipeError: If one can't be computed with.
    """
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
