"""Contradictions between the keys of a recipe that are each valid by themselves."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hfft.recipe.arguments import as_mapping
from hfft.recipe.spec import STEPPING, HubSpec, PhaseSpec, Recipe, SplitSpec

Arguments = Mapping[str, Any]
PLATEAU = ("reduce_lr_on_plateau", "greedy")
"""Schedules that follow a validation metric; they have no warm-up."""
_GREEDY_FLOOR = 1e-3  # GreedyLR's own min_lr, read in transformers 5.24
_DEFAULT_RATE = 5e-5
_POLICIES = ("randaugment", "trivialaugment", "augmix")  # each chooses operations for an image
_UNUSED = {"ia3": ("r", "lora_alpha", "lora_dropout"), "vera": ("lora_alpha", "lora_dropout")}


def contradictions(recipe: Recipe) -> list[str]:
    """Every contradiction of a recipe, each with the path of a key that it is about."""
    names = [phase.name for phase in recipe.phases]
    twice = dict.fromkeys(name for name in names if names.count(name) > 1)
    splits = recipe.data.splits
    fractions = [value for value in (splits.validation, splits.test) if isinstance(value, float)]
    policies = [name for name in _POLICIES if getattr(recipe.data.augment, name) not in (None, False)]
    several = f"data.augment: found {' and '.join(policies)}; allowed: one of {', '.join(_POLICIES)}"
    problems = _present(
        {
            several: len(policies) > 1,
            **{f"phases: two phases are called {name!r}; each needs a name of its own": True for name in twice},
            f"data.splits: the fractions {fractions} leave nothing to train on": sum(fractions) >= 1,
            "data.splits.test: folds are the test images; leave it out, or folds": recipe.folds is not None
            and splits.test != "auto",
        }
    )
    if recipe.data.task == "multi_label":
        problems += multi_label_problems(recipe)
    for key, name in (("gamma", "focal"), ("tau", "logit_adjusted")):
        if getattr(recipe.loss, key) is not None and recipe.loss.name != name:
            problems.append(f"loss.{key}: the loss {recipe.loss.name!r} has none; leave it out")
    problems += _hub_problems(recipe)
    for phase in recipe.phases:
        problems += _present(_phase_obstacles(phase, splits), f"phases.{phase.name}")
        if phase.adapter is not None and not phase.adapter.merge and phase is not recipe.phases[-1]:
            problems.append(f"phases.{phase.name}.adapter.merge: only the last phase can leave its adapter apart")
        if phase.solver == "lbfgs":
            problems += [f"phases.{phase.name}.solver: lbfgs {problem}" for problem in solving_problems(phase, recipe)]
    problems += _idle_arguments(recipe)
    for phase in recipe.phases:
        problems += [f"phases.{phase.name}.lr_scheduler_kwargs{problem}" for problem in _plateau_problems(phase)]
    return [*problems, *_retaining_problems(recipe)]


def multi_label_problems(recipe: Recipe) -> list[str]:
    """What a recipe asks for that has no meaning where an image has any number of labels."""
    data = recipe.data
    adjusts = recipe.loss.name == "logit_adjusted"
    balance = "class_weights: balanced makes up for rare labels"
    obstacles = {
        "data.max_per_class: counts images of one class each": data.max_per_class is not None,
        "data.weight_column: is for images with one label or shares of classes": data.weight_column is not None,
        f"loss.name: 'logit_adjusted' is for classes that exclude each other; {balance}": adjusts,
        f"sampler: {recipe.sampler!r} draws images by their one class; {balance}": recipe.sampler != "shuffle",
    }
    return [f"{problem}; leave it out for multi-label data" for problem in _present(obstacles)]


def solving_problems(phase: PhaseSpec, recipe: Recipe) -> list[str]:
    """What keeps a phase's head from being solved."""
    data = recipe.data
    taken = sorted(STEPPING & phase.own_arguments.keys())
    taken += [key for key in ("average", "early_stopping", "head_learning_rate") if getattr(phase, key) is not None]
    obstacles = {
        "is for a phase that trains the head alone": not phase.trains_head_alone,
        f"takes no steps, which {', '.join(taken)} are about; leave them out, or set solver: steps": bool(taken),
        "needs a replay.mode other than 'off'": recipe.replay.mode == "off",
        "needs a convex loss, and the focal one is none": recipe.loss.name == "focal",
        f"needs data.augment.{' and '.join(data.augment.mixing)} 0": bool(data.augment.mixing),
        "needs data.splits.validation, as folds would divide the groups of data.group_column": data.group_column
        is not None
        and data.splits.validation is None,
    }
    return _present(obstacles)


def warms_up(arguments: Arguments) -> bool:
    """Whether a phase's schedule has a warm-up, if it is asked for steps of it."""
    return _schedule(arguments) not in ("constant", *PLATEAU)


def is_greater_better(arguments: Arguments) -> bool:
    """The direction of the metric that a phase is judged by: what it says, or else as transformers 5.24 has it."""
    asked = arguments.get("greater_is_better")
    return not str(arguments.get("metric_for_best_model") or "accuracy").endswith("loss") if asked is None else asked


def _present(obstacles: Mapping[str, bool], where: str = "") -> list[str]:
    return [f"{where}{problem}" for problem, is_there in obstacles.items() if is_there]


def _phase_obstacles(phase: PhaseSpec, splits: SplitSpec) -> dict[str, bool]:
    adapts, unfreezes = phase.adapter is not None, phase.unfreeze != "head"
    validated = ["early_stopping"] if phase.early_stopping is not None else []
    validated += [f"average.{kind}" for kind in phase.average or () if kind in ("best", "soup")]
    method = phase.adapter.method if phase.adapter is not None else ""
    unused = [key for key in _UNUSED.get(method, ()) if getattr(phase.adapter, key) is not None]
    moves, releases = phase.batchnorm != "eval", not (adapts or phase.trains_head_alone)
    never = phase.arguments.get("eval_strategy") == "no"
    return {
        ": an adapter trains together with the head only; leave unfreeze out": adapts and unfreezes,
        ": layer_decay is for unfrozen blocks, not for an adapter": adapts and phase.layer_decay != 1,
        **{f".adapter.{key}: the method {method!r} has none; leave it out": True for key in unused},
        ": gradual says which blocks are released; leave unfreeze and adapter out": phase.gradual is not None
        and (adapts or unfreezes),
        f".batchnorm: {phase.batchnorm!r} is for released blocks; this phase has none": moves and not releases,
        **{f".{key}: needs data.splits.validation": splits.validation is None for key in validated},
        **{f".{key}: needs an eval_strategy other than 'no'": never for key in validated},
    }


def _hub_problems(recipe: Recipe) -> list[str]:
    hub, adapter = recipe.hub, recipe.phases[-1].adapter
    lacks_model, pushes_all = adapter is not None and not adapter.merge, hub.hub_strategy == "every_save"
    wants_model, wants_adapter = hub.what in ("model", "both"), hub.what in ("adapter", "both")
    pushes, has_folds = hub.repo_id is not None, recipe.folds is not None
    alone = hub.what == "adapter" or lacks_model
    obstacles = {
        f"what: {hub.what!r} needs an adapter in the last phase": wants_adapter and adapter is None,
        f"what: {hub.what!r} needs adapter.merge true in the last phase": wants_model and lacks_model,
        "hub_strategy: 'every_save' pushes models, and the adapter alone is the result": pushes_all and alone,
        "hub_strategy: 'every_save' would open a pull request with each save": pushes_all and hub.create_pr,
        "repo_id: folds make several runs; push the one that you want with `hfft push`": pushes and has_folds,
        "repo_id: the other keys of this section need one": not pushes and hub != HubSpec(),
    }
    return _present(obstacles, "hub.")


def _retaining_problems(recipe: Recipe) -> list[str]:
    """What keeps weights from being interpolated, and features from being kept."""
    is_validated, adapter = recipe.data.splits.validation is not None, recipe.phases[-1].adapter
    problems = _present({"novelty: needs data.splits.validation": recipe.novelty and not is_validated})
    if recipe.retain.interpolate is None:
        return problems
    obstacles = {
        "needs a first phase that trains the head alone": not recipe.phases[0].trains_head_alone,
        "needs a phase that trains more than the head": all(phase.trains_head_alone for phase in recipe.phases),
        "needs an adapter that is merged (adapter.merge: true)": adapter is not None and not adapter.merge,
        "'auto' needs data.splits.validation": recipe.retain.interpolate == "auto" and not is_validated,
    }
    return problems + _present(obstacles, "retain.interpolate: ")


def _schedule(arguments: Arguments) -> str:
    return str(arguments.get("lr_scheduler_type") or "linear")


def _reports(arguments: Arguments) -> bool:
    report_to = arguments.get("report_to") or ()
    return bool({"trackio", "all"} & set([report_to] if isinstance(report_to, str) else report_to))


def _checkpoints(arguments: Arguments) -> bool:
    return bool(arguments.get("activation_checkpointing") or arguments.get("gradient_checkpointing"))


@dataclass(frozen=True)
class _Need:
    """What a field needs to count at all, and the values of it that ask for nothing."""

    field: str
    is_met: Callable[[Arguments], bool]
    asks: str
    idle: tuple[Any, ...] = (None, "", 0, {})


_NEEDS = (
    _Need("eval_steps", lambda found: found.get("eval_strategy") == "steps", "eval_strategy: steps"),
    _Need("warmup_steps", warms_up, "an lr_scheduler_type that warms up, such as constant_with_warmup"),
    _Need(
        "lr_scheduler_kwargs",
        lambda found: _schedule(found) not in ("constant", "constant_with_warmup"),
        "an lr_scheduler_type that takes some",
    ),
    _Need("activation_checkpointing_kwargs", _checkpoints, "activation_checkpointing: true"),
    _Need("gradient_checkpointing_kwargs", _checkpoints, "gradient_checkpointing: true"),
    _Need(
        "dataloader_multiprocessing_context",
        lambda found: found.get("dataloader_num_workers") != 0,
        "dataloader_num_workers above 0",
    ),
    _Need("project", _reports, "report_to: trackio", idle=(None, "huggingface")),
    *(_Need(f"trackio_{name}", _reports, "report_to: trackio") for name in ("space_id", "bucket_id")),
    _Need("trackio_static_space_id", _reports, "report_to: trackio"),
)


def _idle_arguments(recipe: Recipe) -> list[str]:
    """Every field of TrainingArguments that counts in no phase that has it."""
    problems = []
    for need in _NEEDS:
        having = [phase for phase in recipe.phases if phase.arguments.get(need.field) not in need.idle]
        lacking = [phase for phase in having if not need.is_met(phase.arguments)]
        where = [f"phases.{phase.name}" for phase in lacking if need.field not in phase.inherited]
        if len(lacking) == len(having) and len(where) < len(lacking):  # what all phases share, and none can use
            where.insert(0, "training")
        problem = f"{need.field}: counts with {need.asks} only; set that, or leave it out"
        problems += [f"{section}.{problem}" for section in where]
    return problems


def _plateau_problems(phase: PhaseSpec) -> list[str]:
    """What the options of a schedule that follows a metric say against the metric or the learning rate."""
    found, problems = phase.arguments, []
    if _schedule(found) not in PLATEAU:
        return problems
    options = as_mapping(found.get("lr_scheduler_kwargs")) or {}
    metric = found.get("metric_for_best_model") or "the metric that phases are judged by"
    mode, better = ("max", "greater") if is_greater_better(found) else ("min", "smaller")
    if options.get("mode", mode) != mode:
        problems.append(f".mode: found {options['mode']!r}, and {metric} is better when {better}")
    rate, floor = found.get("learning_rate", _DEFAULT_RATE), options.get("min_lr", _GREEDY_FLOOR)
    numbers = isinstance(rate, int | float) and isinstance(floor, int | float)
    if _schedule(found) == "greedy" and numbers and rate <= floor:
        smallest = f"as greedy's smallest is {floor:g}; set min_lr below it"
        problems.append(f".min_lr: the learning rate {rate:g} could never fall, {smallest}")
    return problems
