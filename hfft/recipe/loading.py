"""YAML text and `key=value` overrides to a Recipe, and back; every problem of a file is reported at once."""

import dataclasses
import difflib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from hfft.errors import RecipeError
from hfft.recipe.arguments import AUTO, OWNED, argument_problem, training_argument_types
from hfft.recipe.spec import (
    AdapterSpec,
    AugmentSpec,
    DataSpec,
    GradualSpec,
    HubSpec,
    LossSpec,
    ModelSpec,
    PhaseSpec,
    Recipe,
    ReplaySpec,
    RetainSpec,
    SplitSpec,
)

# What pydantic calls things, in the words of a YAML file.
_WORDS = {"an object": "keys with values", "a valid dictionary": "keys with values", "a valid array": "a list"}
_MOST_VALUES, _MOST_LETTERS, _DEEPEST = 100_000, 10_000_000, 50  # of a recipe
_UNUSED = {"ia3": ("r", "lora_alpha", "lora_dropout"), "vera": ("lora_alpha", "lora_dropout")}
_SECRETS = ("token", "hf_token", "hub_token", "access_token", "use_auth_token", "api_key", "password", "secret")
_FIELDS = "the fields of transformers.TrainingArguments"
_SECTIONS = {
    "": Recipe,
    "model": ModelSpec,
    "data": DataSpec,
    "data.splits": SplitSpec,
    "loss": LossSpec,
    "data.augment": AugmentSpec,
    "replay": ReplaySpec,
    "hub": HubSpec,
    "retain": RetainSpec,
    "phases": PhaseSpec,
    "phases.adapter": AdapterSpec,
    "phases.gradual": GradualSpec,
}


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; nothing but text is looked at.

    Args:
        source: Path of a YAML 1.2 file, or the same content as a mapping.
        overrides: `path=value` strings, for example `phases.head.learning_rate=5e-4`; values are YAML.

    Returns:
        The recipe, with each phase's `arguments` holding the recipe's `training` fields and its own on top.

    Raises:
        RecipeError: With all problems found: where, what was found, what is allowed.
    """
    where = "recipe" if isinstance(source, Mapping) else str(source)
    content = _plain(source if isinstance(source, Mapping) else _read_yaml(Path(source)), where)
    if not isinstance(content, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of keys to values, found {_kind(content)}")
    for override in overrides:
        _apply_override(content, override)
    return _build(_plain(content, where), where)


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back to an equal Recipe."""
    content = _without_defaults(recipe)
    content["phases"] = []
    for phase in recipe.phases:
        entry = _without_defaults(phase)
        shared = recipe.training.items()
        own = {key: value for key, value in entry.pop("arguments", {}).items() if (key, value) not in shared}
        content["phases"].append({**entry, **own})
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.dump(json.loads(json.dumps(content)), stream)
    return stream.getvalue()


def _read_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: the recipe can't be read: {error}") from error
    return _parse_yaml(text, str(path))


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return YAML(typ="safe", pure=True).load(text)
    except RecursionError as error:
        raise RecipeError(f"{where}: not a recipe: nested too deeply") from error
    except (ValueError, TypeError, KeyError) as error:  # a tagged or date-like scalar that is none; a key of keys
        raise RecipeError(f"{where}: not valid YAML: {error}") from error
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{where}{line}: not valid YAML: {problem}") from error


def _plain(content: Any, where: str) -> Any:
    """A copy of JSON types: keys are strings, dates and paths too."""
    _check_amount(content, where)
    try:
        return json.loads(json.dumps(content, default=str))
    except (TypeError, ValueError) as error:  # a key that is a list, an alias inside its own anchor
        raise RecipeError(f"{where}: not a recipe: {error}") from error


def _check_amount(content: Any, where: str) -> None:
    """Refuse what a few lines of aliases blow up to gigabytes, and what is nested without end."""
    values, letters = 0, 0
    waiting = [(content, 0)]
    while waiting:
        node, depth = waiting.pop()
        values += 1
        letters += len(node) if isinstance(node, str) else 0
        if values > _MOST_VALUES or letters > _MOST_LETTERS or depth > _DEEPEST:
            raise RecipeError(
                f"{where}: not a recipe: more than {_MOST_VALUES:,} values or {_MOST_LETTERS:,} letters, aliases "
                f"counted each time, or nested more than {_DEEPEST} deep"
            )
        if isinstance(node, Mapping):
            waiting += [(part, depth + 1) for part in (*node.keys(), *node.values())]
        elif isinstance(node, list | tuple | set):
            waiting += [(part, depth + 1) for part in node]


def _apply_override(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"override {override!r}: write it as key=value, for example training.weight_decay=0.05")
    node: Any = content
    for key in keys[:-1]:
        node = _child(node, key, override)
    if not isinstance(node, dict):
        raise RecipeError(f"override {override!r}: {'.'.join(keys[:-1])} has no keys")
    node[keys[-1]] = _parse_yaml(text, f"override {override!r}")


def _child(node: Any, key: str, override: str) -> Any:
    if isinstance(node, list):
        names = [entry.get("name") if isinstance(entry, dict) else None for entry in node]
        if key not in names:
            known = ", ".join(str(name) for name in names)
            raise RecipeError(f"override {override!r}: no phase is called {key!r}; the phases are: {known}")
        return node[names.index(key)]
    if not isinstance(node, dict):
        raise RecipeError(f"override {override!r}: there is nothing to set below {key!r}")
    if node.get(key) is None:
        node[key] = {}
    return node[key]


def _build(content: dict[str, Any], where: str) -> Recipe:
    problems: list[str] = []
    training = {} if content.get("training") is None else content["training"]
    content = {**content, "training": training}
    shared = training if isinstance(training, dict) else {}
    problems += _argument_problems(shared, "training")
    if isinstance(content.get("phases"), list):
        content["phases"] = [_split_phase(phase, shared, problems, n) for n, phase in enumerate(content["phases"])]
    try:
        recipe = TypeAdapter(Recipe).validate_json(json.dumps(content))
    except ValidationError as error:
        problems += _describe_all(error.errors(), content)
        recipe = None
    if recipe is not None:
        problems += _contradictions(recipe)
    if problems or recipe is None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise RecipeError("\n".join([f"{where}: {count}", *(f"  {problem}" for problem in problems)]))
    return recipe


def _split_phase(phase: Any, training: dict[str, Any], problems: list[str], number: int) -> Any:
    if not isinstance(phase, dict):
        return phase
    where = f"phases.{_phase_name(phase, number)}"
    own = {field.name for field in dataclasses.fields(PhaseSpec)} - {"arguments"}
    arguments = {key: value for key, value in phase.items() if key not in own}
    known = training_argument_types()
    unknown = [key for key in arguments if key not in known]
    free = [*own, *(name for name in known if name not in OWNED)]
    allowed = f"{', '.join(sorted(own))} and {_FIELDS}"
    problems += [_unknown_key(f"{where}.{key}", key, free, allowed) for key in unknown]
    arguments = {key: value for key, value in arguments.items() if key in known}
    problems += _argument_problems(arguments, where)
    spec = {key: value for key, value in phase.items() if key in own}
    return {**spec, "arguments": {**training, **arguments}}


def _argument_problems(arguments: dict[str, Any], where: str) -> list[str]:
    known = training_argument_types()
    problems = []
    for name, value in arguments.items():
        if name not in known:
            free = [key for key in known if key not in OWNED]
            problems.append(_unknown_key(f"{where}.{name}", name, free, _FIELDS))
        elif (problem := argument_problem(name, value)) is not None:
            problems.append(f"{where}.{name}: {problem}")
    return problems


def _describe_all(problems: Sequence[Any], content: dict[str, Any]) -> list[str]:
    """One line per path: a value that fits none of several types is one problem."""
    described: dict[str, str] = {}
    for problem in problems:
        if problem["type"] == "too_short" and content["phases"]:
            continue  # pydantic counts the valid phases only, and has named the others
        keys = _path(problem, content)
        line = _describe(problem, keys)
        path = ".".join(keys)
        _, _, allowed = line.partition("; allowed: ")
        described[path] = f"{described[path]} or {allowed}" if path in described else line
    return list(described.values())


def _path(problem: Any, content: Any) -> list[str]:
    """Keys down to the value that a problem is about; pydantic adds the name of the type that it tried."""
    keys: list[str] = []
    node = content
    for key in problem["loc"]:
        if isinstance(node, dict) and (key in node or problem["type"].startswith("missing")):
            keys.append(str(key))
            node = node.get(key)
        elif isinstance(node, list) and isinstance(key, int) and key < len(node):
            node = node[key]
            keys.append(_phase_name(node, key) if keys == ["phases"] else str(key))
    return keys


def _phase_name(phase: Any, number: int) -> str:
    name = phase.get("name") if isinstance(phase, dict) else None
    return name if isinstance(name, str) else str(number)


def _describe(problem: Any, keys: list[str]) -> str:
    path = ".".join(keys)
    if problem["type"] == "unexpected_keyword_argument":
        section = ".".join(key for place, key in enumerate(keys[:-1]) if not (keys[0] == "phases" and place == 1))
        spec = _SECTIONS.get(section)
        known = sorted(field.name for field in dataclasses.fields(spec)) if spec else []
        return _unknown_key(path, keys[-1], known, ", ".join(known))
    if problem["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{path}: this key is required"
    if path == "phases":
        return f"{path}: found {problem['input']!r}; allowed: a list of at least one phase"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    message = str(_WORDS.get(message, message))
    allowed = message if message.startswith("allowed") else f"allowed: {message}"
    return f"{path}: found {problem['input']!r}; {allowed}"


def _unknown_key(path: str, key: str, known: Sequence[str], allowed: str) -> str:
    if key.lower() in _SECRETS:
        return f"{path}: a recipe never holds a secret: use `hf auth login` or HF_TOKEN, and remove this key"
    nearest = difflib.get_close_matches(key, known, n=1)
    return f"{path}: unknown key; " + (f"did you mean {nearest[0]!r}?" if nearest else f"allowed: {allowed}")


def _contradictions(recipe: Recipe) -> list[str]:
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
    return [*problems, *_retaining_problems(recipe)]


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
        "needs a first phase that trains the head alone, where the way begins": not recipe.phases[0].trains_head_alone,
        "needs a phase that trains more than the head: there is no way to go": all(
            phase.trains_head_alone for phase in recipe.phases
        ),
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
    obstacles = {
        "is for a phase that trains the head alone": phase.adapter is not None
        or phase.gradual is not None
        or phase.unfreeze != "head",
        "leaves nothing for head_learning_rate to say": phase.head_learning_rate is not None,
        "needs data.splits.validation": recipe.data.splits.validation is None,
        "needs data.augment.mixup 0": recipe.data.augment.mixup > 0,
        "needs sampler 'shuffle'": recipe.sampler != "shuffle",
        "needs a replay.mode other than 'off'": recipe.replay.mode == "off",
    }
    return [f"'auto' {problem}" for problem, is_there in obstacles.items() if is_there]


def _phase_contradictions(phase: PhaseSpec, splits: SplitSpec) -> list[str]:
    problems = []
    adapter, stopping = phase.adapter, phase.early_stopping
    if adapter is not None and phase.unfreeze != "head":
        problems.append(": an adapter trains together with the head only; leave unfreeze out")
    if adapter is not None and phase.layer_decay != 1:
        problems.append(": layer_decay is for unfrozen blocks, not for an adapter")
    if adapter is not None:
        unused = [key for key in _UNUSED.get(adapter.method, ()) if getattr(adapter, key) is not None]
        problems += [f".adapter.{key}: the method {adapter.method!r} has none; leave it out" for key in unused]
    if phase.gradual is not None and (adapter is not None or phase.unfreeze != "head"):
        problems.append(": gradual says which blocks are released; leave unfreeze and adapter out")
    if phase.batchnorm != "eval" and not _releases_blocks(phase):
        problems.append(f".batchnorm: {phase.batchnorm!r} is for released blocks, and this phase releases none")
    if stopping is not None and splits.validation is None:
        problems.append(".early_stopping: needs data.splits.validation")
    if stopping is not None and phase.arguments.get("eval_strategy") == "no":
        problems.append(".early_stopping: needs an eval_strategy other than 'no'")
    return problems


def _releases_blocks(phase: PhaseSpec) -> bool:
    return phase.adapter is None and (phase.gradual is not None or phase.unfreeze != "head")


def _without_defaults(spec: Any) -> dict[str, Any]:
    """Fields that differ from their defaults, nested sections included."""
    content: dict[str, Any] = {}
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if dataclasses.is_dataclass(value):
            nested = _without_defaults(value)
            if nested or default is dataclasses.MISSING or default is None:
                content[field.name] = nested
        elif value != default:
            content[field.name] = value
    return content


def _kind(value: Any) -> str:
    kinds = {str: "text", list: "a list", bool: "true or false", int: "a number", float: "a number"}
    return "nothing" if value is None else kinds.get(type(value), type(value).__name__)
