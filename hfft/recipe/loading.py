"""YAML text and `key=value` overrides to a Recipe, and back; every problem of a file is reported at once."""

import dataclasses
import io
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from hfft.errors import RecipeError, first_line, nearest
from hfft.recipe.arguments import OWNED, argument_problem, training_argument_types
from hfft.recipe.augment import AugmentSpec
from hfft.recipe.contradictions import contradictions
from hfft.recipe.spec import HubSpec, PhaseSpec, Recipe
from hfft.system.files import expanded
from hfft.system.text import printable

RECIPE = "recipe.yaml"
"""What a run folder calls the recipe that it ran."""
# What pydantic calls things, in the words of a YAML file.
_WORDS = {"an object": "keys with values", "a valid dictionary": "keys with values", "a valid array": "a list"}
_MOST_VALUES, _MOST_LETTERS, _DEEPEST = 100_000, 10_000_000, 50  # of a recipe
_OF_IMAGES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".tar")  # endings of tables and shards
_SECRETS = ("token", "hf_token", "hub_token", "access_token", "use_auth_token", "api_key", "password", "secret")
_BEHIND = {"arguments", "inherited"}  # fields of PhaseSpec that stand for keys of other names
_FIELDS = "the fields of transformers.TrainingArguments"
# Fields of TrainingArguments that change no number of the result: reading, logging, what is kept on disk, timeouts.
_NEUTRAL = (
    *("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers"),
    *("dataloader_pin_memory", "dataloader_multiprocessing_context", "per_device_eval_batch_size"),
    *("eval_accumulation_steps", "eval_use_gather_object", "torch_empty_cache_steps", "ddp_timeout"),
    *("save_total_limit", "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node", "logging_strategy"),
    *("logging_first_step", "logging_steps", "skip_memory_metrics", "include_num_input_tokens_seen", "report_to"),
    *("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
)


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
    content = _plain(source if isinstance(source, Mapping) else _read_yaml(Path(expanded(source))), where)
    if not isinstance(content, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of keys to values, found {_kind(content)}")
    for override in overrides:
        _check_text(override, where)
        _apply_override(content, override)
    return _build(_plain(content, where), where)


def dump_recipe(recipe: Recipe, comments: Mapping[str, str] | None = None) -> str:
    """The recipe as YAML that `load_recipe` reads back to an equal Recipe.

    Comments follow the values of their keys, such as `phases.head.learning_rate`; that of "" is the first line.
    """
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.dump(json.loads(json.dumps(_content(recipe))), stream)
    return _commented(stream.getvalue(), comments) if comments else stream.getvalue()


def _commented(text: str, comments: Mapping[str, str]) -> str:
    yaml = YAML()
    yaml.width = _MOST_LETTERS  # a line for each value
    content = yaml.load(text)
    content.yaml_set_start_comment(comments.get("", ""))
    for path, reason in comments.items():
        *above, key = path.split(".")
        node: Any = content
        for name in above:
            named = {entry["name"]: entry for entry in node} if isinstance(node, list) else node
            node = named.get(name, {}) if isinstance(named, dict) else {}
        if key in node:
            node.yaml_add_eol_comment(reason, key=key, column=0)
    stream = io.StringIO()
    yaml.dump(content, stream)
    return stream.getvalue()


def is_recipe(source: str) -> bool:
    """Whether what is to be trained is named as a recipe, or as the run that has one, and not as images."""
    path = Path(expanded(source))
    return (
        path.suffix.lower() in (".yaml", ".yml")
        or (path / RECIPE).is_file()
        or (path.is_file() and path.suffix.lower() not in _OF_IMAGES)
    )


def holds_recipe(path: Path, recipe: Recipe) -> bool:
    """Whether a file holds just this recipe, with comments or without."""
    return path.is_file() and _read_yaml(path) == _parse_yaml(dump_recipe(recipe), str(path))


def read_recipe(path: Path) -> Recipe:
    """The recipe of a run, which was checked when it was written, by a version that may allow more.

    Raises:
        RecipeError: If it can't be read, or this version doesn't know a key or a type of value of it.
    """
    content = _plain(_read_yaml(path), str(path))
    recipe, problems = _typed(content) if isinstance(content, dict) else (None, ["not a mapping of keys to values"])
    return _without_problems(recipe, [] if recipe is not None else problems, str(path))


def check_recipe(recipe: Recipe) -> Recipe:
    """A recipe that was made or changed in Python, read again as the file that it would be.

    Returns:
        What that file says: what runs is what recipe.yaml tells.

    Raises:
        RecipeError: With all problems found, as for a file.
    """
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"recipe: found {type(recipe).__name__}; hfft.load_recipe reads a file or a mapping")
    where = f"recipe {recipe.name}"
    for phase in recipe.phases:
        if misplaced := set(phase.arguments) & set(_keys_of(PhaseSpec)):
            found = ", ".join(sorted(misplaced))
            raise RecipeError(f"{where}: phases.{phase.name}.arguments: found {found}; allowed: {_FIELDS}")
    return _build(_plain(_content(recipe), where), where)


def without_neutral_keys(recipe: Recipe) -> Recipe:
    """The recipe with the defaults of the keys that don't change the result: place, hub, report, speed.

    An unfinished run continues with other values of them. Checkpoint and images stay as they are written: whether two
    names stand for the same can't be seen from the names.
    """
    phases = []
    for phase in recipe.phases:
        asked = phase.arguments
        is_interval = asked.get("eval_strategy") == "steps" and "eval_steps" not in asked  # of the evaluations, too
        neutral = set(_NEUTRAL) - ({"logging_steps"} if is_interval else set())
        arguments = {name: value for name, value in asked.items() if name not in neutral}
        phases.append(dataclasses.replace(phase, arguments=arguments, inherited={}))
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
        phases=tuple(phases),
    )


def _content(recipe: Recipe) -> dict[str, Any]:
    """What a file of the recipe holds."""
    phases = [{**_without_defaults(phase, _BEHIND), **phase.own_arguments} for phase in recipe.phases]
    return {**_without_defaults(recipe), "phases": phases}


def _read_yaml(path: Path) -> Any:
    if path.is_dir():
        own = path / RECIPE
        what = f"its recipe is {own}" if own.is_file() else f"name a recipe, and the folder by data.source={path}"
        raise RecipeError(f"{path} is a folder, and no recipe; {what}")
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
        problem = getattr(error, "problem", None) or first_line(error)
        raise RecipeError(f"{where}{line}: not valid YAML: {problem}") from error


def _plain(content: Any, where: str) -> Any:
    """A copy of JSON types: keys are strings, dates and paths too; numbers of NumPy and torch are plain ones."""
    _check_amount(content, where)
    try:
        return json.loads(json.dumps(content, default=lambda one: one.item() if hasattr(one, "item") else str(one)))
    except (TypeError, ValueError, RuntimeError) as error:  # a list as key, an alias inside its own anchor, an array
        raise RecipeError(f"{where}: not a recipe: {error}") from error


def _check_amount(content: Any, where: str) -> None:
    """Refuse what a few lines of aliases blow up to gigabytes, and what is nested without end."""
    values, letters = 0, 0
    waiting = [(content, 0)]
    while waiting:
        node, depth = waiting.pop()
        values += 1
        if isinstance(node, str):
            letters += len(node)
            _check_text(node, where)
        if values > _MOST_VALUES or letters > _MOST_LETTERS or depth > _DEEPEST:
            raise RecipeError(
                f"{where}: not a recipe: more than {_MOST_VALUES:,} values or {_MOST_LETTERS:,} letters, aliases "
                f"counted each time, or nested more than {_DEEPEST} deep"
            )
        if isinstance(node, Mapping):
            waiting += [(part, depth + 1) for part in (*node.keys(), *node.values())]
        elif isinstance(node, list | tuple | set):
            waiting += [(part, depth + 1) for part in node]


def _check_text(text: str, where: str) -> None:
    """Refuse a name whose bytes are no text: no recipe could be written with it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"{printable(text)} is no UTF-8 text"
        raise RecipeError(f"{printable(where)}: {what}; rename the file or folder, or link to it") from error


def _apply_override(content: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"override {override!r}: write it as key=value, for example training.weight_decay=0.05")
    node: Any = content
    for key in keys[:-1]:
        if isinstance(node, list):
            names = [entry.get("name") if isinstance(entry, dict) else None for entry in node]
            if key not in names:
                known = ", ".join(map(str, names))
                raise RecipeError(f"override {override!r}: no phase is called {key!r}; the phases are: {known}")
            node = node[names.index(key)]
        elif isinstance(node, dict):
            node[key] = {} if node.get(key) is None else node[key]
            if key == "augment" and isinstance(node[key], str):
                node[key] = {"preset": node[key]}
            node = node[key]
        else:
            raise RecipeError(f"override {override!r}: there is nothing to set below {key!r}")
    if not isinstance(node, dict):
        raise RecipeError(f"override {override!r}: {'.'.join(keys[:-1])} has no keys")
    node[keys[-1]] = _parse_yaml(text, f"override {override!r}")


def _build(content: dict[str, Any], where: str) -> Recipe:
    recipe, problems = _typed(content)
    return _without_problems(recipe, problems + (contradictions(recipe) if recipe is not None else []), where)


def _without_problems(recipe: Recipe | None, problems: Sequence[str], where: str) -> Recipe:
    if problems or recipe is None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise RecipeError("\n".join([f"{where}: {count}", *(f"  {problem}" for problem in problems)]))
    return recipe


def _typed(content: dict[str, Any]) -> tuple[Recipe | None, list[str]]:
    """A recipe of keys and values of the right types, if it is one; and what is wrong with each of them by itself."""
    training = {} if content.get("training") is None else content["training"]
    content = {**content, "training": training}
    problems = _argument_problems(training, "training") if isinstance(training, dict) else []
    if isinstance(content.get("phases"), list):
        own, phases = set(_keys_of(PhaseSpec)) - _BEHIND, []
        for number, phase in enumerate(content["phases"]):
            if isinstance(phase, dict):
                asked = {key: value for key, value in phase.items() if key not in own}
                problems += _argument_problems(asked, f"phases.{_phase_name(phase, number)}", own)
                known = {key: value for key, value in asked.items() if key in training_argument_types()}
                phase = {**{key: value for key, value in phase.items() if key in own}, "arguments": known}
            phases.append(phase)
        content["phases"] = phases
    try:
        return TypeAdapter(Recipe).validate_json(json.dumps(content)), problems
    except ValidationError as error:
        return None, problems + _describe_all(error.errors(), content)


def _argument_problems(arguments: dict[str, Any], where: str, own: Collection[str] = ()) -> list[str]:
    """What is wrong with fields of TrainingArguments, and with keys that are neither such nor a section's `own`."""
    known = training_argument_types()
    free = [*own, *(name for name in known if name not in OWNED)]
    allowed = f"{', '.join(sorted(own))} and {_FIELDS}" if own else _FIELDS
    problems = [_unknown_key(f"{where}.{name}", name, free, allowed) for name in arguments if name not in known]
    found = {name: argument_problem(name, value) for name, value in arguments.items() if name in known}
    return [*problems, *(f"{where}.{name}: {problem}" for name, problem in found.items() if problem is not None)]


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
        section: Any = Recipe
        for key in (key for place, key in enumerate(keys[:-1]) if not (keys[0] == "phases" and place == 1)):
            section = _section_in(section.__pydantic_fields__[key].annotation)
        known = _keys_of(section) + (["preset"] if section is AugmentSpec else [])
        return _unknown_key(path, keys[-1], known, ", ".join(known))
    if problem["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{path}: this key is required"
    if path == "phases":
        return f"{path}: found {problem['input']!r}; allowed: a list of at least one phase"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    message = str(_WORDS.get(message, message))
    allowed = message if message.startswith("allowed") else f"allowed: {message}"
    return f"{path}: found {problem['input']!r}; {allowed}"


def _section_in(annotation: Any) -> Any:
    """The dataclass in a type such as `AdapterSpec | None` or `tuple[PhaseSpec, ...]`."""
    if dataclasses.is_dataclass(annotation):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


def _keys_of(section: Any) -> list[str]:
    return sorted(field.name for field in dataclasses.fields(section))


def _unknown_key(path: str, key: str, known: Sequence[str], allowed: str) -> str:
    if key.lower() in _SECRETS:
        return f"{path}: a recipe never holds a secret: use `hf auth login` or HF_TOKEN, and remove this key"
    meant = nearest(key, known)
    return f"{path}: unknown key; " + (f"did you mean {meant!r}?" if meant else f"allowed: {allowed}")


def _without_defaults(spec: Any, left_out: Collection[str] = ()) -> dict[str, Any]:
    """Fields that differ from their defaults, nested sections included."""
    content: dict[str, Any] = {}
    for field in dataclasses.fields(spec):
        if field.name in left_out:
            continue
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
