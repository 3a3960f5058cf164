"""Which fields transformers.TrainingArguments has, of which types, and which values of them hfft takes."""

import ast
import importlib.util
import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

_METRICS, _BATCHES = "hfft computes the metrics", "hfft makes the batches"
_FSDP = "start hfft with `accelerate launch --config_file recipes/accelerate/fsdp2.yaml`"

# Fields that hfft sets itself; each with what to do instead.
OWNED = {
    "output_dir": "set the recipe's own output_dir; every phase writes into the run folder",
    **dict.fromkeys(("seed", "data_seed"), "set the recipe's own seed"),
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
    **dict.fromkeys(("remove_unused_columns", "label_names"), _BATCHES),
    **dict.fromkeys(("include_for_metrics", "prediction_loss_only", "batch_eval_metrics"), _METRICS),
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
    **dict.fromkeys(("fsdp", "fsdp_config"), _FSDP),
    "deepspeed": "DeepSpeed is not supported; FSDP 2 is: use recipes/accelerate/fsdp2.yaml",
    "local_rank": "start hfft with `accelerate launch`",
}
# Values of a field, or of a key of it: what is allowed in words, and whether a value is.
_Rule = tuple[str, Callable[[Any], bool]]
_POSITIVE: _Rule = ("a number above 0", lambda value: 0 < value < math.inf)
_NOT_NEGATIVE: _Rule = ("0 or a number above it", lambda value: 0 <= value < math.inf)
_BELOW_1: _Rule = ("a number from 0 to 1, without 1", lambda value: 0 <= value < 1)
_SWITCH: _Rule = ("true or false", lambda value: isinstance(value, bool))


def _one_of(*allowed: Any, why: str = "") -> _Rule:
    """A rule that takes some values only, as others would do nothing, or fail in the middle of a run."""
    words = " or ".join(map(str, allowed)) if len(allowed) < 3 else ", ".join(map(str, allowed))
    reason = f", as {why}" if why else ""
    return (words or "nothing, leave it out") + reason, lambda value: any(_is_same(value, one) for one in allowed)


def _is_same(value: Any, other: Any) -> bool:
    """Equal, and neither 1 for true nor 0 for false."""
    return value is other or (value == other and not isinstance(value, bool))


_LEVELS = _one_of("detail", "debug", "info", "warning", "error", "critical", "passive")
_LANGUAGE, _OWN_PRECISION = "it is for language models", "phases are validated in the precision that they train in"
# What TrainingArguments lets pass, and what then fails in the middle of a run, or quietly does nothing.
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("learning_rate", "adam_epsilon", "num_train_epochs", "eval_steps", "logging_steps"), _POSITIVE),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _POSITIVE),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps", "save_total_limit"), _POSITIVE),
    **dict.fromkeys(("dataloader_prefetch_factor", "ddp_bucket_cap_mb", "ddp_timeout"), _POSITIVE),
    **dict.fromkeys(("max_grad_norm", "eval_delay", "weight_decay", "dataloader_num_workers"), _NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), _BELOW_1),
    "max_steps": ("a number above 0, or -1 for none", lambda value: value > 0 or value == -1),
    "label_smoothing_factor": ("a number from 0 to 1", lambda value: 0 <= value <= 1),
    **dict.fromkeys(("log_level", "log_level_replica"), _LEVELS),
    "dataloader_multiprocessing_context": _one_of("fork", "spawn", "forkserver"),
    "torch_compile_mode": _one_of("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    "optim_target_modules": _one_of(why="it is for optimizers that choose their parameters, which hfft has none of"),
    "use_liger_kernel": _one_of(False, why=_LANGUAGE),
    "liger_kernel_config": _one_of(why=_LANGUAGE),
    "neftune_noise_alpha": _one_of(why=f"{_LANGUAGE}; data.augment changes images"),
    "use_cache": _one_of(False, why=_LANGUAGE),
    "include_num_input_tokens_seen": _one_of("no", False, why="images have no tokens to count"),
    "length_column_name": _one_of("length", why="images aren't sorted by length"),
    "parallelism_config": _one_of(why="processes share images, and weights by FSDP 2 alone (docs/scaling.md)"),
    "eval_do_concat_batches": _one_of(True, why="the metrics are those of all validation images at once"),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), _one_of(False, why=_OWN_PRECISION)),
    "enable_jit_checkpoint": _one_of(False, why="a run saves at SIGTERM without it"),
    "debug": _one_of("", [], "underflow_overflow", ["underflow_overflow"]),
    "ddp_backend": _one_of(why="processes talk by NCCL on GPUs and by gloo on CPUs"),
}
_DEALT = "hfft deals the images and counts the steps itself"
_ACCELERATOR: dict[str, _Rule] = {
    "split_batches": _one_of(False, why=_DEALT),
    "dispatch_batches": _one_of(None, False, why=_DEALT),
    "even_batches": _one_of(True, why=_DEALT),
    "use_seedable_sampler": _SWITCH,
    "use_configured_state": _one_of(False, why=_DEALT),
    "gradient_accumulation_kwargs": _one_of(None, {}, why=_DEALT),
    "non_blocking": _SWITCH,
}
# Keys of torch.utils.checkpoint, and transformers' own two, read in 5.24; others fail in the first step.
_CHECKPOINTING: dict[str, _Rule] = {
    **dict.fromkeys(("use_reentrant", "preserve_rng_state", "early_stop", "debug", "offload"), _SWITCH),
    "determinism_check": _one_of("default", "none"),
    "every_n_layers": ("a whole number above 0", lambda value: type(value) is int and value > 0),
}
_KEYS = {
    "accelerator_config": _ACCELERATOR,
    "activation_checkpointing_kwargs": _CHECKPOINTING,
    "gradient_checkpointing_kwargs": _CHECKPOINTING,
}
# Optimizers that choose their parameters among all of the network's, where a phase has groups with rates of their own.
_CHOOSING = ("galore_", "apollo_", "lomo", "adalomo")
_SET_BY_GROUP = {"lr": "learning_rate", "weight_decay": "weight_decay"}


@cache
def training_argument_types() -> dict[str, Any]:
    """Field name to type, of the installed transformers.TrainingArguments.

    The class is read as text: importing it imports torch, which takes seconds that a wrong recipe needn't wait for.
    What isn't made of JSON types is `str` if it may be one, else typing.Any, and checked by the class itself later.
    """
    package = importlib.util.find_spec("transformers")
    assert package is not None  # a dependency
    tree = ast.parse(Path(str(package.origin)).with_name("training_args.py").read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    fields = [node for node in body if isinstance(node, ast.AnnAssign)]
    return {ast.unparse(node.target): _plain_type(ast.unparse(node.annotation)) for node in fields}


def _plain_type(annotation: str) -> Any:
    try:
        return eval(annotation, {"Any": Any, "Literal": Literal})
    except NameError:  # SchedulerType | str
        return str if annotation.endswith("| str") else Any


def argument_problem(name: str, value: Any) -> str | None:
    """What is wrong with the value of a TrainingArguments field, or None."""
    if name == "learning_rate" and value == "auto":
        return "found 'auto'; allowed: a number above 0; a head is found without a rate by `solver: lbfgs`"
    if name in OWNED:
        return f"hfft sets this field itself: {OWNED[name]}"
    try:
        TypeAdapter(training_argument_types()[name]).validate_python(value, strict=True)
    except ValidationError as error:
        wanted = dict.fromkeys(problem["msg"].removeprefix("Input should be ") for problem in error.errors())
        return f"found {value!r}; allowed: {' or '.join(wanted)}"
    if value is None:
        return None
    if name in _KEYS:
        return _keys_problem(name, value)
    if name == "optim" and value.startswith(_CHOOSING):
        return f"found {value!r}, which chooses its parameters itself; allowed: optimizers that take groups of them"
    if name == "optim_args":
        return _options_problem(value)
    return _rule_problem(_RULES[name], value) if name in _RULES else None


def as_mapping(value: Any) -> dict[str, Any] | None:
    """A field that is a mapping, or JSON text of one as transformers takes it; None if it is something else."""
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, dict) else None


def _rule_problem(rule: _Rule, value: Any) -> str | None:
    allowed, is_allowed = rule
    return None if is_allowed(value) else f"found {value!r}; allowed: {allowed}"


def _keys_problem(name: str, value: Any) -> str | None:
    found, rules = as_mapping(value), _KEYS[name]
    if found is None:
        return f"found {value!r}; allowed: keys with values, written here, so that the run's recipe holds them"
    for key, one in found.items():
        if key not in rules:
            return f"{key}: unknown key; allowed: {', '.join(rules)}"
        if (problem := _rule_problem(rules[key], one)) is not None:
            return f"{key}: {problem}"
    return None


def _options_problem(value: str) -> str | None:
    for option in filter(None, value.replace(" ", "").split(",")):
        key, equals, text = option.partition("=")
        if not key or not equals or not text or "=" in text:
            return f"found {option!r}; allowed: name=value, name=value"
        if key in _SET_BY_GROUP:
            return f"found {option!r}; set {_SET_BY_GROUP[key]} itself, which counts for each parameter"
    return None
