"""Which fields transformers.TrainingArguments has, and of which types, read without importing transformers."""

import ast
import importlib.util
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
    "deepspeed": "start hfft with `accelerate launch --config_file recipes/accelerate/deepspeed_zero2.yaml`",
    "local_rank": "start hfft with `accelerate launch`",
}
# What TrainingArguments lets pass, and what then fails in the middle of a run, or quietly does nothing.
_POSITIVE = ("a number above 0", lambda value: 0 < value < math.inf)
_NOT_NEGATIVE = ("0 or a number above it", lambda value: 0 <= value < math.inf)
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "learning_rate": _POSITIVE,
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
    if value is None or name not in _RANGES:
        return None
    allowed, fits = _RANGES[name]
    return None if fits(value) else f"found {value!r}; allowed: {allowed}"


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
