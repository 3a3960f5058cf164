"""A phase's keys to transformers.TrainingArguments, in which nothing but the recipe has a say."""

import sys
from pathlib import Path

import torch
from accelerate.utils import patch_environment
from transformers import TrainingArguments

from hfft.errors import RecipeError
from hfft.machine import cpus_per_process
from hfft.recipe.arguments import AUTO
from hfft.recipe.spec import PhaseSpec
from hfft.training.callbacks import HEADLINES
from hfft.training.launched import check_launched
from hfft.training.spreading import check_spreadable

EVAL_BATCH = 32  # images per forward pass and process, where a recipe does not say


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
        RunError: If the launch asks for what the recipe has keys for.
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
    if has_accelerator and asked.get("use_cpu"):
        raise RecipeError(
            f"phases.{spec.name}.use_cpu: hfft trains on the accelerator that it sees; hide it, as with "
            "CUDA_VISIBLE_DEVICES=''"
        )
    try:
        with patch_environment(ACCELERATE_MIXED_PRECISION="no"):  # of the launch, which would count in its place
            arguments = TrainingArguments(**settings)
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"phases.{spec.name}: {str(error).splitlines()[0]}") from error
    check_spreadable(spec.name, arguments)
    check_launched()
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several would be torch's DataParallel, which hfft isn't made for
    return arguments
