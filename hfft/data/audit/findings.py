"""What an audit says of a data set: leaks, duplicates, contradicting labels, odd images and classes, as one list."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any, Literal

import numpy as np
from PIL import Image

from hfft.data.audit.audit import Audit
from hfft.data.audit.duplicates import group, same_pictures
from hfft.data.audit.examining import BLANK, DEEP, FLOATS, FRAMES, INKS, TRANSPARENT
from hfft.data.images.modes import float_range
from hfft.data.sources.folders import endings
from hfft.data.sources.labels import UNLABELLED, alike_classes, count_keys, spoken_label

Severity = Literal["harm", "note"]
# In the order in which they are shown. `harm` stops training or makes its numbers wrong.
KINDS: Mapping[str, tuple[Severity, str]] = {
    "broken": ("harm", "can't be read"),
    "unlabelled": ("harm", "has no label"),
    "empty class": ("harm", "a class without training images"),
    "leak": ("harm", "the same file in two splits"),
    "near leak": ("harm", "the same picture in two splits"),
    "two labels": ("harm", "the same file under two labels"),
    "near two labels": ("harm", "the same picture under two labels"),
    "mixed ranges": ("harm", "floating-point images of different ranges"),
    "duplicate": ("note", "the same file twice"),
    "near duplicate": ("note", "the same picture twice"),
    "wrong ending": ("note", "of another format than its name says"),
    "left out": ("note", "a file that becomes no row"),
    "damaged": ("note", "decoded with a remark"),
    "blank": ("note", "all pixels alike"),
    "tiny": ("note", "very small"),
    "extreme shape": ("note", "very long and narrow"),
    "huge": ("note", "very large"),
    "few levels": ("note", "deep images that use few of their levels"),
    "deep": ("note", "more than 8 bits per channel"),
    "inks": ("note", "CMYK with a profile"),
    "transparent": ("note", "transparent pixels"),
    "frames": ("note", "more than one picture in a file"),
    "rare class": ("note", "a class with few training images"),
    "like another class": ("note", "a class called almost like another"),
}
RARE = 5  # training images; fewer are rare
TINY = 8  # pixels on the shorter side; always, and below 32 where most images are four times larger
EXTREME = 10  # times as long as wide
HUGE = 50_000_000  # pixels
_ALIKE = ({"JPEG", "MPO"}, {"BMP", "DIB"})  # formats that share their endings
_LISTED = 20  # files that a finding on many images names


@dataclass(frozen=True)
class Finding:
    """Something to know of the data.

    Attributes:
        kind: A key of `KINDS`.
        detail: What exactly, in words.
        files: Names of the images: all of a group of duplicates, else 20 at most.
        count: How many images it is about; 0 for a class.
    """

    kind: str
    detail: str
    files: tuple[str, ...] = ()
    count: int = 0

    @property
    def severity(self) -> Severity:
        """`harm` or `note`."""
        return KINDS[self.kind][0]


def described(finding: Finding) -> dict[str, Any]:
    """A finding as JSON has it."""
    return {"severity": finding.severity, **asdict(finding)}


@dataclass(frozen=True)
class Splits:
    """Splits of audited rows.

    Attributes:
        audit: Of all rows, and maybe of others.
        rows: Name of each split to the numbers of its rows in the audit.
        labels: Class names.
        train: The split that classes are judged by.
    """

    audit: Audit
    rows: Mapping[str, np.ndarray]
    labels: Sequence[str]
    train: str = "train"


@dataclass(frozen=True)
class _Table:
    """All rows of all splits, one after the other: their numbers in the audit, files, classes, splits, records."""

    numbers: np.ndarray
    files: list[str]
    classes: np.ndarray
    parts: np.ndarray
    records: np.ndarray


def find(splits: Splits, gray: Callable[[int], Image.Image] | None = None) -> list[Finding]:
    """Everything that an audit tells, in the order of `KINDS`, then of the rows.

    Args:
        splits: The audited splits.
        gray: Number of a row in the audit to its image in mode L, to compare those whose thumbnails are alike; None
            compares none.
    """
    numbers = np.concatenate([np.zeros(0, np.int64), *splits.rows.values()])
    audit = splits.audit
    parts = np.repeat(np.arange(len(splits.rows)), [len(rows) for rows in splits.rows.values()])
    files = [audit.files[number] for number in numbers.tolist()]
    table = _Table(numbers, files, audit.labels[numbers], parts, audit.records[numbers])
    found = [
        *_broken(audit, numbers),
        *_classes(splits),
        *_groups(splits, table, gray),
        *_images(splits, table),
        *_deep(table),
    ]
    order = list(KINDS)
    return sorted(found, key=lambda finding: order.index(finding.kind))


def _broken(audit: Audit, numbers: np.ndarray) -> Iterator[Finding]:
    """The rows that can't be decoded."""
    for number in sorted(set(audit.problems) & set(numbers.tolist())):
        yield Finding("broken", audit.problems[number], (audit.files[number],), 1)


def _classes(splits: Splits) -> Iterator[Finding]:
    for rows in splits.rows.values():
        unlabelled = rows[_lacking(splits.audit.labels[rows])].tolist()
        if unlabelled:
            files = tuple(splits.audit.files[row] for row in unlabelled[:_LISTED])
            yield Finding("unlabelled", f"{len(unlabelled)} rows without a label", files, len(unlabelled))
    train = splits.rows[splits.train]
    labels, is_broken = splits.audit.labels[train], splits.audit.records["broken"][train]
    counts = count_keys(labels[is_broken == 0], len(splits.labels)).tolist()
    for label, count in zip(splits.labels, counts, strict=True):
        if count == 0:
            yield Finding("empty class", f"{label}: no image to train on")
        elif count < RARE:
            yield Finding("rare class", f"{label}: {count} to train on")
    for alike in alike_classes(splits.labels):
        yield Finding("like another class", ", ".join(map(repr, alike)))


def _groups(splits: Splits, table: _Table, gray: Callable[[int], Image.Image] | None) -> Iterator[Finding]:
    digests = table.records["digest"]
    _, firsts, which, counts = np.unique(digests, return_index=True, return_inverse=True, return_counts=True)
    usable = (digests != b"") & (table.records["broken"] == 0)
    copies: dict[int, list[int]] = {}
    for row in np.flatnonzero((counts[which] > 1) & usable).tolist():
        copies.setdefault(int(firsts[which[row]]), []).append(row)
    for rows in copies.values():
        yield from _judge(splits, table, rows, near=False)
    if gray is None:
        return
    once = np.sort(firsts[usable[firsts]])  # one of each content
    pairs = same_pictures(splits.audit.thumbnails, table.numbers[once], gray)
    for places in group(pairs):
        rows = sorted(row for place in places for row in copies.get(int(once[place]), [int(once[place])]))
        yield from _judge(splits, table, rows, near=True)


def _judge(splits: Splits, table: _Table, rows: list[int], *, near: bool) -> Iterator[Finding]:
    """One finding for each way in which a group of equal images is wrong."""
    parts, classes = sorted(set(table.parts[rows].tolist())), sorted(set(table.classes[rows].tolist()))
    names = list(splits.rows)
    found = []
    if len(parts) > 1:
        found.append(("leak", " and ".join(names[part] for part in parts)))
    if len(classes) > 1:
        found.append(("two labels", _names(splits.labels, classes)))
    if not found:
        found.append(("duplicate", f"{len(rows)} times in {names[parts[0]]}"))
    for kind, detail in found:
        yield Finding(f"near {kind}" if near else kind, detail, tuple(table.files[row] for row in rows), len(rows))


def _names(labels: Sequence[str], numbers: Sequence[Any]) -> str:
    return " and ".join(spoken_label(number, labels) for number in numbers)


def _lacking(keys: np.ndarray) -> np.ndarray:
    """Whether nobody has labelled a row, (N,) bool."""
    return np.fromiter((key in (UNLABELLED, (UNLABELLED,)) for key in keys.tolist()), bool, len(keys))


def _images(splits: Splits, table: _Table) -> Iterator[Finding]:
    width, height, traits = (table.records[name] for name in ("width", "height", "traits"))
    known = width > 0  # `off` reads no headers
    small, large = np.minimum(width, height), np.maximum(width, height)
    yield from _misnamed(table.files, table.records["format"])
    typical = float(np.median(small[known])) if known.any() else 0.0
    for kind, chosen in (
        ("tiny", known & ((small < TINY) | ((small < 32) & (small < typical / 4)))),
        ("extreme shape", known & (large > EXTREME * small)),
        ("huge", known & (width.astype(np.int64) * height > HUGE)),
        ("blank", (traits & BLANK) > 0),
    ):
        for row in np.flatnonzero(chosen).tolist():
            yield Finding(kind, f"{width[row]} x {height[row]} pixels", (table.files[row],), 1)
    for row, number in enumerate(table.numbers.tolist()):
        if number in splits.audit.remarks:
            yield Finding("damaged", splits.audit.remarks[number], (table.files[row],), 1)
    yield from _summary(table, "transparent", (traits & TRANSPARENT) > 0, "data.background lays them over a color")
    yield from _summary(table, "frames", (traits & FRAMES) > 0, "the first is used")
    yield from _summary(table, "inks", (traits & INKS) > 0, 'pipeline("image-classification") shows other colors')


def _misnamed(files: list[str], formats: np.ndarray) -> Iterator[Finding]:
    promised = endings()
    for row, name in enumerate(formats.tolist()):
        ending = PurePath(files[row]).suffix.lower()
        told, found = promised.get(ending), name.decode()
        if name and told is not None and told != found and {told, found} not in _ALIKE:
            yield Finding("wrong ending", f"is {found}", (files[row],), 1)


def _deep(table: _Table) -> Iterator[Finding]:
    traits, peaks = table.records["traits"], table.records["peak"]
    floats, deep = (traits & FLOATS) > 0, (traits & DEEP) > 0
    yield from _summary(table, "deep", deep, 'scaled to 8 bits; pipeline("image-classification") saturates them')
    ranges = [float_range(peak) or 0 for peak in peaks[floats].tolist()]
    if len(set(ranges)) > 1:
        told = ", ".join(f"{count} within 0 to {top}" for top, count in sorted(Counter(ranges).items()))
        yield from _summary(table, "mixed ranges", floats, f"{told}, and each is scaled by its own range")
    integers = deep & ~floats
    if integers.any() and 0 < peaks[integers].max() < 65535 / 8:
        levels = int(peaks[integers].max() / 257) + 1
        told = f"no value above {peaks[integers].max():g} of 65535, so that {levels} of 256 levels remain"
        yield from _summary(table, "few levels", integers, told)


def _summary(table: _Table, kind: str, chosen: np.ndarray, detail: str) -> Iterator[Finding]:
    rows = np.flatnonzero(chosen).tolist()
    if rows:
        yield Finding(kind, detail, tuple(table.files[row] for row in rows[:_LISTED]), len(rows))
