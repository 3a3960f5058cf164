"""`hfft sweep`: a real grid, stopped, continued, and with a run that fails."""

from pathlib import Path

import pytest

import hfft
from hfft.cli import main

RECIPE = """
name: base
model: {checkpoint: vit}
data: {source: photos}
training: {per_device_train_batch_size: 8, dataloader_num_workers: 0, disable_tqdm: true, max_steps: 2}
precision: float32
report: false
phases:
  - {name: head, unfreeze: head}
"""
SPLITS = {f"{split}/{name}": 6 for split in ("train", "validation", "test") for name in ("ant", "bee")}
GRID = ["sweep", "recipe.yaml", "phases.head.learning_rate=1e-2,1e-3", "output_dir=out"]


@pytest.fixture
def workplace(work_with):
    return work_with(RECIPE, SPLITS)


def test_a_grid_runs_is_compared_and_is_not_run_twice(workplace, capsys):
    assert main(GRID) == 0
    shown = capsys.readouterr()
    names = ["base-learning_rate-1e-2", "base-learning_rate-1e-3"]
    runs = [hfft.Run(Path("out") / name) for name in names]
    rates = [run.recipe.phases[0].arguments["learning_rate"] for run in runs]
    assert rates == [1e-2, 1e-3]
    assert "run 2 of 2: base-learning_rate-1e-3" in shown.err
    assert shown.err.count("images recorded in") == 1  # the second run has the first one's
    assert "out/base-learning_rate-1e-3 minus out/base-learning_rate-1e-2, on the 12 images of both:" in shown.out
    alone = hfft.finetune(hfft.load_recipe("recipe.yaml", ["phases.head.learning_rate=1e-3", "name=alone"]))
    assert alone.predictions.equals(runs[1].predictions)

    (runs[1].folder / "metrics.json").unlink()  # as if it had been killed
    assert main([*GRID, "--html", "grid.html"]) == 0
    assert "2 runs side by side" in Path("grid.html").read_text(encoding="utf-8")
    again = capsys.readouterr().err
    assert f"{runs[0].folder} is finished" in again
    assert f"{runs[1].folder} is finished" not in again
    assert runs[1].is_finished


def test_a_run_that_fails_does_not_stop_the_others(workplace, capsys):
    grid = ["sweep", "recipe.yaml", "phases.head.unfreeze={blocks: 9},head,{blocks: 1}"]
    assert main(grid) == 1
    shown = capsys.readouterr()
    assert "error: 1 of 3 runs failed; the same command tries them again:\n  base-unfreeze-blocks_9: " in shown.err
    assert "the network has 4" in shown.err
    assert "runs/base-unfreeze-head" in shown.out
    assert "runs/base-unfreeze-blocks_1" in shown.out


def test_a_bad_value_is_found_before_anything_runs(workplace, capsys):
    assert main(["sweep", "recipe.yaml", "seed=0,-1"]) == 2
    assert "seed: found -1" in capsys.readouterr().err
    assert not Path("runs").exists()
