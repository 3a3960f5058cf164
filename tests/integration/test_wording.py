"""What each command says, word by word: one file per command in tests/golden, numbers and places left out.

Elsewhere tests look at values, paths and kinds of errors. A file that is missing is written, and the test fails once:
after a change of words delete it, run this test, and read what it wrote before it is committed.
"""

import difflib
import os
import re
from pathlib import Path

import pytest
import tiny
from pictures import make_photos

from hfft.cli import main

GOLDEN = Path(__file__).parents[1] / "golden"
RECIPE = """
name: words
model: {checkpoint: vit}
data: {source: photos}
training: {per_device_train_batch_size: 4, dataloader_num_workers: 0, num_train_epochs: 2}
precision: float32
replay: {mode: force, engine: torch}
keep: last
phases:
  - {name: head, unfreeze: head, learning_rate: 1.0e-2}
  - {name: last, unfreeze: {blocks: 1}, learning_rate: 1.0e-3}
"""
RUN = "runs/words"
COMMANDS = {  # in this order, as a user might; the exit code, the words
    "check-data": (0, ["check-data", "photos"]),
    "plan": (0, ["plan", "recipe.yaml"]),
    "plan_photos": (0, ["plan", "photos", "--checkpoint", "vit", "--minutes", "1000"]),
    "choose": (0, ["choose", "photos", "vit", "none", "precision=float32", "output_dir=chosen"]),
    "train": (0, ["train", "recipe.yaml"]),
    "train_finished": (0, ["train", "recipe.yaml"]),
    "predict": (0, ["predict", RUN, "photos/test/ant/000.png"]),
    "evaluate": (0, ["evaluate", RUN]),
    "report": (0, ["report", RUN]),
    "export": (0, ["export", RUN, "--output", "exported"]),
    "demo": (0, ["demo", RUN, "--space", "space"]),
    "sweep": (0, ["sweep", "recipe.yaml", "training.num_train_epochs=1,2"]),
    "compare": (0, ["compare", RUN, "runs/again"]),
    "push": (2, ["push", RUN, "me/words"]),
    "train_unknown_key": (2, ["train", "recipe.yaml", "phases.head.learning_rat=1"]),
    "train_no_recipe": (2, ["train", "none.yaml"]),
}
_UNITS = "ms|s|min|h|B|kB|KB|MB|GB|KiB|MiB|GiB"


def normalised(text: str, place: Path) -> str:
    """The words without what differs from machine to machine and from run to run."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.replace(str(place), "PLACE"))
    text = re.sub(r"(?<![A-Za-z])[-+]?\d[\d,.]*(e[-+]?\d+)?", "#", text)
    text = re.sub(rf"# (?:{_UNITS})\b( # (?:{_UNITS})\b)*", "QUANTITY", text)
    text = re.sub(r"[─━═-]{3,}", "---", text)
    lines = [re.sub(r" {2,}", " ", line).rstrip() for line in text.splitlines()]
    return "\n".join(line for line in lines if line) + "\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    make_photos(
        folder / "photos",
        {f"{split}/{name}": 8 for split in ("train", "validation", "test") for name in ("ant", "bee")},
    )
    tiny.save(folder / "vit", "vit")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.mark.slow
def test_what_each_command_says(place, monkeypatch, capsys, subtests):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")
    for name, (code, words) in COMMANDS.items():
        if name == "compare":
            assert main(["train", "recipe.yaml", "name=again"]) == 0
            capsys.readouterr()
        with subtests.test(name):
            assert main(words) == code
            output, errors = capsys.readouterr()
            said = f"$ hfft {' '.join(words)}\n{normalised(output, place)}--- stderr ---\n{normalised(errors, place)}"
            compare(GOLDEN / f"{name}.txt", said)


def compare(file: Path, said: str) -> None:
    if not file.exists():
        file.write_text(said)
        pytest.fail(f"{file.name} was written: read it, and commit it")
    expected = file.read_text()
    difference = difflib.unified_diff(expected.splitlines(), said.splitlines(), file.name, "said now", lineterm="")
    assert said == expected, os.linesep.join(difference)
