"""Which fields transformers.TrainingArguments has, and of which types, read without importing transformers."""

import ast
import importlib.util
import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

AUTO = "auto"  # a head phase's learning rate: found by trying many

# Fields that hfft sets itself; each with what to do instead.
OWNED = {
    "output_dir": "set the recipe's own output_dir; every phase writes into the run folder",
    "seed": "set the recipe's own seed",
    "data_seed": "set the recipe's own seed",
    "do_train": "a recipe always trains",
    "do_eval": "set data.splits.validation",
    "do_predict": "set data.splits.test",
    "resume_from_checkpoint": "run the same command again to continue a run",
    "restore_callback_states_from_checkpoint": "a continued run always restores them",
    "ignore_data_skip": "a continued run always sees the images it has not seen yet",
    "save_strategy": "a checkpoint is saved at each evaluation: set eval_strategy",
    "save_steps": "a checkpoint is saved at each evaluation: set eval_steps",
    "save_only_model": "a run that can be continued needs the optimizer",
    "load_best_model_at_end": "every phase ends with its best weights",
    "remove_unused_columns": "hfft makes the batches",
    "label_names": "hfft makes the batches",
    "include_for_metrics": "hfft computes the metrics",
    "prediction_loss_only": "hfft computes the metrics",
    "batch_eval_metrics": "hfft computes the metrics",
    "train_sampling_strategy": "images are shuffled by the recipe's seed",
    "push_to_hub": "set hub.repo_id, or run `hfft push`",
    "hub_model_id": "set hub.repo_id",
    "hub_strategy": "set hub.hub_strategy",
    "hub_private_repo": "set hub.private",
    "hub_revision": "set hub.revision",
    "hub_always_push": "with hub.hub_strategy every_save, a push begins where none is under way",
    "hub_token": "a recipe never holds a secret: use `hf auth login` or HF_TOKEN",
    "logging_nan_inf_filter": "a loss that is no number ends the phase",
    "save_on_each_node": "checkpoints are saved once, in the run folder",
    "fsdp": "start hfft with `accelerate launch --config_file recipes/accelerate/fsdp2.yaml`",
    "fsdp_config": "start hfft with `accelerate launch --config_file recipes/accelerate/fsdp2.yaml`",
    "deepspeed": "DeepSpeed is not supported; FSDP 2 is: use recipes/accelerate/fsdp2.yaml",
    "local_rank": "start hfft with `accelerate launch`",
}
# What TrainingArguments lets pass, and what then fails in the middle of a run, or quietly does nothing.
_POSITIVE = ("a number above 0", lambda value: 0 < value < math.inf)
_NOT_NEGATIVE = ("0 or a number above it", lambda value: 0 <= value < math.inf)
_SHARE = ("a number from 0 to 1, without 1", lambda value: 0 <= value < 1)
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "learning_rate": _POSITIVE,
    "max_steps": ("a number above 0, or -1 for none", lambda value: value > 0 or value == -1),
    "max_grad_norm": _NOT_NEGATIVE,
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": _POSITIVE,
    "eval_delay": _NOT_NEGATIVE,
    "save_total_limit": _POSITIVE,
    "dataloader_prefetch_factor": _POSITIVE,
    "ddp_bucket_cap_mb": _POSITIVE,
    "ddp_timeout": _POSITIVE,
    "num_train_epochs": _POSITIVE,
    "per_device_train_batch_size": _POSITIVE,
    "per_device_eval_batch_size": _POSITIVE,
    "gradient_accumulation_steps": _POSITIVE,
    "eval_accumulation_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "logging_steps": _POSITIVE,
    "weight_decay": _NOT_NEGATIVE,
    "dataloader_num_workers": _NOT_NEGATIVE,
    "label_smoothing_factor": ("a number from 0 to 1", lambda value: 0 <= value <= 1),
}
_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
_LANGUAGE = "it is for language models"
# Values that are allowed of a field, and why others aren't: they would do nothing, or fail in the middle of a run.
_CHOICES: dict[str, tuple[tuple[Any, ...], str]] = {
    "log_level": (_LEVELS, ""),
    "log_level_replica": (_LEVELS, ""),
    "dataloader_multiprocessing_context": (("fork", "spawn", "forkserver"), ""),
    "torch_compile_mode": (("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"), ""),
    "optim_target_modules": ((), "it is for optimizers that choose their parameters, which hfft has none of"),
    "use_liger_kernel": ((False,), _LANGUAGE),
    "liger_kernel_config": ((), _LANGUAGE),
    "neftune_noise_alpha": ((), f"{_LANGUAGE}; data.augment changes images"),
    "use_cache": ((False,), _LANGUAGE),
    "include_num_input_tokens_seen": (("no", False), "images have no tokens to count"),
    "length_column_name": (("length",), "images aren't sorted by length"),
    "parallelism_config": ((), "processes share images, and weights by FSDP 2 alone (docs/scaling.md)"),
    "eval_do_concat_batches": ((True,), "the metrics are those of all validation images at once"),
    "bf16_full_eval": ((False,), "phases are validated in the precision that they train in"),
    "fp16_full_eval": ((False,), "phases are validated in the precision that they train in"),
    "enable_jit_checkpoint": ((False,), "a run saves at SIGTERM without it"),
    "debug": (("", [], "underflow_overflow", ["underflow_overflow"]), ""),
    "ddp_backend": ((), "processes talk by NCCL on GPUs and by gloo on CPUs"),
}
# Keys of accelerator_config, likewise.
_ACCELERATOR: dict[str, tuple[Any, ...]] = {
    "split_batches": (False,),
    "dispatch_batches": (None, False),
    "even_batches": (True,),
    "use_seedable_sampler": (True, False),
    "use_configured_state": (False,),
    "gradient_accumulation_kwargs": (None, {}),
    "non_blocking": (True, False),
}
_SWITCH = ("true or false", lambda value: isinstance(value, bool))
# Keys of torch.utils.checkpoint, and transformers' own two, read in 5.24; others fail in the first step.
_CHECKPOINTING: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "use_reentrant": _SWITCH,
    "preserve_rng_state": _SWITCH,
    "determinism_check": ("default or none", lambda value: value in ("default", "none")),
    "early_stop": _SWITCH,
    "debug": _SWITCH,
    "every_n_layers": ("a whole number above 0", lambda value: type(value) is int and value > 0),
    "offload": _SWITCH,
}
# Optimizers that choose their parameters among all of the network's, where a phase has groups with rates of their own.
_CHOOSING = ("galore_", "apollo_", "lomo", "adalomo")
_SET_BY_GROUP = {"lr": "learning_rate", "weight_decay": "weight_decay"}
_PLAIN = {"int", "float", "str", "bool", "dict", "list", "None", "Any", "Literal"}


@cache
def training_argument_types() -> dict[str, Any]:
    """The type of every field of the installed transformers.TrainingArguments.

    The class is read as text: importing it would import torch, which takes seconds. Types that are not made of
    plain JSON types (enumerations, plugin objects) are typing.Any here and checked by the class itself later.

    Returns:
        Field name to type.
    """
    package = importlib.util.find_spec("transformers")
    if package is None or not package.submodule_search_locations:
        raise ImportError("hfft needs the package transformers: pip install transformers")
    tree = ast.parse((Path(package.submodule_search_locations[0]) / "training_args.py").read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    return {
        node.target.id: _plain_type(node.annotation)
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def argument_problem(name: str, value: Any) -> str | None:
    """What is wrong with the value of a TrainingArguments field, or None.

    Args:
        name: A field of TrainingArguments.
        value: Value from a recipe.
    """
    if name == "learning_rate" and value == AUTO:
        return None
    if name in OWNED:
        return f"hfft sets this field itself: {OWNED[name]}"
    try:
        TypeAdapter(training_argument_types()[name]).validate_python(value, strict=True)
    except ValidationError as error:
        wanted = " or ".join(
            dict.fromkeys(problem["msg"].removeprefix("Input should be ") for problem in error.errors())
        )
        return f"found {value!r}; allowed: {wanted}"
    if value is None:
        return None
    if name in _RANGES:
        allowed, fits = _RANGES[name]
        return None if fits(value) else f"found {value!r}; allowed: {allowed}"
    if name in _CHOICES:
        return _choice_problem(value, *_CHOICES[name])
    return _CHECKS[name](value) if name in _CHECKS else None


def as_mapping(value: Any) -> dict[str, Any] | None:
    """A field that is a mapping, or JSON text of one as transformers takes it; None if it is something else."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, dict) else None


def _choice_problem(value: Any, allowed: tuple[Any, ...], reason: str) -> str | None:
    if any(value is one or (value == one and not isinstance(value, bool)) for one in allowed):
        return None
    words = ", ".join(map(str, allowed)) or "nothing, leave it out"
    return f"found {value!r}; allowed: {words}" + (f", as {reason}" if reason else "")


def _accelerator_problem(value: Any) -> str | None:
    found = as_mapping(value)
    if found is None:
        return f"found {value!r}; allowed: keys with values, written here, so that the run's recipe holds them"
    for key, one in found.items():
        if key not in _ACCELERATOR:
            return f"{key}: unknown key; allowed: {', '.join(_ACCELERATOR)}"
        if one not in _ACCELERATOR[key]:
            allowed = " or ".join(map(str, _ACCELERATOR[key]))
            return f"{key}: found {one!r}; allowed: {allowed}, as hfft deals the images and counts the steps itself"
    return None


def _optimizer_problem(value: Any) -> str | None:
    if not str(value).startswith(_CHOOSING):
        return None
    return f"found {value!r}, which chooses its parameters itself; allowed: optimizers that take groups of parameters"


def _options_problem(value: str) -> str | None:
    for option in filter(None, value.replace(" ", "").split(",")):
        key, equals, text = option.partition("=")
        if not key or not equals or not text or "=" in text:
            return f"found {option!r}; allowed: name=value, name=value"
        if key in _SET_BY_GROUP:
            return f"found {option!r}; set {_SET_BY_GROUP[key]} itself, which counts for each parameter"
    return None


def _checkpointing_problem(value: Any) -> str | None:
    for key, one in (as_mapping(value) or {}).items():
        if key not in _CHECKPOINTING:
            return f"{key}: unknown key; allowed: {', '.join(_CHECKPOINTING)}"
        allowed, fits = _CHECKPOINTING[key]
        if not fits(one):
            return f"{key}: found {one!r}; allowed: {allowed}"
    return None


_CHECKS: dict[str, Callable[[Any], str | None]] = {
    "accelerator_config": _accelerator_problem,
    "activation_checkpointing_kwargs": _checkpointing_problem,
    "gradient_checkpointing_kwargs": _checkpointing_problem,
    "optim": _optimizer_problem,
    "optim_args": _options_problem,
}


def _plain_type(annotation: ast.expr) -> Any:
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    if "str" in names and any(name.endswith(("Strategy", "Type", "Names")) for name in names):
        return str
    if not names <= _PLAIN:
        return Any
    from typing import Literal

    return eval(ast.unparse(annotation), {"__builtins__": {}}, {**_builtins(), "Any": Any, "Literal": Literal})


def _builtins() -> dict[str, type]:
    return {"int": int, "float": float, "str": str, "bool": bool, "dict": dict, "list": list}
