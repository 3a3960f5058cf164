"""Which keys of a recipe make another run of it, and which a run may go on with otherwise."""

import dataclasses

from hfft.recipe.spec import HubSpec, PhaseSpec, Recipe

# Fields of TrainingArguments: how images are fetched, what is said and kept, how long is waited.
_NEUTRAL = (
    *("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers"),
    *("dataloader_pin_memory", "dataloader_multiprocessing_context", "per_device_eval_batch_size"),
    *("eval_accumulation_steps", "eval_use_gather_object", "torch_empty_cache_steps", "ddp_timeout"),
    *("save_total_limit", "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node", "logging_strategy"),
    *("logging_first_step", "logging_steps", "skip_memory_metrics", "include_num_input_tokens_seen", "report_to"),
    *("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
)


def what_trains(recipe: Recipe) -> Recipe:
    """The recipe without the keys that change no number of the result.

    Those are where the run lies, where it is pushed to, how it is shown, and how fast it is. Checkpoint and images are
    left as they are written: whether they are the same can't be told from their names.
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
    """The phase with the arguments that count; `logging_steps` do where they say how often it evaluates."""
    asked = phase.arguments
    counts = {"logging_steps"} if asked.get("eval_strategy") == "steps" and "eval_steps" not in asked else set()
    arguments = {name: value for name, value in asked.items() if name in counts or name not in _NEUTRAL}
    return dataclasses.replace(phase, arguments=arguments, inherited={})
