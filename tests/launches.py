"""Runs of several real processes, and what their results must have in common."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tiny
import torch
import warm
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
ALONE = [sys.executable]
STREAMS = ("stdout", "stderr")
RECIPE = """
name: NAME
model: {checkpoint: FAMILY}
data: {source: photos, augment: {crop: [0.6, 1.0], flip: true}}
training: {optim: sgd, learning_rate: 0.05, dataloader_num_workers: 0, num_train_epochs: 2}
precision: float32
phases:
  - {name: head, unfreeze: head}
  - {name: all, unfreeze: all}
"""
PHASES = """
name: of_vit
model: {checkpoint: vit}
data: {source: photos, augment: {crop: [0.6, 1.0], flip: true}}
training: {dataloader_num_workers: 0, num_train_epochs: 3, logging_steps: 1, weight_decay: 0.05, max_grad_norm: 0.3}
precision: float32
keep: last
phases:
  - {name: head, unfreeze: head, optim: sgd, learning_rate: 0.05}
  - {name: blocks, unfreeze: {blocks: 2}, layer_decay: 0.5, head_learning_rate: 0.02, optim: sgd, learning_rate: 0.1,
     early_stopping: 1}
  - {name: lora, adapter: {on: attention}, optim: adamw_torch, adam_epsilon: 1.0e-3, learning_rate: 0.01}
"""
LORA = "  - {name: lora, adapter: {on: attention}}\n"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(config: str = "cpu2.yaml", *options: Any) -> list[Any]:
    """The beginning of a command, by a configuration of recipes/accelerate."""
    file = ROOT / "recipes/accelerate" / config
    return [*ACCELERATE, "--config_file", file, "--main_process_port", free_port(), *options]


def run(
    command: Sequence[Any], folder: Path, *, gpus: bool = False, fresh: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run to the end; GPUs are hidden unless asked for.

    It and the processes that it launches are forked from one that has imported everything; a `fresh` one has a command
    line of its own.
    """
    hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    env = {**os.environ, **hidden, **environment}
    if fresh:
        words = [*map(str, command)]
        return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)
    return warm.run(command, cwd=folder, env=env)


def succeed(command: Sequence[Any], folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """`run`, with exit code 0."""
    done = run(command, folder, **options)
    assert done.returncode == 0, done.stderr
    return done


def run_jobs(
    jobs: Mapping[str, Sequence[str]], folder: Path, *launching: Any, kind: str = ""
) -> dict[str, subprocess.CompletedProcess[str]]:
    """Commands of hfft by name, one after the other in one launch of two processes; all end with exit code 0.

    Args:
        jobs: The words of each command line.
        folder: Where they run; what they write is kept in its folder `jobs`.
        launching: Arguments of `launch`.
        kind: `fsdp` for FSDP 2 on CPUs.
    """
    place = folder / "jobs"
    place.mkdir()
    (place / "jobs.json").write_text(json.dumps(jobs))
    succeed([*launch(*launching), "-m", "jobs", place / "jobs.json", *([kind] if kind else [])], folder)
    outputs = {name: [f"{name}.{rank}.{stream}" for stream in STREAMS for rank in (0, 1)] for name in jobs}
    texts = {name: [(place / file).read_text() for file in files] for name, files in outputs.items()}
    return {
        name: subprocess.CompletedProcess(list(jobs[name]), 0, "".join(text[:2]), "".join(text[2:]))
        for name, text in texts.items()
    }


def write_recipe(folder: Path, family: str) -> None:
    """`family.yaml` and its checkpoint, without dropout, whose random numbers differ by process."""
    is_vit = family in ("vit", "dinov2")
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if is_vit else {}
    tiny.save(folder / family, family, **changes)
    recipe = RECIPE.replace("NAME", f"of_{family}").replace("FAMILY", family)
    (folder / f"{family}.yaml").write_text(recipe + (LORA if family == "dinov2" else ""))


def write_phases(folder: Path) -> None:
    """`vit.yaml`: head, blocks with rates of their own that stop early, LoRA; and its checkpoint, without dropout."""
    tiny.save(folder / "vit", "vit", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (folder / "vit.yaml").write_text(PHASES)


def train(family: str, output: str, replay: str, batch: int, accumulated: int = 1, module: str = "hfft") -> list[str]:
    """The end of a command; only with `output` two, of a run that draws its report.

    `module` may be one that stands for hfft, such as `fsdp_on_cpu`.
    """
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
    overrides = [f"training.{name}={value}" for name, value in sizes.items()]
    overrides += [f"output_dir={output}", f"replay.mode={replay}", f"report={str(output == 'two').lower()}"]
    return ["-m", module, "train", f"{family}.yaml", *overrides]


def assert_same_result(
    workplace: Path, family: str, one: str, two: str, tolerance: float = 1e-6, images: int = 18
) -> list[str]:
    """Weights after each phase and predictions of one process and of two; returns the phases' folders."""
    runs = [workplace / name / f"of_{family}" for name in (one, two)]
    environments = [json.loads((folder / "environment.json").read_text()) for folder in runs]
    assert [environment["processes"] for environment in environments] == [1, 2]
    phases = sorted(path.parent.name for path in runs[0].glob("*/result.json"))
    for name in [*(f"{phase}/*/*.safetensors" for phase in phases), "model/model.safetensors"]:
        weights = [load_file(next(folder.glob(name))) for folder in runs]
        assert weights[0].keys() == weights[1].keys()
        for key in weights[0]:
            torch.testing.assert_close(weights[1][key], weights[0][key], rtol=1e-4, atol=tolerance)
    tables = [pd.read_parquet(folder / "predictions.parquet") for folder in runs]
    assert len(tables[1]) == images
    assert tables[1]["file"].is_unique
    columns = ["split", "file", "label", "prediction"]
    assert tables[0][columns].equals(tables[1][columns])
    for name in [column for column in tables[0].columns if column.startswith("probability")]:
        np.testing.assert_allclose(tables[1][name], tables[0][name], atol=10 * tolerance)
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in runs]
    assert metrics[0]["kept"]["phase"] == metrics[1]["kept"]["phase"]
    for name, row in metrics[0]["baselines"].items():
        other = metrics[1]["baselines"][name]
        assert other["about"] == row["about"]
        headline = next(iter(row["test"]))
        assert other["test"][headline] == row["test"][headline]
        np.testing.assert_allclose(other["test"]["log_loss"]["value"], row["test"]["log_loss"]["value"], atol=1e-4)
    return phases
