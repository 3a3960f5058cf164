"""The keys of a recipe that change no number of the result: an unfinished run continues with other values of them."""

import dataclasses

from hfft.recipe.spec import HubSpec, PhaseSpec, Recipe

# Fields of TrainingArguments: loading of images, logging, what is kept on disk, timeouts.
_NEUTRAL = (
    *("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers"),
    *("dataloader_pin_memory", "dataloader_multiprocessing_context", "per_device_eval_batch_size"),
    *("eval_accumulation_steps", "eval_use_gather_object", "torch_empty_cache_steps", "ddp_timeout"),
    *("save_total_limit", "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node", "logging_strategy"),
    *("logging_first_step", "logging_steps", "skip_memory_metrics", "include_num_input_tokens_seen", "report_to"),
    *("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
)


def without_neutral_keys(recipe: Recipe) -> Recipe:
    """The recipe with the defaults of the keys that don't change the result: place, hub, report, speed.

    Checkpoint and images stay as they are written: whether two names stand for the same can't be seen from the names.
    """
    return dataclasses.replace(
        recipe,
        name="run",
        output_dir=Recipe.output_dir,  # the default
        hub=HubSpec(),
        license=None,
        widget=None,
        report=True,
        replay=dataclasses.replace(recipe.replay, folder=None),
        training={},  # each phase has them
        phases=tuple(_phase(phase) for phase in recipe.phases),
    )


def _phase(phase: PhaseSpec) -> PhaseSpec:
    """`logging_steps` counts where it is the evaluation interval, too."""
    asked = phase.arguments
    counts = {"logging_steps"} if asked.get("eval_strategy") == "steps" and "eval_steps" not in asked else set()
    arguments = {name: value for name, value in asked.items() if name in counts or name not in _NEUTRAL}
    return dataclasses.replace(phase, arguments=arguments, inherited={})
