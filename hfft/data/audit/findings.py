"""Findings of an audit: leaks, duplicates, contradicting labels, odd images and classes, as one list."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any, Literal

import numpy as np
from PIL import Image

from hfft.data.audit.audit import BLANK, DEEP, FLOATS, FRAMES, INKS, TRANSPARENT, Audit
from hfft.data.audit.duplicates import group, same_pictures
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
    """Something to know of the data."""

    kind: str  # a key of `KINDS`
    detail: str
    files: tuple[str, ...] = ()  # names of the images: all of a group of duplicates, else 20 at most
    count: int = 0  # how many images it is about; 0 for a class

    @property
    def severity(self) -> Severity:
        """`harm` or `note`."""
        return KINDS[self.kind][0]

    def to_dict(self) -> dict[str, Any]:
        """As data.json and `hfft check-data --json` have it."""
        return {"severity": self.severity, **asdict(self)}


@dataclass(frozen=True)
class _Rows:
    """All rows of all splits, one after the other."""

    audit: Audit  # of these rows, and maybe of others
    labels: Sequence[str]  # class names
    splits: Sequence[str]
    numbers: np.ndarray  # of each row in the audit, (N,)
    parts: np.ndarray  # index of each row's split, (N,)
    files: Sequence[str]
    classes: np.ndarray
    records: np.ndarray

    def summary(self, kind: str, chosen: np.ndarray, detail: str) -> Iterator[Finding]:
        """One finding on all chosen rows, a mask (N,), if there are any."""
        rows = [int(row) for row in np.flatnonzero(chosen)]
        if rows:
            yield Finding(kind, detail, tuple(self.files[row] for row in rows[:_LISTED]), len(rows))


def list_findings(
    audit: Audit,
    splits: Mapping[str, np.ndarray],
    labels: Sequence[str],
    *,
    train: str = "train",
    gray: Callable[[int], Image.Image] | None = None,
) -> list[Finding]:
    """All findings on some splits, in the order of `KINDS`, then of the rows.

    Args:
        audit: Of all rows of the splits, and maybe of others.
        splits: Name of each split to the numbers of its rows in the audit.
        labels: Class names.
        train: The split that classes are judged by.
        gray: Number of a row to its image in mode L, to compare those whose thumbnails are alike; None compares none.
    """
    numbers = np.concatenate([np.zeros(0, np.int64), *splits.values()])
    parts = np.repeat(np.arange(len(splits)), [len(rows) for rows in splits.values()])
    files = [audit.files[number] for number in numbers.tolist()]
    rows = _Rows(audit, labels, list(splits), numbers, parts, files, audit.labels[numbers], audit.records[numbers])
    broken = sorted(set(audit.problems) & set(numbers.tolist()))
    found = [
        *(Finding("broken", audit.problems[number], (audit.files[number],), 1) for number in broken),
        *_classes(rows, train),
        *_equal_images(rows, gray),
        *_images(rows),
        *_deep(rows),
    ]
    return in_order(found)


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Findings in the order of `KINDS`."""
    order = list(KINDS)
    return sorted(findings, key=lambda finding: order.index(finding.kind))


def _classes(rows: _Rows, train: str) -> Iterator[Finding]:
    has_label = np.fromiter((key not in (UNLABELLED, (UNLABELLED,)) for key in rows.classes.tolist()), bool)
    for part in range(len(rows.splits)):
        without = ~has_label & (rows.parts == part)
        yield from rows.summary("unlabelled", without, f"{without.sum()} rows without a label")
    is_trained_on = (rows.parts == rows.splits.index(train)) & (rows.records["broken"] == 0)
    counts = count_keys(rows.classes[is_trained_on], len(rows.labels)).tolist()
    for label, count in zip(rows.labels, counts, strict=True):
        if count == 0:
            yield Finding("empty class", f"{label}: no image to train on")
        elif count < RARE:
            yield Finding("rare class", f"{label}: {count} to train on")
    for alike in alike_classes(rows.labels):
        yield Finding("like another class", ", ".join(map(repr, alike)))


def _equal_images(rows: _Rows, gray: Callable[[int], Image.Image] | None) -> Iterator[Finding]:
    copies: dict[bytes, list[int]] = {}  # rows by content
    for row, (digest, broken) in enumerate(rows.records[["digest", "broken"]].tolist()):
        if digest and not broken:
            copies.setdefault(digest, []).append(row)
    once = list(copies.values())
    for equal in once:
        if len(equal) > 1:
            yield from _judge(rows, equal)
    if gray is None:
        return
    firsts = np.array([equal[0] for equal in once], dtype=np.int64)
    for places in group(same_pictures(rows.audit.thumbnails, rows.numbers[firsts], gray)):
        yield from _judge(rows, sorted(row for place in places for row in once[place]), near="near ")


def _judge(rows: _Rows, equal: list[int], near: str = "") -> Iterator[Finding]:
    """One finding for each way in which a group of equal images is wrong."""
    splits = [rows.splits[part] for part in sorted(set(rows.parts[equal].tolist()))]
    classes = [spoken_label(key, rows.labels) for key in sorted(set(rows.classes[equal].tolist()))]
    found = {"leak": splits, "two labels": classes}
    details = {kind: " and ".join(names) for kind, names in found.items() if len(names) > 1}
    for kind, detail in (details or {"duplicate": f"{len(equal)} times in {splits[0]}"}).items():
        yield Finding(near + kind, detail, tuple(rows.files[row] for row in equal), len(equal))


def _images(rows: _Rows) -> Iterator[Finding]:
    width, height, traits = (rows.records[name] for name in ("width", "height", "traits"))
    known = width > 0  # `off` reads no headers
    small, large = np.minimum(width, height), np.maximum(width, height)
    promised = endings()
    for file, name in zip(rows.files, rows.records["format"].tolist(), strict=True):
        expected, found = promised.get(PurePath(file).suffix.lower()), name.decode()
        if found and expected is not None and expected != found and {expected, found} not in _ALIKE:
            yield Finding("wrong ending", f"is {found}", (file,), 1)
    typical = float(np.median(small[known])) if known.any() else 0.0
    for kind, chosen in (
        ("tiny", known & ((small < TINY) | ((small < 32) & (small < typical / 4)))),
        ("extreme shape", known & (large > EXTREME * small)),
        ("huge", known & (width.astype(np.int64) * height > HUGE)),
        ("blank", (traits & BLANK) > 0),
    ):
        for row in map(int, np.flatnonzero(chosen)):
            yield Finding(kind, f"{width[row]} x {height[row]} pixels", (rows.files[row],), 1)
    for row, number in enumerate(rows.numbers.tolist()):
        if number in rows.audit.remarks:
            yield Finding("damaged", rows.audit.remarks[number], (rows.files[row],), 1)
    yield from rows.summary("transparent", (traits & TRANSPARENT) > 0, "data.background lays them over a color")
    yield from rows.summary("frames", (traits & FRAMES) > 0, "the first is used")
    yield from rows.summary("inks", (traits & INKS) > 0, 'pipeline("image-classification") shows other colors')


def _deep(rows: _Rows) -> Iterator[Finding]:
    traits, peaks = rows.records["traits"], rows.records["peak"]
    floats, deep = (traits & FLOATS) > 0, (traits & DEEP) > 0
    yield from rows.summary("deep", deep, 'scaled to 8 bits; pipeline("image-classification") saturates them')
    ranges = [float_range(peak) or 0 for peak in peaks[floats].tolist()]
    if len(set(ranges)) > 1:
        counts = ", ".join(f"{count} within 0 to {top}" for top, count in sorted(Counter(ranges).items()))
        yield from rows.summary("mixed ranges", floats, f"{counts}, and each is scaled by its own range")
    integers = deep & ~floats
    if integers.any() and 0 < peaks[integers].max() < 65535 / 8:
        levels = int(peaks[integers].max() / 257) + 1
        detail = f"no value above {peaks[integers].max():g} of 65535, so that {levels} of 256 levels remain"
        yield from rows.summary("few levels", integers, detail)
