"""Kill a run with SIGKILL at random moments, continue it each time, and compare with the run that was left alone.

    python scripts/kill_and_continue.py --kills 20

The recipe has three phases (head, last blocks, LoRA) on a small ViT with random weights and dropout, and 240 generated
images. Each trial is a run of its own that is killed once:

- `time`: at a random moment between the first phase's begin and the end.
- `saving`, `recording`: while a file of the run folder, or of the replay folder, is written; which one is random.

Then the same command goes on. Weights, metrics and predictions must be those of the uninterrupted run, bit for bit.
A row per trial is printed; the exit code is 1 if one of them differs.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

RECIPE = """
name: whole
model: {checkpoint: checkpoint}
data: {source: photos, augment: {crop: [0.6, 1.0], flip: true}}
training:
  {per_device_train_batch_size: 8, num_train_epochs: 2, dataloader_num_workers: 0, eval_strategy: steps, eval_steps: 8}
precision: float32
replay: {mode: force, engine: torch, views: 2}
phases:
  - {name: head, unfreeze: head, learning_rate: 1.0e-2}
  - {name: last-blocks, unfreeze: {blocks: 2}, learning_rate: 1.0e-3}
  - {name: lora, adapter: {method: lora, on: attention, r: 4, lora_dropout: 0.1}, learning_rate: 1.0e-3}
"""
CHECKPOINT = """
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor
torch.manual_seed(0)
config = ViTConfig(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96, image_size=32,
                   patch_size=8, hidden_dropout_prob=0.1)
ViTForImageClassification(config).save_pretrained("checkpoint")
ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained("checkpoint")
"""
POLL = 0.001  # seconds
KINDS = ("time", "saving", "recording")


def prepare(folder: Path) -> None:
    """Recipe, checkpoint and images."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    subprocess.run([sys.executable, "-c", CHECKPOINT], cwd=folder, check=True, capture_output=True)
    rng = np.random.default_rng(0)
    for split, count in (("train", 160), ("validation", 40), ("test", 40)):
        for number in range(count):
            label = number % 2
            pixels = rng.integers(0, 160, (36, 36, 3), dtype=np.uint8)
            pixels[..., 2 * label] += 60
            file = folder / "photos" / split / ("red", "blue")[label] / f"{number:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)


def start(folder: Path, name: str, replay: str) -> subprocess.Popen[str]:
    """The command of a trial; all of its files lie in a folder of its own."""
    overrides = [f"name={name}", f"output_dir=runs-{replay}/{name}"]
    overrides += ["replay.mode=off"] if replay == "off" else []
    command = [sys.executable, "-m", "hfft", "train", "recipe.yaml", *overrides]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for the end of a run, which must be a good one."""
    output, _ = process.communicate()
    if process.returncode != 0:
        sys.exit(f"the run failed:\n{output}")


def fingerprint(run: Path) -> dict[str, str]:
    """Hashes of what the run ends with."""
    metrics = json.loads((run / "metrics.json").read_text())
    del metrics["seconds"]
    table = pd.read_parquet(run / "predictions.parquet")
    weights = [path for name in ("model", "adapter") for path in sorted(run.glob(f"{name}/*.safetensors"))]
    files = {path.relative_to(run).as_posix(): path.read_bytes() for path in weights}
    predictions = table.to_json() or ""
    files |= {"metrics": json.dumps(metrics, sort_keys=True).encode(), "predictions": predictions.encode()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def partials(folder: Path, *, replay: bool) -> Iterator[Path]:
    """What is being written; `os.walk` doesn't mind folders that are removed meanwhile."""
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(place, name)
            if fnmatch(name, ".*partial") and (".replay" in path.parts) == replay:
                yield path


def kill(process: subprocess.Popen[str], ripe: Callable[[], bool]) -> float | None:
    """SIGKILL when the moment has come; seconds since the start, or None if the run was over before."""
    begun = time.monotonic()
    while process.poll() is None:
        if ripe():
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return time.monotonic() - begun
        time.sleep(POLL)
    return None


def moment(kind: str, folder: Path, seconds: tuple[float, float], rng: random.Random) -> Callable[[], bool]:
    """Says whether it is time to kill."""
    if kind == "time":
        end = time.monotonic() + rng.uniform(*seconds)
        return lambda: time.monotonic() >= end
    wanted = rng.randint(1, 8 if kind == "saving" else 3)
    inodes: set[int] = set()

    def ripe() -> bool:
        for path in partials(folder, replay=kind == "recording"):
            try:
                inode = path.stat().st_ino
            except FileNotFoundError:
                continue
            inodes.add(inode)
        return len(inodes) >= wanted

    return ripe


def measure(folder: Path, replay: str) -> tuple[float, float]:
    """Run without being killed; returns the seconds of the first phase's begin and of the end."""
    begun, process = time.monotonic(), start(folder, "whole", replay)
    first, runs = 0.0, folder / f"runs-{replay}" / "whole" / "whole"
    while process.poll() is None:
        if not first and (runs / "recipe.yaml").exists():
            first = time.monotonic() - begun
        time.sleep(POLL)
    finish(process)
    return first, time.monotonic() - begun


def main() -> int:
    """Run the trials; 1 if one of them ended in other numbers."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="trials with replay, and as many without")
    parser.add_argument("--replay", nargs="+", choices=("on", "off"), default=("on", "off"))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder when left out")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="hfft-kills-"))
    prepare(folder)
    rng = random.Random(arguments.seed)
    table = Table("replay", "kind", "killed after", "what there was", "same as uninterrupted", box=box.MARKDOWN)
    bad = 0
    for replay in arguments.replay:
        seconds = measure(folder, replay)
        expected = fingerprint(folder / f"runs-{replay}" / "whole" / "whole")
        kinds = KINDS if replay == "on" else KINDS[:2]
        for number in range(arguments.kills):
            kind, name = kinds[number % len(kinds)], f"kill-{number}"
            place = folder / f"runs-{replay}" / name
            after = None
            while after is None:  # a run may be over before its moment comes
                shutil.rmtree(place, ignore_errors=True)
                after = kill(start(folder, name, replay), moment(kind, place, seconds, rng))
            found = (
                ", ".join(sorted(path.parent.name for path in place.glob("*/*/result.json"))) or "no finished phase"
            )
            finish(start(folder, name, replay))
            is_same = fingerprint(place / name) == expected
            bad += not is_same
            when = f"{after:.2f} s of {seconds[1]:.2f} s"
            table.add_row(replay, kind, when, found, "yes" if is_same else "NO")
            print(f"replay {replay}, {kind}: killed {when}, {found}: {'same' if is_same else 'DIFFERENT'}", flush=True)
            shutil.rmtree(place, ignore_errors=True)
    Console(width=120).print(table)
    total = len(arguments.replay) * arguments.kills
    print(f"{total - bad} of {total} ended bit-equal")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
