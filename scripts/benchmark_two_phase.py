"""Time the same fine-tuning job through plain Trainer code and through hfft, side by side.

    python scripts/prepare_quickstart.py
    python scripts/benchmark_two_phase.py --workload quickstart --seeds 0 1 2
    python scripts/benchmark_two_phase.py --workload vit_b16 --images 200

Every measurement is a process of its own (benchmark_jobs.py); in each round, of one seed, all variants run one after
the other, with the same checkpoint, splits, schedule, batch size and seed:

- `floor`: no way to train but a bound; what it is made of is said in benchmark_jobs.py.
- `plain-float32`, `plain-bfloat16`: Trainer code as a careful user writes it, without and with `bf16=True`.
- `hfft-off`: hfft without replay. `hfft`: as it comes, with an empty replay folder. `hfft-again`: the same run under
  another name, with the folder that `hfft` filled. `hfft-float32`: with replay in float32 alone.

The networks of all workloads but `quickstart` have random weights: their accuracy means nothing. FOLDER/results.jsonl
gets one line per measurement; a table of medians over the seeds is printed, with the ratio to plain-float32:

- whole: seconds from the start of the process to its end, when the test accuracy is known.
- a phase: seconds from its first line of code to its best weights, evaluations and checkpoints included; and the
  training images of all its epochs in that time.
- last epoch: seconds of the last phase's last epoch, of its steps alone and with evaluation and checkpoint.
- peak: largest memory of the process and its data loader workers; pages that they share count once (PSS; RSS, which
  counts them in each, outside of Linux). As that takes 20 ms to find out, it is done only when RSS, which is looked at
  four times per second, has grown by 2 %.
"""

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # comes with accelerate
import torch
from benchmark_jobs import Job
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessor

from hfft.data.sources.reading import load_data
from hfft.recipe.loading import load_recipe
from hfft.recipe.spec import DataSpec
from hfft.system.machine import describe_environment

ROOT = Path(__file__).resolve().parents[1]
VARIANTS: dict[str, tuple[str, ...]] = {  # in the order of a round, with the keys that hfft gets
    "floor": (),
    "plain-float32": (),
    "plain-bfloat16": (),
    "hfft-off": ("replay.mode=off",),
    "hfft": (),
    "hfft-again": (),
    "hfft-float32": ("precision=float32", "replay.dtype=float32"),
}
BASE = "plain-float32"
PERIOD = 0.25  # seconds between two looks at the memory
GROWTH = 1.02


def _recipe(name: str, phase: dict[str, Any], memory_format: str) -> dict[str, Any]:
    return {
        "name": name,
        "model": {"checkpoint": name, "memory_format": memory_format},
        "data": {"source": "data/elpv"},
        "training": {"weight_decay": 0.01, "metric_for_best_model": "log_loss"},
        "phases": [{"learning_rate": 1e-4, **phase}],
    }


_LAST_BLOCKS = {"name": "last-blocks", "unfreeze": {"blocks": 2}}
_LORA = {"name": "lora", "adapter": {"method": "lora", "on": "all", "r": 8, "lora_alpha": 16}}
WORKLOADS: dict[str, str | dict[str, Any]] = {
    "quickstart": str(ROOT / "recipes/quickstart.yaml"),
    "vit_b16": _recipe("vit", _LAST_BLOCKS, "contiguous"),
    "vit_b16_lora": _recipe("vit", _LORA, "contiguous"),
    "convnext_t": _recipe("convnext", _LAST_BLOCKS, "channels_last"),
    "convnext_t_lora": _recipe("convnext", _LORA, "channels_last"),
}


def random_checkpoint(model_type: str, folder: Path) -> Path:
    """The network of a type's default config, which is ViT-B/16 and ConvNeXt-T, with random weights."""
    torch.manual_seed(0)
    AutoModelForImageClassification.from_config(AutoConfig.for_model(model_type)).save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)
    return folder


def thin(source: Path, target: Path, train: int) -> Path:
    """Copy `train` training images, evenly spaced over the classes, and as large a share of the other splits."""
    shutil.rmtree(target, ignore_errors=True)
    splits = load_data(DataSpec(source=str(source)), 0).splits
    share = train / len(splits["train"])
    for split, rows in splits.items():
        for row in np.linspace(0, len(rows) - 1, max(round(share * len(rows)), 2)).round().astype(int):
            image = Path(rows[int(row)]["image"]["path"])
            file = target / split / image.parent.name / image.name
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image, file)
    return target


def shared_overrides(arguments: argparse.Namespace) -> list[str]:
    """Make checkpoint and images; returns what all variants change in the workload's recipe."""
    recipe = load_recipe(WORKLOADS[arguments.workload])
    folder, checkpoint, data = arguments.output, arguments.checkpoint, arguments.data
    if checkpoint is None and arguments.workload == "quickstart":
        checkpoint = ROOT / recipe.model.checkpoint
    elif checkpoint is None:
        checkpoint = random_checkpoint(recipe.model.checkpoint, folder / "checkpoints" / recipe.name)
    if arguments.images is not None:
        data = thin(data, folder / f"images-{arguments.images}", arguments.images)
    overrides = [f"model.checkpoint={checkpoint}", f"data.source={data}", f"output_dir={folder / 'runs'}"]
    overrides += [f"training.per_device_train_batch_size={arguments.batch}", f"replay.views={arguments.views}"]
    for phase in recipe.phases:
        epochs = arguments.head_epochs if phase.name == "head" else arguments.epochs
        overrides.append(f"phases.{phase.name}.num_train_epochs={epochs}")
    return overrides


def rounds(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure all variants once per seed."""
    folder = arguments.output
    shared = shared_overrides(arguments)
    for seed in arguments.seeds:
        for variant in (name for name in VARIANTS if name in arguments.variants):
            label = f"{arguments.workload}-{variant}-{seed}"
            overrides = [*shared, f"name={label}", f"seed={seed}", *VARIANTS[variant]]
            if variant.startswith("hfft"):
                overrides.append(f"replay.folder={folder / 'replay'}")
            if variant in ("hfft", "hfft-float32"):
                shutil.rmtree(folder / "replay", ignore_errors=True)
            job = Job(variant, WORKLOADS[arguments.workload], tuple(overrides), str(folder / f"{label}.json"))
            yield {"workload": arguments.workload, "seed": seed, **measure(job, folder / f"{label}.log")}
            shutil.rmtree(folder / "runs" / label, ignore_errors=True)


def measure(job: Job, log: Path) -> dict[str, Any]:
    """Run a job in a process of its own and watch it; returns what it measured, with its time and peak memory."""
    command = [sys.executable, str(ROOT / "scripts/benchmark_jobs.py"), json.dumps(asdict(job))]
    begun, peak, largest = time.perf_counter(), 0, np.zeros(2)
    with log.open("w", encoding="utf-8") as stream, subprocess.Popen(command, stdout=stream, stderr=stream) as process:
        while process.poll() is None:
            family = _family(process.pid)
            resident = _sizes(family, "memory_info")
            sizes = np.array([sum(resident[:1]), sum(resident)])
            if (sizes > GROWTH * largest).any():
                largest = np.maximum(sizes, largest)
                peak = max(peak, sum(_sizes(family, "memory_full_info")))
            time.sleep(PERIOD)
    seconds = time.perf_counter() - begun
    if process.returncode != 0:
        raise SystemExit(f"{job.variant} failed, see {log}:\n{log.read_text(encoding='utf-8')[-2000:]}")
    measured = json.loads(Path(job.result).read_text(encoding="utf-8"))
    said = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("INFO:hfft")]
    return {"variant": job.variant, "seconds": seconds, "peak_bytes": peak, **measured, "log": said}


def _family(pid: int) -> list[psutil.Process]:
    """A process and its descendants."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _sizes(family: Sequence[psutil.Process], method: str) -> list[int]:
    """Bytes of each process that still runs."""
    sizes = []
    for process in family:
        with suppress(psutil.NoSuchProcess):
            found = getattr(process, method)()
            sizes.append(getattr(found, "pss", found.rss))
    return sizes


def numbers(result: dict[str, Any]) -> dict[str, float]:
    """The rows of the table for one measurement."""
    found: dict[str, float] = {}
    if result["variant"] != "floor":
        found["whole (s)"] = result["seconds"]
    for name, phase in result["phases"].items():
        found[f"{name} (s)"] = phase["seconds"]
        found[f"{name} (images/s)"] = phase["images"] / phase["seconds"]
    if result["variant"] != "floor":
        last = [*result["phases"].values()][-1]["epochs"][-1]
        found |= {"last epoch, steps (s)": last["steps"], "last epoch, all (s)": last["all"]}
        found |= {"peak (GiB)": result["peak_bytes"] / 2**30, "test accuracy": result["accuracy"]}
    return found


def medians(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Variant to row to the median over the seeds."""
    rows: dict[str, dict[str, list[float]]] = {}
    for result in results:
        for name, value in numbers(result).items():
            rows.setdefault(result["variant"], {}).setdefault(name, []).append(value)
    return {variant: {name: statistics.median(v) for name, v in found.items()} for variant, found in rows.items()}


def table(found: dict[str, dict[str, float]]) -> Table:
    """Rows by variant; in brackets how many times faster than BASE."""
    shown = Table("", *found, box=box.MARKDOWN)
    for name in max(found.values(), key=len):
        base = found.get(BASE, {}).get(name)
        cells = []
        for variant, by_row in found.items():
            value = by_row.get(name)
            ratio = f" ({base / value:.2f}x)" if name.endswith("(s)") and base and value and variant != BASE else ""
            cells.append("" if value is None else f"{value:.4g}{ratio}")
        shown.add_row(name, *cells)
    return shown


def comparisons(found: dict[str, dict[str, float]]) -> list[str]:
    """Each phase of hfft beside its floor and beside the run that finds a filled cache."""
    lines = []
    for name, seconds in found.get("hfft", {}).items():
        if not name.endswith(" (s)") or name.startswith(("whole", "last epoch")):
            continue
        phase = name.removesuffix(" (s)")
        if name in found.get("floor", {}):
            lines.append(f"{phase}: hfft takes {seconds / found['floor'][name]:.2f} times the floor")
        if name in found.get("hfft-again", {}):
            again = found["hfft-again"][name]
            lines.append(f"{phase}: hfft-again takes {again / seconds:.1%} of hfft ({again - seconds:+.1f} s)")
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="quickstart")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS][:-1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="one round each")
    parser.add_argument("--images", type=int, help="training images, with as large a share of the others; default all")
    parser.add_argument("--head-epochs", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2, help="of the other phase")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--views", default="auto", help="replay.views of the recipe; the floor decodes as many")
    parser.add_argument("--data", type=Path, default=ROOT / "data/elpv", help="folder of images in train/CLASS/ ...")
    parser.add_argument("--checkpoint", type=Path, help="instead of the workload's own")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/benchmark", metavar="FOLDER")
    return parser


def main() -> None:
    """Measure, write and print."""
    arguments = _parser().parse_args()
    if "hfft-again" in arguments.variants and "hfft" not in arguments.variants:
        _parser().error("hfft-again needs the folder that hfft fills: add hfft to --variants")
    arguments.output = arguments.output.resolve()
    arguments.output.mkdir(parents=True, exist_ok=True)
    environment = describe_environment() | {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    results: list[dict[str, Any]] = []
    with (arguments.output / "results.jsonl").open("a", encoding="utf-8") as stream:
        print(json.dumps({"environment": environment}), file=stream, flush=True)
        try:
            for result in rounds(arguments):
                results.append(result)
                print(json.dumps(result), file=stream, flush=True)
                seconds = f"{result['seconds']:.1f} s"
                print(f"seed {result['seed']} {result['variant']}: {seconds}", file=sys.stderr, flush=True)
        finally:  # what was measured is shown, whatever ended it
            if results:
                show(results, environment)


def show(results: Sequence[dict[str, Any]], environment: dict[str, Any]) -> None:
    """Print machine, command, table, comparisons, and what hfft said of replay in the first round."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    print(f"{shlex.join(sys.argv)}\n{environment['date']}, commit {environment['git_commit']}")
    print(f"{environment['cores']} cores, {results[0]['threads']} threads, {environment['system']}, {versions}")
    seeds = dict.fromkeys(result["seed"] for result in results)
    print(f"{results[0]['train_images']} training images; seeds {', '.join(map(str, seeds))}\n")
    found = medians(results)
    Console(width=250).print(table(found))
    print("\n".join(comparisons(found)))
    for result in results:
        for line in result["log"]:
            if result["seed"] == results[0]["seed"] and ("replay" in line or "frozen pass" in line):
                print(f"{result['variant']}: {line.split(':', 2)[2].removeprefix('[RANK 0] ')}")


if __name__ == "__main__":
    main()
