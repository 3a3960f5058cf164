"""A few of the damaged images, recipes and tables that the scripts make by the thousand."""

import re
import sys
from pathlib import Path

import launches
import pytest

pytestmark = pytest.mark.nightly

SCRIPTS = Path(__file__).parents[2] / "scripts"


def numbers(shown):
    return {word: int(number) for number, word in re.findall(r"(\d+) (images|refused)", shown)}


def test_damaged_images(tmp_path):
    done = launches.succeed([sys.executable, SCRIPTS / "fuzz_images.py", "--count", 300], tmp_path)
    found = numbers(done.stdout)
    assert sum(found.values()) == 300
    assert min(found.values()) > 20


@pytest.mark.parametrize("kind", ["recipes", "tables"])
def test_damaged_recipes_and_tables(tmp_path, kind):
    done = launches.succeed([sys.executable, SCRIPTS / "fuzz_recipes.py", f"--{kind}", 200], tmp_path)
    line = next(line for line in done.stdout.splitlines() if line.startswith(f"{kind} 0 to 199: "))
    found = {word: int(number) for word, number in re.findall(r"'(planned|refused)': (\d+)", line)}
    assert sum(found.values()) == 200
    assert found.keys() == {"planned", "refused"}
    assert "wrong: " not in done.stdout
