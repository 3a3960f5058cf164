"""Contradictions between the keys of a recipe that are each valid by themselves."""

from hfft.recipe.arguments import AUTO
from hfft.recipe.dependencies import PLATEAU, dependency_problems
from hfft.recipe.spec import HubSpec, PhaseSpec, Recipe, SplitSpec

_SEARCHED = ("adamw_torch", "adamw_torch_fused")
_UNUSED = {"ia3": ("r", "lora_alpha", "lora_dropout"), "vera": ("lora_alpha", "lora_dropout")}


def contradictions(recipe: Recipe) -> list[str]:
    """Every contradiction of a recipe."""
    problems = []
    names = [phase.name for phase in recipe.phases]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        problems.append(f"phases: two phases are called {name!r}; each needs a name of its own")
    fractions = [
        value for value in (recipe.data.splits.validation, recipe.data.splits.test) if isinstance(value, float)
    ]
    if sum(fractions) >= 1:
        problems.append(f"data.splits: the fractions {fractions} leave nothing to train on")
    if recipe.folds is not None and recipe.data.splits.test != "auto":
        problems.append("data.splits.test: folds are the test images; leave it out, or folds")
    problems += _loss_problems(recipe)
    problems += [f"hub.{problem}" for problem in _hub_contradictions(recipe)]
    for phase in recipe.phases[:-1]:
        if phase.adapter is not None and not phase.adapter.merge:
            problems.append(f"phases.{phase.name}.adapter.merge: only the last phase can leave its adapter apart")
    for phase in recipe.phases:
        problems += [f"phases.{phase.name}{problem}" for problem in _phase_contradictions(phase, recipe.data.splits)]
        if phase.arguments.get("learning_rate") == AUTO:
            problems += [
                f"phases.{phase.name}.learning_rate: {problem}" for problem in _search_problems(phase, recipe)
            ]
    return [*problems, *dependency_problems(recipe), *_retaining_problems(recipe)]


def _loss_problems(recipe: Recipe) -> list[str]:
    problems = multi_label_problems(recipe) if recipe.data.task == "multi_label" else []
    for key, name in (("gamma", "focal"), ("tau", "logit_adjusted")):
        if getattr(recipe.loss, key) is not None and recipe.loss.name != name:
            problems.append(f"loss.{key}: the loss {recipe.loss.name!r} has none; leave it out")
    return problems


def multi_label_problems(recipe: Recipe) -> list[str]:
    """What a recipe asks for that has no meaning where an image has any number of labels."""
    data = recipe.data
    obstacles = {
        "data.max_per_class: counts images of one class each": data.max_per_class is not None,
        "data.weight_column: is for images with one label or shares of classes": data.weight_column is not None,
        "loss.name: 'logit_adjusted' is for classes that exclude each other; class_weights: balanced makes up for "
        "rare labels": recipe.loss.name == "logit_adjusted",
        f"sampler: {recipe.sampler!r} draws images by their one class; class_weights: balanced makes up for rare "
        "labels": recipe.sampler != "shuffle",
    }
    return [f"{problem}; leave it out for multi-label data" for problem, is_there in obstacles.items() if is_there]


def _retaining_problems(recipe: Recipe) -> list[str]:
    """What keeps weights from being interpolated, and features from being kept."""
    is_validated, last = recipe.data.splits.validation is not None, recipe.phases[-1]
    problems = ["novelty: needs data.splits.validation"] if recipe.novelty and not is_validated else []
    if recipe.retain.interpolate is None:
        return problems
    obstacles = {
        "needs a first phase that trains the head alone": not recipe.phases[0].trains_head_alone,
        "needs a phase that trains more than the head": all(phase.trains_head_alone for phase in recipe.phases),
        "needs an adapter that is merged (adapter.merge: true)": last.adapter is not None and not last.adapter.merge,
        "'auto' needs data.splits.validation": recipe.retain.interpolate == "auto" and not is_validated,
    }
    found = [problem for problem, is_there in obstacles.items() if is_there]
    return [*problems, *(f"retain.interpolate: {problem}" for problem in found)]


def _hub_contradictions(recipe: Recipe) -> list[str]:
    hub, adapter = recipe.hub, recipe.phases[-1].adapter
    problems = []
    has_model = adapter is None or adapter.merge
    if hub.what in ("adapter", "both") and adapter is None:
        problems.append(f"what: {hub.what!r} needs an adapter in the last phase")
    if hub.what in ("model", "both") and not has_model:
        problems.append(f"what: {hub.what!r} needs adapter.merge true in the last phase, which makes a model")
    if hub.hub_strategy == "every_save" and (hub.what == "adapter" or not has_model):
        problems.append("hub_strategy: 'every_save' pushes models, and here the adapter alone is the result")
    if hub.hub_strategy == "every_save" and hub.create_pr:
        problems.append("hub_strategy: 'every_save' would open a pull request with each save")
    if hub.repo_id is not None and recipe.folds is not None:
        problems.append("repo_id: folds make several runs; push the one that you want with `hfft push`")
    if hub.repo_id is None and hub != HubSpec():
        problems.append("repo_id: the other keys of this section need one")
    return problems


def _search_problems(phase: PhaseSpec, recipe: Recipe) -> list[str]:
    """What keeps `learning_rate: auto` from being found."""
    optim, schedule = (phase.arguments.get(name) for name in ("optim", "lr_scheduler_type"))
    obstacles = {
        "needs an eval_strategy other than 'no'": phase.arguments.get("eval_strategy") == "no",
        f"needs the optim adamw_torch or adamw_torch_fused; found {optim!r}": optim not in (None, *_SEARCHED),
        f"needs a schedule that is known before; found lr_scheduler_type {schedule!r}": schedule in PLATEAU,
        "is for a phase that trains the head alone": not phase.trains_head_alone,
        "leaves nothing for head_learning_rate to say": phase.head_learning_rate is not None,
        "needs data.splits.validation": recipe.data.splits.validation is None,
        "needs data.augment.mixup 0": recipe.data.augment.mixup > 0,
        "needs sampler 'shuffle'": recipe.sampler != "shuffle",
        "needs a replay.mode other than 'off'": recipe.replay.mode == "off",
    }
    return [f"'auto' {problem}" for problem, is_there in obstacles.items() if is_there]


def _phase_contradictions(phase: PhaseSpec, splits: SplitSpec) -> list[str]:
    problems = []
    adapter = phase.adapter
    if adapter is not None and phase.unfreeze != "head":
        problems.append(": an adapter trains together with the head only; leave unfreeze out")
    if adapter is not None and phase.layer_decay != 1:
        problems.append(": layer_decay is for unfrozen blocks, not for an adapter")
    if adapter is not None:
        unused = [key for key in _UNUSED.get(adapter.method, ()) if getattr(adapter, key) is not None]
        problems += [f".adapter.{key}: the method {adapter.method!r} has none; leave it out" for key in unused]
    if phase.gradual is not None and (adapter is not None or phase.unfreeze != "head"):
        problems.append(": gradual says which blocks are released; leave unfreeze and adapter out")
    if phase.batchnorm != "eval" and (adapter is not None or phase.trains_head_alone):
        problems.append(f".batchnorm: {phase.batchnorm!r} is for released blocks, and this phase releases none")
    asking = [".early_stopping"] if phase.early_stopping is not None else []
    asking += [f".average.{kind}" for kind in phase.average or () if kind in ("best", "soup")]
    for key in asking:
        if splits.validation is None:
            problems.append(f"{key}: needs data.splits.validation")
        if phase.arguments.get("eval_strategy") == "no":
            problems.append(f"{key}: needs an eval_strategy other than 'no'")
    return problems
