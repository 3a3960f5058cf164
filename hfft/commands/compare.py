"""Finished runs side by side: a row for each, and for two runs what differs on the images that both have predicted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from hfft.errors import RunError
from hfft.metrics.intervals import Interval
from hfft.metrics.multilabel import LabelOutcomes, label_differences
from hfft.metrics.paired_tests import McNemar, differences, mcnemar
from hfft.metrics.scores import indicators_of, is_multi_label_table, logits_of
from hfft.runs.record import RunRecord
from hfft.system.text import listed

_SPLITS = ("test", "validation")


@dataclass(frozen=True)
class Row:
    """A run in a table."""

    run: str  # its folder
    images: int  # of the split that was compared
    metrics: dict[str, Interval]  # metric name to `value` and the ends of its 95 % interval
    details: dict[str, float]  # more metrics, without intervals
    phase: str  # the phase whose model it is
    trainable: int  # parameters that its largest phase trained
    seconds: float  # all it took
    # Of its model, as the run measured it: `agreement` of the old head's answers, `drift` and `cka` of what enters the
    # head, `nearest` neighbours that are right; empty where nothing was measured.
    retention: dict[str, float | None]


@dataclass(frozen=True)
class Pair:
    """Two runs on the same images."""

    first: str  # folder of the first run
    second: str  # folder of the second
    images: int  # that both have predicted
    # Metric name to the second run's minus the first's, with the ends of its 95 % interval.
    differences: dict[str, Interval]
    mcnemar: McNemar  # whether they are right equally often


@dataclass(frozen=True)
class Comparison:
    """What `compare` finds."""

    split: str  # what was compared
    rows: tuple[Row, ...]  # one for each run
    pair: Pair | None  # of two runs that have images and classes in common
    notes: tuple[str, ...]  # what a reader of the table must know


def compare(runs: Sequence[str | Path], *, split: str | None = None) -> Comparison:
    """Compare finished runs.

    Args:
        runs: Folders of two runs or more.
        split: `test` or `validation`; `test` where all runs have it, else `validation`, when None.

    Raises:
        RunError: If there are fewer than two, one of them isn't a finished run, or they have no split in common.
    """
    if len(runs) < 2:
        raise RunError("nothing to compare: give the folders of two runs or more")
    found = [_Finished(run) for run in runs]
    split = _common_split(found, split)
    notes = _notes(found, split)
    pair = None
    if len(found) == 2:
        first, second = found
        table, note = _paired(first, second, split)
        notes += [note] if note else []
        pair = None if table is None else _pair(first, second, table)
    return Comparison(split, tuple(run.row(split) for run in found), pair, tuple(notes))


class _Finished(RunRecord):
    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.check_finished()

    @property
    def source(self) -> tuple[str, str | None, str | None]:
        data = self.recipe.data
        return data.source, data.config, data.revision

    @property
    def splits(self) -> list[str]:
        return [split for split in _SPLITS if split in self.metrics]

    @property
    def labels(self) -> list[str]:
        return self.data["labels"]

    @property
    def task(self) -> str:
        return self.data.get("task", "single_label")

    def fingerprint(self, split: str) -> str:
        return self.data["splits"][split]["fingerprint"]

    def row(self, split: str) -> Row:
        seconds = self.metrics["seconds"]
        return Row(
            run=str(self.folder),
            images=self.data["splits"][split]["images"],
            metrics=self.metrics[split],
            details=self.metrics.get("details", {}).get(split, {}),
            phase=self.metrics.get("kept", {}).get("phase") or self.recipe.phases[-1].name,
            trainable=max(phase.plan.trainable for phase in self.phases),
            seconds=round(seconds.get("total", sum(seconds.values())), 3),
            retention=self._retention(),
        )

    def _retention(self) -> dict[str, float | None]:
        phases = self.metrics.get("retention", {}).get("phases", {})
        if not phases:
            return {}
        kept = self.metrics.get("kept", {}).get("phase")
        last = "interpolated" if "interpolated" in phases else kept if kept in phases else list(phases)[-1]
        old, entering = phases[last]["old_task"] or {}, phases[last]["head_input"] or {}
        return {
            "agreement": old.get("agreement"),
            "drift": entering.get("cosine_drift"),
            "cka": entering.get("cka"),
            "nearest": phases[last]["knn_accuracy"]["after"],
        }

    def predicted(self, split: str) -> pd.DataFrame:
        table = self.predictions.query("split == @split")
        if is_multi_label_table(table):  # lists can't be merged on
            table = table.assign(label=[tuple(sorted(names)) for names in table["label"]])
        return table


def _common_split(runs: Sequence[_Finished], asked: str | None) -> str:
    common = [split for split in _SPLITS if all(split in run.splits for run in runs)]
    if asked is None and common:
        return common[0]
    if asked in common:
        return asked
    had = "; ".join(f"{run.folder} has {' and '.join(run.splits) or 'none'}" for run in runs)
    raise RunError(f"no {asked or 'measured'} split that all runs have: {had}")


def _notes(runs: Sequence[_Finished], split: str) -> list[str]:
    notes = []
    first = runs[0]
    for run in runs[1:]:
        if run.task != first.task:
            notes.append(
                f"{run.folder} is {run.task.replace('_', '-')} and {first.folder} {first.task.replace('_', '-')}: "
                "their numbers answer different questions"
            )
        elif sorted(run.labels) != sorted(first.labels):
            notes.append(
                f"{run.folder} has other classes ({listed(run.labels, 3)}) than {first.folder} "
                f"({listed(first.labels, 3)}): their numbers answer different questions"
            )
        elif run.fingerprint(split) != first.fingerprint(split):
            notes.append(f"the {split} images of {run.folder} are not those of {first.folder}")
    return notes


def _paired(first: _Finished, second: _Finished, split: str) -> tuple[pd.DataFrame | None, str | None]:
    """Both runs' predictions of the images that they share, a row for each; or why there are none."""
    if first.task != second.task:
        return None, "no paired comparison, as images have one label in one run and any number in the other"
    if sorted(first.labels) != sorted(second.labels):
        return None, "no paired comparison, as the classes differ"
    same = first.fingerprint(split) == second.fingerprint(split)
    if not same and first.source != second.source:
        return None, f"no paired comparison, as the images are of other sources: {first.source[0]}, {second.source[0]}"
    tables = [run.predicted(split) for run in (first, second)]
    if not all(table["file"].is_unique for table in tables):
        return None, "no paired comparison, as some images have the same name"
    table = tables[0].merge(tables[1], on=["file", "label"], suffixes=(" first", " second"))
    if table.empty:
        return None, f"no paired comparison, as the runs have no {split} image in common"
    return table, None if same else f"paired are the {len(table):,} images that have name and label in common"


def _pair(first: _Finished, second: _Finished, table: pd.DataFrame) -> Pair:
    names = first.labels
    if is_multi_label_table(table):
        truth = indicators_of(table["label"], names)
        outcomes = [
            LabelOutcomes.of_logits(
                logits_of(table, names, f" {which}"), truth, indicators_of(table[f"prediction {which}"], names)
            )
            for which in ("first", "second")
        ]
        found = label_differences(*outcomes)
        right = [outcome.right for outcome in outcomes]
    else:
        both = [table[[f"probability {name} {which}" for name in names]].to_numpy() for which in ("first", "second")]
        labels = np.asarray(pd.Index(names).get_indexer(pd.Index(table["label"])))  # (N,)
        found = differences(both[0], both[1], labels)
        right = [probabilities.argmax(axis=1) == labels for probabilities in both]
    return Pair(str(first.folder), str(second.folder), len(table), found, mcnemar(*right))
