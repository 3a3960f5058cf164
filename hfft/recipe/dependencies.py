"""Fields of TrainingArguments that have an effect with certain others only, or that others contradict."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hfft.recipe.arguments import as_mapping
from hfft.recipe.spec import PhaseSpec, Recipe

Arguments = Mapping[str, Any]
PLATEAU = ("reduce_lr_on_plateau", "greedy")
"""Schedules that follow a validation metric; they have no warm-up."""
_GREEDY_FLOOR = 1e-3  # GreedyLR's own min_lr, read in transformers 5.24
_DEFAULT_RATE = 5e-5


@dataclass(frozen=True)
class _Need:
    """What a field needs to count at all.

    Attributes:
        field: Its name.
        is_met: Whether a phase's arguments have it.
        asks: What to set, in words.
        idle: Values that ask for nothing.
    """

    field: str
    is_met: Callable[[Arguments], bool]
    asks: str
    idle: tuple[Any, ...] = (None, "", 0)


def _schedule(arguments: Arguments) -> str:
    return str(arguments.get("lr_scheduler_type") or "linear")


def warms_up(arguments: Arguments) -> bool:
    """Whether a phase's schedule has a warm-up, if it is asked for steps of it."""
    return _schedule(arguments) not in ("constant", *PLATEAU)


def _reports(arguments: Arguments) -> bool:
    report_to = arguments.get("report_to") or ()
    return bool({"trackio", "all"} & set([report_to] if isinstance(report_to, str) else report_to))


def _checkpoints(arguments: Arguments) -> bool:
    return bool(arguments.get("activation_checkpointing") or arguments.get("gradient_checkpointing"))


def _has_workers(arguments: Arguments) -> bool:
    return arguments.get("dataloader_num_workers") != 0


_NEEDS = (
    _Need("eval_steps", lambda found: found.get("eval_strategy") == "steps", "eval_strategy: steps"),
    _Need("warmup_steps", warms_up, "an lr_scheduler_type that warms up, such as constant_with_warmup"),
    _Need(
        "lr_scheduler_kwargs",
        lambda found: _schedule(found) not in ("constant", "constant_with_warmup"),
        "an lr_scheduler_type that takes some",
        idle=(None, "", {}),
    ),
    _Need("activation_checkpointing_kwargs", _checkpoints, "activation_checkpointing: true", idle=(None, "", {})),
    _Need("gradient_checkpointing_kwargs", _checkpoints, "gradient_checkpointing: true", idle=(None, "", {})),
    _Need("dataloader_multiprocessing_context", _has_workers, "dataloader_num_workers above 0"),
    _Need("project", _reports, "report_to: trackio", idle=(None, "huggingface")),
    _Need("trackio_space_id", _reports, "report_to: trackio"),
    _Need("trackio_bucket_id", _reports, "report_to: trackio"),
    _Need("trackio_static_space_id", _reports, "report_to: trackio", idle=(None, False)),
)


def dependency_problems(recipe: Recipe) -> list[str]:
    """Every field that counts in no phase that has it, and every contradiction among a phase's fields."""
    problems = []
    for need in _NEEDS:
        having = [phase for phase in recipe.phases if phase.arguments.get(need.field) not in need.idle]
        lacking = [phase for phase in having if not need.is_met(phase.arguments)]
        where = [f"phases.{phase.name}" for phase in lacking if need.field not in phase.inherited]
        if len(lacking) == len(having) and len(where) < len(lacking):  # what all phases share, and none can use
            where.insert(0, "training")
        problem = f"{need.field}: counts with {need.asks} only; set that, or leave it out"
        problems += [f"{section}.{problem}" for section in where]
    for phase in recipe.phases:
        problems += [f"phases.{phase.name}.{problem}" for problem in _phase_problems(phase)]
    return problems


def is_greater_better(arguments: Arguments) -> bool:
    """The direction of the metric that a phase is judged by: what it says, or else as transformers 5.24 has it."""
    asked = arguments.get("greater_is_better")
    return not str(arguments.get("metric_for_best_model") or "accuracy").endswith("loss") if asked is None else asked


def _phase_problems(phase: PhaseSpec) -> list[str]:
    """What a phase's own fields say against each other."""
    found, problems = phase.arguments, []
    options = as_mapping(found.get("lr_scheduler_kwargs")) or {}
    if _schedule(found) not in PLATEAU:
        return problems
    metric = found.get("metric_for_best_model") or "the metric that phases are judged by"
    mode, better = ("max", "greater") if is_greater_better(found) else ("min", "smaller")
    if options.get("mode", mode) != mode:
        problems.append(f"lr_scheduler_kwargs.mode: found {options['mode']!r}, and {metric} is better when {better}")
    rate, floor = found.get("learning_rate", _DEFAULT_RATE), options.get("min_lr", _GREEDY_FLOOR)
    numbers = isinstance(rate, int | float) and isinstance(floor, int | float)
    if _schedule(found) == "greedy" and numbers and rate <= floor:
        problems.append(
            f"lr_scheduler_kwargs.min_lr: the learning rate {rate:g} could never fall, as greedy's smallest is "
            f"{floor:g}; set min_lr below it"
        )
    return problems
