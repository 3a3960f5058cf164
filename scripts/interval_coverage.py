"""How often the 95 % intervals of metrics.json hold the truth, by simulation: the table of docs/evaluation.md.

python scripts/interval_coverage.py [--repeats 1000]
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from hfft.metrics.intervals import Interval, with_intervals
from hfft.metrics.metrics import measure, tally
from hfft.metrics.multilabel import LabelOutcomes, label_intervals
from hfft.metrics.paired_tests import differences
from hfft.report.words import spoken

Found = dict[str, Interval]

# Images of each class, and the accuracy of each class or of all.
CASES: tuple[tuple[str, Sequence[int], float | Sequence[float]], ...] = (
    ("5 + 5, accuracy 0.70", [5, 5], 0.7),
    ("5 + 5, accuracy 0.99", [5, 5], 0.99),
    ("10 + 10, accuracy 0.90", [10, 10], 0.9),
    ("15 + 15, accuracy 0.95", [15, 15], 0.95),
    ("30 + 30, accuracy 0.95", [30, 30], 0.95),
    ("100 + 100, accuracy 0.98", [100, 100], 0.98),
    ("328 + 328, accuracy 0.87", [328, 328], 0.87),
    ("20 + 5, accuracy 0.90", [20, 5], 0.9),
    ("30 classes of 1, accuracy 0.80", [1] * 30, 0.8),
    ("20 classes of 3, accuracy 0.80", [3] * 20, 0.8),
    ("9 classes of 50 at 0.95, 1 of 5 at 0.70", [5] + [50] * 9, [0.7] + [0.95] * 9),
    ("200 at 0.95, 20 at 0.70, 2 at 0.40", [200, 20, 2], [0.95, 0.7, 0.4]),
)
SETS = ((10, 5), (40, 5), (100, 5), (400, 5))  # images, labels
PAIRS = (([15, 15], 0.05, 0.9), ([20, 5], 0.3, 0.7), ([50, 50], 0.1, 0.5), ([300, 300], 0.2, 0.6))


def main() -> None:
    """Print three tables of coverages in percent, with mean widths in brackets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000, help="simulated test sets for each row")
    repeats = parser.parse_args().repeats
    rows = {}
    for title, sizes, recall in CASES:
        found = simulated(repeats, lambda rng, s=sizes, r=recall: with_intervals(*classified(rng, s, r)))
        rows[title] = cells(found, truth_of(sizes, recall))
    print_table("images of each class", rows)
    rows = {}
    for images, labels in SETS:
        truth = LabelOutcomes.of_logits(*labelled(np.random.default_rng(1), 200_000, labels)).metrics
        draw = partial(labelled, images=images, labels=labels)
        found = simulated(max(repeats // 5, 1), lambda rng, d=draw: label_intervals(LabelOutcomes.of_logits(*d(rng))))
        rows[f"{images} x {labels}"] = cells(found, truth)
    print_table("images x labels", rows)
    rows = {}
    for sizes, differing, better in PAIRS:
        draw = partial(paired, sizes=sizes, differing=differing, better=better)
        found = simulated(repeats, lambda rng, d=draw: differences(*d(rng)))
        value = differing * (2 * better - 1)
        title = f"{' + '.join(map(str, sizes))}: {differing:.0%} differ, {better:.0%} of those are right by the second"
        rows[title] = cells(found, {"accuracy": value, "balanced_accuracy": value})
    print_table("two models", rows)


def classified(
    rng: np.random.Generator, sizes: Sequence[int], recall: float | Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (N, K) that are right as often as `recall` says, more or less sure, and labels (N,)."""
    classes = len(sizes)
    labels = np.repeat(np.arange(classes), sizes)
    is_right = rng.random(len(labels)) < np.broadcast_to(recall, classes)[labels]
    given = np.where(is_right, labels, (labels + rng.integers(1, classes, len(labels))) % classes)
    logits = np.zeros((len(labels), classes))
    logits[np.arange(len(labels)), given] = rng.gamma(4, 1, len(labels)) + 0.01
    shares = np.exp(logits)
    return shares / shares.sum(axis=1, keepdims=True), labels


def truth_of(sizes: Sequence[int], recall: float | Sequence[float]) -> Mapping[str, float]:
    """The metrics of very many such images, in these proportions."""
    many = [size * max(1, 1_000_000 // sum(sizes)) for size in sizes]
    probabilities, labels = classified(np.random.default_rng(1), many, recall)
    return measure(tally(probabilities, labels))


def labelled(rng: np.random.Generator, images: int, labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, K) that know something of the labels (N, K), the first of which are frequent and the last rare."""
    shares = np.linspace(0.5, 0.1, labels)
    truth = rng.random((images, labels)) < shares
    return rng.normal(size=truth.shape) + 2.5 * (truth - 0.5) + np.log(shares / (1 - shares)) / 2, truth


def paired(rng: np.random.Generator, sizes: Sequence[int], differing: float, better: float) -> tuple[np.ndarray, ...]:
    """Probabilities of two models that differ on a share of the images, and labels."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    is_one = rng.random(len(labels)) < differing
    is_second = is_one & (rng.random(len(labels)) < better)
    wrong = (labels + 1) % len(sizes)
    first, second = (np.eye(len(sizes))[np.where(w, wrong, labels)] for w in (is_second, is_one & ~is_second))
    return first, second, labels


def simulated(repeats: int, draw: Callable[[np.random.Generator], Found]) -> list[Found]:
    """Intervals of many test sets."""
    rng = np.random.default_rng(0)
    return [draw(rng) for _ in range(repeats)]


def cells(found: Sequence[Found], truth: Mapping[str, float]) -> dict[str, str]:
    """By metric, how often no interval misses the truth, its mean width, and how often there is one."""
    texts = {}
    for name, value in truth.items():
        ends = np.array([(one[name]["low"], one[name]["high"]) for one in found if one[name]["low"] is not None])
        if not len(ends):
            texts[name] = "too few"
            continue
        missed = np.sum((ends[:, 0] > value + 1e-9) | (value - 1e-9 > ends[:, 1]))
        known = "" if len(ends) == len(found) else f", {len(ends) / len(found):.0%} have one"
        texts[name] = f"{100 * (1 - missed / len(found)):.1f} ({np.mean(ends[:, 1] - ends[:, 0]):.2f}{known})"
    return texts


def print_table(title: str, rows: Mapping[str, Mapping[str, str]]) -> None:
    """A table in Markdown."""
    names = list(next(iter(rows.values())))
    print(f"| {title} | {' | '.join(map(spoken, names))} |")
    print("|---" * (1 + len(names)) + "|")
    for row, texts in rows.items():
        print(f"| {row} | {' | '.join(texts[name] for name in names)} |")
    print(flush=True)


if __name__ == "__main__":
    main()
