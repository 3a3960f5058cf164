"""The images of a run that can be read, before they are split: what was left out, and what the audit found."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset, concatenate_datasets
from PIL import Image

from hfft.data.audit.audit import Audit, audit
from hfft.data.audit.findings import Finding, list_findings
from hfft.data.images.decoding import decode, read_content
from hfft.data.sources.advice import check_found
from hfft.data.sources.labels import count_keys, spoken_label, targets_of
from hfft.data.sources.reading import ImageData, choose_splits
from hfft.data.sources.rows import Source, without_files
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec
from hfft.system.distributed import inform, on_main, warn

_SHOWN = 10  # files or findings that a message names


@dataclass(frozen=True)
class Skip:
    """An image that was left out: its name, its classes with `+` between, and why it can't be read."""

    file: str
    label: str
    reason: str


@dataclass(frozen=True)
class Checked:
    """Images that can be read, their fingerprints by split, what was left out, and what else was found."""

    images: ImageData
    fingerprints: Mapping[str, str]
    skipped: tuple[Skip, ...] = ()
    findings: tuple[Finding, ...] = ()


def describe_images(checked: Checked) -> dict[str, Any]:
    """What a run folder keeps of its images, data.json."""
    images, prints = checked.images, checked.fingerprints
    return {
        "labels": list(images.labels),
        "task": images.task,
        "splits": {name: describe_split(images, name, fingerprint) for name, fingerprint in prints.items()},
        "skipped": [asdict(skip) for skip in checked.skipped],
        "findings": [finding.to_dict() for finding in checked.findings],
    }


def describe_split(images: ImageData, split: str, fingerprint: str) -> dict[str, Any]:
    """What a run folder keeps of a split."""
    targets = targets_of(images.splits[split], len(images.labels))
    return {
        "images": len(images.splits[split]),
        "counts": images.counts(split),
        "carved": split in images.carved,
        "fingerprint": fingerprint,
        **({} if targets is None else {"targets": hashlib.blake2b(targets.tobytes(), digest_size=16).hexdigest()}),
    }


def check_images(source: Source, images: ImageData, spec: DataSpec, seed: int) -> Checked:
    """Audit the images of a run, and split the source again without those that can't be read; alike in every process.

    Everything is as if these images had not been there. Images of the splits alone are opened: `data.max_per_class`
    may leave most of a source aside, and where it does, others take the place of those left out.

    Raises:
        DataError: If images can't be read and the recipe says stop, or hardly any are left of a class, or images of
            the training split are in another one and the recipe says stop.
    """
    skipped: tuple[Skip, ...] = ()
    done: Audit | None = None  # in the main process alone

    def find_unreadable() -> tuple[Skip, ...]:
        nonlocal done
        # The audit of data in memory, which has no name of its own, is not cached.
        cached_for = spec.source if source.name == spec.source else None
        done = audit(rows, spec.audit, background=spec.background, cached_for=cached_for)
        return _unreadable(done, images.labels, spec, source.name)

    while True:
        rows = joined(images.splits.values())
        check_found(rows, source.name)
        new = on_main(find_unreadable)
        skipped += new
        if new:
            images = choose_splits(source.without([skip.file for skip in skipped]), spec, seed)
        if set(rows["file"][:]).issuperset(file for part in images.splits.values() for file in part["file"][:]):
            break

    def conclude() -> tuple[dict[str, str], tuple[Finding, ...]]:
        assert done is not None
        numbers = {split: done.numbers(part) for split, part in images.splits.items()}
        found = [Finding("broken", skip.reason, (skip.file,), 1) for skip in skipped]
        if spec.audit != "off":
            gray = gray_of(rows, spec.background) if spec.audit == "full" else None
            found += list_findings(done, numbers, images.labels, gray=gray)
        _report(found, spec, source.name)
        return {split: done.fingerprint(part) for split, part in numbers.items()}, tuple(found)

    fingerprints, findings = on_main(conclude)
    return Checked(images, fingerprints, skipped, findings)


def readable_rows(rows: Dataset, labels: Sequence[str], spec: DataSpec) -> Dataset:
    """The rows that can be read, in every process; a DataError as of `check_images`, but for leaks."""
    check_found(rows, spec.source)

    def find_unreadable() -> tuple[Skip, ...]:
        done = audit(rows, spec.audit, background=spec.background, cached_for=spec.source)
        return _unreadable(done, labels, spec, spec.source)

    return without_files(rows, [skip.file for skip in on_main(find_unreadable)])


def fingerprint_of(rows: Dataset) -> str:
    """Hash over the names, labels and contents of rows, in every process; decodes nothing."""
    return on_main(lambda: audit(rows, "off").fingerprint())


def joined(parts: Iterable[Dataset]) -> Dataset:
    """The rows of several splits one after the other, with what an audit needs of them."""
    return concatenate_datasets([part.select_columns(["image", "label", "file"]) for part in parts])


def gray_of(rows: Dataset, background: tuple[int, int, int] | None) -> Callable[[int], Image.Image]:
    """Number of a row to its image in mode L."""
    return lambda number: decode(read_content(rows[number]["image"]), background).convert("L")


def _unreadable(done: Audit, labels: Sequence[str], spec: DataSpec, where: str) -> tuple[Skip, ...]:
    """The rows that can't be read, warned of; an error if the recipe says stop, or most images of a class are lost."""
    rows = sorted(done.problems)
    if not rows:
        return ()
    skips = tuple(Skip(done.files[row], spoken_label(done.labels[row], labels), done.problems[row]) for row in rows)
    files = "1 file is" if len(skips) == 1 else f"{len(skips)} files are"
    lines = [f"  {skip.file}: {skip.reason}" for skip in skips]
    if spec.bad_images == "stop":
        raise DataError(_listed(f"{where}: {files} no readable image; repair or remove:", lines))
    counts = zip(count_keys(done.labels[rows], len(labels)), count_keys(done.labels, len(labels)), strict=True)
    lost = [f"{name} ({bad} of {every})" for name, (bad, every) in zip(labels, counts, strict=True) if 2 * bad > every]
    if lost:
        what = f"{where}: more than half of the images can't be read in the class {', '.join(lost)}"
        raise DataError(_listed(f"{what}; repair them or remove the class:", lines))
    warn(_listed(f"{where}: left out: {files} no readable image:", lines))
    return skips


def _report(findings: Sequence[Finding], spec: DataSpec, where: str) -> None:
    """Warn of what makes the numbers wrong, or stop at it; count the rest in one line."""

    def of(*kinds: str) -> tuple[int, list[str]]:
        found = [finding for finding in findings if finding.kind in kinds]
        lines = [f"  {one.kind} ({one.detail}): {', '.join(one.files[:4])}" for one in found]
        return sum(finding.count for finding in found), lines

    leaking, leaks = of("leak", "near leak")
    what = f"{where}: {leaking} images are the same in two splits, so that scores will be too good"
    if leaks and spec.leaks == "stop":
        raise DataError(_listed(f"{what}; remove them, or say data.leaks=warn:", leaks))
    _, wrong = of("two labels", "near two labels", "mixed ranges")
    for title, lines in ((f"{what}:", leaks), (f"{where}: labels or pixels contradict each other:", wrong)):
        if lines:
            warn(_listed(title, lines))
    deep, _ = of("deep")
    if deep:
        images = "1 image has" if deep == 1 else f"{deep} images have"
        warn(
            f"{where}: {images} more than 8 bits per channel, which are scaled to 8 here; transformers' own "
            'pipeline("image-classification") saturates them instead: use the model through hfft.Classifier, or '
            "convert the files to 8 bits"
        )
    notes = Counter(finding.kind for finding in findings if finding.severity == "note" and finding.kind != "deep")
    if notes:
        counts = ", ".join(f"{kind} {count}" for kind, count in notes.items())
        inform(f"{where}: also found: {counts}; data.json and `hfft check-data` name them")


def _listed(title: str, lines: list[str]) -> str:
    more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n".join([title, *lines[:_SHOWN], *more])
