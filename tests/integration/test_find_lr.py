"""`hfft find-lr`: a real range test of a phase, and its curve."""

import json
import logging
from pathlib import Path

import pytest

import hfft
from hfft.cli import main

RECIPE = """
name: base
model: {checkpoint: vit}
data: {source: photos}
training: {per_device_train_batch_size: 4, dataloader_num_workers: 0, disable_tqdm: true}
precision: float32
phases:
  - {name: head, unfreeze: head, max_steps: 2, learning_rate: 1.0e-2}
  - {name: last, unfreeze: {blocks: 1}, num_train_epochs: 1, learning_rate: 1.0e-4, head_learning_rate: 1.0e-3}
"""
SPLITS = {f"{split}/{name}": 6 for split in ("train", "validation", "test") for name in ("ant", "bee")}
SEARCH = ["find-lr", "recipe.yaml", "--steps", "30"]


@pytest.fixture
def workplace(work_with):
    return work_with(RECIPE, SPLITS)


def test_a_rate_is_found_and_no_run_is_left(workplace, capsys):
    assert main([*SEARCH, "--json", "--figure", "rates.png"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["phase"] == "last"
    assert len(found["learning_rates"]) == len(found["losses"]) == len(found["smoothed"])
    assert found["learning_rates"][0] == pytest.approx(1e-6)
    assert found["learning_rates"] == sorted(found["learning_rates"])
    assert found["suggestion"] is None or found["suggestion"] <= found["lowest_loss_at"]
    assert Path("rates.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in Path("runs").iterdir()] == [".replay"]


def test_the_same_bits_twice(workplace):
    recipe = hfft.load_recipe("recipe.yaml")
    one, other = (hfft.find_lr(recipe, steps=12, highest=1e-2) for _ in range(2))
    assert one == other


def test_what_replay_recorded_serves_the_run(workplace, caplog):
    recipe = hfft.load_recipe("recipe.yaml", ["replay.mode=force"])
    hfft.find_lr(recipe, steps=10, highest=1e-2)
    with caplog.at_level(logging.INFO):
        caplog.clear()
        hfft.finetune(recipe)
    assert not [line for line in caplog.messages if "images recorded in" in line]
    assert len([line for line in caplog.messages if "recorded before" in line]) == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--phase", "heads"], "head, last"),
        (["--steps", "3"], "10"),
        (["--figure", "nowhere/rates.png"], "nowhere"),
        (["--figure", "rates.txt"], ".svg"),
        (["phases.last.solver=lbfgs"], "solver"),
    ],
)
def test_what_cannot_be_tried_is_one_error(workplace, capsys, arguments, named):
    assert main(["find-lr", "recipe.yaml", *arguments]) == 2
    assert named in capsys.readouterr().err
    assert not Path("runs").exists() or not any(Path("runs").iterdir())


def test_a_solved_head_has_no_rate(workplace):
    solved = hfft.load_recipe("recipe.yaml", ["phases=[{name: head, unfreeze: head}]"])
    with pytest.raises(hfft.RecipeError, match=r"phases\.head"):
        hfft.find_lr(solved)
