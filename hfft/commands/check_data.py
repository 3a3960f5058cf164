"""A source or a recipe -> what is wrong with its images, without training: `hfft check-data`."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from hfft.data.audit.audit import Audit, audit
from hfft.data.audit.filtering import gray_of, joined
from hfft.data.audit.findings import KINDS, Finding, in_order, list_findings
from hfft.data.sources.advice import check_found
from hfft.data.sources.class_folders import find_ignored
from hfft.data.sources.folders import CLASS_FOLDER, SPLIT_NAMES
from hfft.data.sources.labels import class_names, count_keys
from hfft.data.sources.reading import choose_splits, load_data, read_source
from hfft.errors import DataError
from hfft.recipe.loading import load_recipe
from hfft.recipe.spec import DataSpec
from hfft.system.distributed import kept_warnings
from hfft.system.files import folder_at

_RECIPES = (".yaml", ".yml")


@dataclass(frozen=True)
class SplitSummary:
    """The images of a split."""

    images: int  # how many
    counts: dict[str, int]  # class to its number of images
    # Width and height in pixels of the `smallest`, `median` and `largest` image; None where no header was read.
    sizes: dict[str, list[int]] | None


@dataclass(frozen=True)
class DataCheck:
    """What was found."""

    splits: dict[str, SplitSummary]  # by name
    findings: tuple[Finding, ...]  # in the order of `KINDS`
    warnings: tuple[str, ...] = ()  # what was said while the source was read

    @property
    def exit_code(self) -> int:
        """1 if something would stop training or make its numbers wrong."""
        return int(any(finding.severity == "harm" for finding in self.findings))

    @property
    def conclusion(self) -> str:
        """One line."""
        images = sum(split.images for split in self.splits.values())
        harm = sum(finding.severity == "harm" for finding in self.findings)
        notes = len(self.findings) - harm
        if not self.findings:
            warned = f"no findings; see the warnings above: {len(self.warnings)}"
            return f"{images:,} images, {warned if self.warnings else 'nothing found'}"
        return f"{images:,} images; findings that stop training or spoil its numbers: {harm}, to know of: {notes}"

    def by_kind(self) -> dict[str, list[Finding]]:
        """The findings of each kind, those that do harm first."""
        kinds = {kind: [finding for finding in self.findings if finding.kind == kind] for kind in KINDS}
        return {kind: findings for kind, findings in kinds.items() if findings}

    def to_dict(self) -> dict[str, Any]:
        """As `hfft check-data --json` prints it."""
        return {
            "splits": {name: asdict(split) for name, split in self.splits.items()},
            "findings": [finding.to_dict() for finding in self.findings],
            "warnings": self.warnings,
        }

    def summary(self) -> list[tuple[str, ...]]:
        """Split, images, classes and sizes, as a table."""
        rows = []
        for name, split in self.splits.items():
            sizes = ("-", "-", "-") if split.sizes is None else (f"{w} x {h}" for w, h in split.sizes.values())
            classes = sum(count > 0 for count in split.counts.values())
            rows.append((name, f"{split.images:,}", str(classes), *sizes))
        return rows

    def class_counts(self) -> list[tuple[str, ...]]:
        """Class and its number of images in each split, as a table."""
        labels = list(next(iter(self.splits.values())).counts)
        return [(label, *(f"{split.counts[label]:,}" for split in self.splits.values())) for label in labels]


def check_data(source: str, overrides: Sequence[str] = ()) -> DataCheck:
    """Audit a source as it is, or the splits that a recipe makes of it.

    Args:
        source: What `data.source` of a recipe may be, or the path of a recipe.
        overrides: As for `load_recipe`.

    Raises:
        HfftError: If the source can't be read at all, or the recipe is wrong.
    """
    with kept_warnings() as warnings:
        found = _check_source(source, overrides)
    return dataclasses.replace(found, warnings=tuple(warnings))


def _check_source(source: str, overrides: Sequence[str]) -> DataCheck:
    if source.lower().endswith(_RECIPES) and Path(source).is_file():
        recipe = load_recipe(source, overrides)
        return _check(load_data(recipe.data, recipe.seed).splits, recipe.data)
    # A recipe's own checks, of a recipe that has nothing but data.
    rest = {"name": "check", "model": {"checkpoint": "none"}, "phases": [{"name": "head"}]}
    spec = load_recipe({**rest, "data": {"source": source}}, overrides).data
    if spec.splits != DataSpec(source=source).splits:
        return _check(load_data(spec, 0).splits, spec)
    found = read_source(spec)
    train = next((name for name in found.splits if name.lower() in SPLIT_NAMES["train"]), next(iter(found.splits)))
    try:
        labels = choose_splits(found, spec, 0).labels
    except DataError:
        if not any(map(len, found.splits.values())):
            raise
        check = _check(found.splits, spec, train)
        if check.exit_code == 0:  # no finding says why training refuses the source
            raise
        return check
    check = _check(found.splits, spec, train)
    return dataclasses.replace(check, findings=tuple(_unused(finding, labels) for finding in check.findings))


def _unused(finding: Finding, labels: Sequence[str]) -> Finding:
    """A finding on data that trains: rows without a label and classes without rows are in unused splits."""
    is_class = finding.kind == "empty class" and finding.detail.rpartition(": ")[0] not in labels
    if is_class or finding.kind == "unlabelled":
        return dataclasses.replace(finding, kind="left out", detail=f"{finding.detail}, in no split that is used")
    return finding


def _check(splits: Mapping[str, Dataset], spec: DataSpec, train: str = "train") -> DataCheck:
    labels = class_names(next(iter(splits.values())))
    rows = joined(splits.values())
    check_found(rows, spec.source)
    done = audit(rows, spec.audit, background=spec.background, cached_for=spec.source)
    ends = np.cumsum([len(part) for part in splits.values()])
    numbers = dict(zip(splits, np.split(np.arange(len(rows)), ends[:-1]), strict=True))
    gray = gray_of(rows, spec.background) if spec.audit == "full" else None
    findings = list_findings(done, numbers, labels, train=train, gray=gray)
    folder = folder_at(spec.source)
    image = rows[0]["image"]
    is_of_files = image is not None and image["bytes"] is None and "?" not in image["path"]
    if folder is not None and is_of_files:
        ignored = find_ignored(folder, set(rows["file"][:]), by_folder=spec.label_column == CLASS_FOLDER)
        findings += [Finding("left out", reason, (name,), 1) for name, reason in ignored]
    summaries = {name: _summarize(done, part, labels) for name, part in numbers.items()}
    return DataCheck(summaries, tuple(in_order(findings)))


def _summarize(done: Audit, numbers: np.ndarray, labels: Sequence[str]) -> SplitSummary:
    records = done.records[numbers]
    known = records[records["width"] > 0]
    sizes = None
    if len(known):
        order = np.argsort(known["width"].astype(np.int64) * known["height"], kind="stable")
        chosen = {"smallest": order[0], "median": order[len(order) // 2], "largest": order[-1]}
        sizes = {name: [int(known["width"][row]), int(known["height"][row])] for name, row in chosen.items()}
    counts = count_keys(done.labels[numbers], len(labels)).tolist()
    return SplitSummary(len(numbers), dict(zip(labels, counts, strict=True)), sizes)
