"""Print docs/arguments.md: what hfft makes of each field of transformers.TrainingArguments.

    python scripts/arguments_table.py > docs/arguments.md

The fields and the values that are tried are those of tests/argument_values.py, which
tests/integration/test_argument_fields.py trains with. Why a field is refused is what a recipe that has it is told on
a CPU.
"""

import json
import re
import sys
from pathlib import Path

from hfft.errors import HfftError
from hfft.recipe.loading import load_recipe
from hfft.training.settings import try_arguments

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from argument_values import TRIALS, Trial  # pyright: ignore[reportMissingImports]

_PAGE = """# Fields of TrainingArguments

A recipe takes the fields of `transformers.TrainingArguments` by their names, below `training` and in each phase.
"Ends with" compares a small phase with the field and one without it, with replay and without
(tests/integration/test_argument_fields.py). What would do nothing, or fail in the middle of a run, is refused before
anything is read. `python scripts/arguments_table.py` prints this page.

## That count

| field | what it does | tried | ends with |
|---|---|---|---|
{used}

## That are refused on a CPU

| field | told |
|---|---|
{refused}
"""
_ENDS = {"same": "the same weights", "other": "other weights"}


def page() -> str:
    """The page, as Markdown."""
    used = [_used(name, trial) for name, trial in sorted(TRIALS.items()) if trial.outcome != "refused"]
    told = {name: reason(name) for name, trial in sorted(TRIALS.items()) if trial.outcome == "refused"}
    refused = [_cells(f"`{name}`", text) for name, text in told.items()]
    return _PAGE.format(used="\n".join(used), refused="\n".join(refused))


def reason(name: str) -> str:
    """What a recipe with a refused field is told."""
    content = {"name": "x", "model": {"checkpoint": "c"}, "data": {"source": "d"}, "phases": [{"name": "p"}]}
    try:
        recipe = load_recipe({**content, "training": {name: TRIALS[name].value, **TRIALS[name].beside}})
        try_arguments(recipe.phases[0], seed=0, validate=True)
    except HfftError as error:
        return re.sub(rf"^(phases\.p: |(phases\.p|training)\.{name}: )", "", str(error).splitlines()[-1].strip())
    raise AssertionError(f"{name} is not refused")


def _used(name: str, trial: Trial) -> str:
    beside = "".join(f", {key}: {_yaml(value)}" for key, value in trial.beside.items())
    return _cells(f"`{name}`", trial.does, f"`{_yaml(trial.value)}{beside}`", _ENDS[trial.outcome])


def _yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    print(page(), end="")
