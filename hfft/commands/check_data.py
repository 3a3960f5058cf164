"""A source or a recipe -> everything that is to know of its images, without training: `hfft check-data`."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from hfft.data.audit.audit import Audit, Look, audit
from hfft.data.audit.filtering import gray_of, joined
from hfft.data.audit.findings import KINDS, Finding, Splits, find
from hfft.data.sources.advice import check_found
from hfft.data.sources.class_folders import find_ignored
from hfft.data.sources.labels import class_names, count_keys
from hfft.data.sources.layout import CLASS_FOLDER, SPLIT_NAMES
from hfft.data.sources.reading import choose_splits, load_data, read_source
from hfft.errors import DataError
from hfft.recipe.loading import load_recipe
from hfft.recipe.spec import DataSpec
from hfft.system.messages import kept_warnings
from hfft.system.paths import folder_at

_RECIPES = (".yaml", ".yml")


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        splits: By split: `images`, `counts` by class, and `sizes`: the smallest, median and largest width and height.
        findings: In the order of `KINDS`.
        warnings: What was said while the source was read.
    """

    splits: dict[str, dict[str, Any]]
    findings: tuple[Finding, ...]
    warnings: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """1 if something would stop training or make its numbers wrong."""
        return int(any(finding.severity == "harm" for finding in self.findings))

    @property
    def conclusion(self) -> str:
        """One line."""
        images = sum(split["images"] for split in self.splits.values())
        harm = sum(finding.severity == "harm" for finding in self.findings)
        notes = len(self.findings) - harm
        if not self.findings and not self.warnings:
            return f"{images:,} images, nothing found"
        if not self.findings:
            return f"{images:,} images, no findings; see the warnings above: {len(self.warnings)}"
        return f"{images:,} images; findings that stop training or spoil its numbers: {harm}, to know of: {notes}"

    def by_kind(self) -> dict[str, list[Finding]]:
        """The findings of each kind, those that do harm first."""
        kinds = {kind: [finding for finding in self.findings if finding.kind == kind] for kind in KINDS}
        return {kind: findings for kind, findings in kinds.items() if findings}

    def summary(self) -> list[tuple[str, ...]]:
        """Split, images, classes and sizes, as a table."""
        rows = []
        for name, split in self.splits.items():
            sizes = ("-", "-", "-") if split["sizes"] is None else (f"{w} x {h}" for w, h in split["sizes"].values())
            classes = sum(count > 0 for count in split["counts"].values())
            rows.append((name, f"{split['images']:,}", str(classes), *sizes))
        return rows

    def class_counts(self) -> list[tuple[str, ...]]:
        """Class and its number of images in each split, as a table."""
        labels = list(next(iter(self.splits.values()))["counts"])
        return [(label, *(f"{split['counts'][label]:,}" for split in self.splits.values())) for label in labels]


def inspect(source: str, overrides: Sequence[str] = ()) -> Inspection:
    """Audit a source as it is, or the splits that a recipe makes of it.

    Args:
        source: What `data.source` of a recipe may be, or the path of a recipe.
        overrides: As for `load_recipe`.

    Raises:
        HfftError: If the source can't be read at all, or the recipe is wrong.
    """
    with kept_warnings() as warnings:
        inspection = _read_and_inspect(source, overrides)
    return dataclasses.replace(inspection, warnings=tuple(warnings))


def _read_and_inspect(source: str, overrides: Sequence[str]) -> Inspection:
    if source.lower().endswith(_RECIPES) and Path(source).is_file():
        recipe = load_recipe(source, overrides)
        images = load_data(recipe.data, recipe.seed)
        return _inspect(dict(images.splits), recipe.data, "train")
    # A recipe's own checks, of a recipe that has nothing but data.
    rest = {"name": "check", "model": {"checkpoint": "none"}, "phases": [{"name": "head"}]}
    spec = load_recipe({**rest, "data": {"source": source}}, overrides).data
    if spec.splits != DataSpec(source=source).splits:
        images = load_data(spec, 0)
        return _inspect(dict(images.splits), spec, "train")
    found = read_source(spec)
    train = next((name for name in found.splits if name.lower() in SPLIT_NAMES["train"]), next(iter(found.splits)))
    refused, labels = None, ()
    try:
        labels = choose_splits(found, spec, 0).labels
    except DataError as error:
        if not any(map(len, found.splits.values())):
            raise
        refused = error
    inspection = _inspect(found.splits, spec, train)
    if refused is None:
        findings = tuple(_unused(finding, labels) for finding in inspection.findings)
        return dataclasses.replace(inspection, findings=findings)
    if inspection.exit_code == 0:
        raise refused
    return inspection


def _unused(finding: Finding, labels: Sequence[str]) -> Finding:
    """A finding on data that trains: rows without a label and classes without rows are in unused splits."""
    is_class = finding.kind == "empty class" and finding.detail.rpartition(": ")[0] not in labels
    if is_class or finding.kind == "unlabelled":
        return dataclasses.replace(finding, kind="left out", detail=f"{finding.detail}, in no split that is used")
    return finding


def _inspect(splits: dict[str, Dataset], spec: DataSpec, train: str) -> Inspection:
    labels = class_names(next(iter(splits.values())))
    rows = joined(splits.values())
    check_found(rows, spec.source)
    done = audit(rows, "checking images", Look(spec.audit, spec.background, spec.source))
    numbers = _numbers(splits)
    gray = gray_of(rows, spec.background) if spec.audit == "full" else None
    found = find(Splits(done, numbers, labels, train), gray)
    folder, ignored = folder_at(spec.source), []
    if folder is not None and _is_of_files(rows):
        found_files = find_ignored(folder, set(rows["file"][:]), by_folder=spec.label_column == CLASS_FOLDER)
        ignored = [Finding("left out", reason, (name,), 1) for name, reason in found_files]
    order = list(KINDS)
    findings = sorted([*found, *ignored], key=lambda finding: order.index(finding.kind))
    return Inspection(
        {name: _described(done, part, labels) for name, part in numbers.items()},
        tuple(findings),
    )


def _numbers(splits: dict[str, Dataset]) -> dict[str, np.ndarray]:
    starts = np.cumsum([0, *(len(part) for part in splits.values())])
    return {name: np.arange(starts[place], starts[place + 1]) for place, name in enumerate(splits)}


def _is_of_files(rows: Dataset) -> bool:
    image = rows[0]["image"]
    return image is not None and image["bytes"] is None and "?" not in image["path"]


def _described(done: Audit, numbers: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    records, classes = done.records[numbers], done.labels[numbers]
    known = records[records["width"] > 0]
    sizes = None
    if len(known):
        order = np.argsort(known["width"].astype(np.int64) * known["height"], kind="stable")
        places = {"smallest": order[0], "median": order[len(order) // 2], "largest": order[-1]}
        sizes = {name: [int(known["width"][row]), int(known["height"][row])] for name, row in places.items()}
    counts = count_keys(classes, len(labels)).tolist()
    return {"images": len(numbers), "counts": dict(zip(labels, counts, strict=True)), "sizes": sizes}
