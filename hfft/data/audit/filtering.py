"""Images of a recipe -> those that can be trained on, with what was left out, and what was found; in all processes."""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from PIL import Image

from hfft.data.audit.audit import Audit, Look, audit
from hfft.data.audit.findings import Finding, Splits, described, find
from hfft.data.images.decoding import decode, read_row
from hfft.data.sources.advice import check_found
from hfft.data.sources.labels import spoken_label, targets_of
from hfft.data.sources.reading import ImageData
from hfft.errors import DataError
from hfft.recipe.spec import DataSpec
from hfft.system.distributed import meet, on_main
from hfft.system.messages import say, warn

_SHOWN = 10


@dataclass(frozen=True)
class Skip:
    """An image that was left out.

    Attributes:
        file: Its name.
        label: Its class; of several, all of them, with `+` between.
        reason: Why it can't be read.
    """

    file: str
    label: str
    reason: str


@dataclass(frozen=True)
class Checked:
    """Images that can be read, and what was found among all of them.

    Attributes:
        images: Without those that were left out.
        fingerprints: By split.
        skipped: What was left out.
        findings: What else there is to know.
    """

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
        "findings": [described(finding) for finding in checked.findings],
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


def check_images(
    images: ImageData, spec: DataSpec, source: str | None, reload: Callable[[Collection[str]], ImageData]
) -> Checked:
    """Audit all splits, leave out what can't be read or stop, and tell what was found; the same in every process.

    What can't be read is gone before a fraction is carved from train, so that everything is as if it had not been
    there.

    Args:
        images: As they were found.
        spec: Says how closely to look, and what to do.
        source: Name of the data, in messages and for what is kept of the audit; None keeps nothing.
        reload: Gives the images without the rows of these names.

    Raises:
        DataError: If images can't be read and the recipe says stop, or hardly any are left of a class, or images of
            the training split are in another one and the recipe says stop.
    """
    where = source or "data"
    skipped: tuple[Skip, ...] = ()
    while True:
        rows = joined(images.splits.values())
        check_found(rows, where)
        done = _audited(rows, Look(spec.audit, spec.background, source))
        new = on_main(partial(_skips, done, images.labels))
        refuse_or_tell(new, images, spec, where)
        skipped += new
        kept = reload([skip.file for skip in skipped]) if new else images
        # Where a class takes few of its images (data.max_per_class), others come in the place of those left out.
        if set(rows["file"][:]).issuperset(file for part in kept.splits.values() for file in part["file"][:]):
            break
        images = kept
    fingerprints, findings = on_main(lambda: _conclude(_known(done), rows, kept, spec))
    findings = (*(Finding("broken", skip.reason, (skip.file,), 1) for skip in skipped), *findings)
    _tell(findings, spec, where)
    return Checked(kept, fingerprints, skipped, findings)


def check_rows(rows: Dataset, labels: Sequence[str], spec: DataSpec) -> tuple[Skip, ...]:
    """The rows that can't be read, in every process; warned of, or refused.

    Raises:
        DataError: As for `check_images`, but for leaks.
    """
    check_found(rows, spec.source)
    done = _audited(rows, Look(spec.audit, spec.background, spec.source))
    skipped = on_main(partial(_skips, done, labels))
    refuse_or_tell(skipped, ImageData({"test": rows}, tuple(labels)), spec, spec.source)
    return skipped


def fingerprint_of(rows: Dataset) -> str:
    """Hash over the names, labels and contents of rows, in every process; decodes nothing."""
    done = _audited(rows, Look("off"))
    return on_main(lambda: _known(done).fingerprint())


def _audited(rows: Dataset, look: Look) -> Audit | None:
    """None in all processes but the main one."""
    done = audit(rows, "checking images", look) if PartialState().is_main_process else None
    meet()
    return done


def _known(done: Audit | None) -> Audit:
    assert done is not None
    return done


def _skips(done: Audit | None, labels: Sequence[str]) -> tuple[Skip, ...]:
    done = _known(done)
    return tuple(
        Skip(done.files[row], spoken_label(done.labels[row], labels), problem)
        for row, problem in sorted(done.problems.items())
    )


def _conclude(
    done: Audit, rows: Dataset, kept: ImageData, spec: DataSpec
) -> tuple[dict[str, str], tuple[Finding, ...]]:
    numbers = {split: done.numbers(part) for split, part in kept.splits.items()}
    fingerprints = {split: done.fingerprint(part) for split, part in numbers.items()}
    if spec.audit == "off":
        return fingerprints, ()
    gray = gray_of(rows, spec.background) if spec.audit == "full" else None
    return fingerprints, tuple(find(Splits(done, numbers, kept.labels), gray))


def joined(parts: Iterable[Dataset]) -> Dataset:
    """The rows of several splits one after the other, with what an audit needs of them."""
    return concatenate_datasets([part.select_columns(["image", "label", "file"]) for part in parts])


def gray_of(rows: Dataset, background: tuple[int, int, int] | None) -> Callable[[int], Image.Image]:
    """Number of a row to its image in mode L."""
    return lambda number: decode(read_row(rows[number]), background).convert("L")


def refuse_or_tell(skipped: Sequence[Skip], images: ImageData, spec: DataSpec, where: str) -> None:
    """Stop at images that can't be read, or warn of them.

    Raises:
        DataError: If the recipe says stop, or more than half of a class can't be read.
    """
    if not skipped:
        return
    lines = [f"  {skip.file}: {skip.reason}" for skip in skipped[:_SHOWN]]
    if len(skipped) > _SHOWN:
        lines.append(f"  and {len(skipped) - _SHOWN} more")
    files = "1 file is" if len(skipped) == 1 else f"{len(skipped)} files are"
    if spec.bad_images == "stop":
        raise DataError("\n".join([f"{where}: {files} no readable image; repair or remove:", *lines]))
    bad = Counter(label for skip in skipped for label in _labels_in(skip, images))
    every = Counter({label: sum(images.counts(split)[label] for split in images.splits) for label in bad})
    lost = [f"{label} ({count} of {every[label]})" for label, count in bad.items() if 2 * count > every[label]]
    if lost:
        what = f"{where}: more than half of the images can't be read in the class {', '.join(lost)}; repair them or "
        raise DataError("\n".join([f"{what}remove the class:", *lines]))
    warn("\n".join([f"{where}: left out: {files} no readable image:", *lines]))


def _labels_in(skip: Skip, images: ImageData) -> Sequence[str]:
    """The classes of an image that was left out."""
    if not images.is_multi_label:
        return (skip.label,)
    for rows in images.splits.values():
        if skip.file in (files := rows["file"][:]):
            return [images.labels[number] for number in rows[files.index(skip.file)]["label"]]
    return ()


def _tell(findings: Sequence[Finding], spec: DataSpec, where: str) -> None:
    """Warn of what makes the numbers wrong; count the rest in one line."""
    leaks = [finding for finding in findings if finding.kind in ("leak", "near leak")]
    if leaks:
        images = sum(finding.count for finding in leaks)
        what = f"{where}: {images} images are the same in two splits, so that scores will be too good"
        lines = _lines(leaks)
        if spec.leaks == "stop":
            raise DataError("\n".join([f"{what}; remove them, or say data.leaks=warn:", *lines]))
        warn("\n".join([f"{what}:", *lines]))
    wrong = [finding for finding in findings if finding.kind in ("two labels", "near two labels", "mixed ranges")]
    if wrong:
        warn("\n".join([f"{where}: labels or pixels contradict each other:", *_lines(wrong)]))
    deep = [finding for finding in findings if finding.kind == "deep"]
    if deep:
        _warn_of_deep(deep[0].count, where)
    notes = Counter(finding.kind for finding in findings if finding.severity == "note" and finding.kind != "deep")
    if notes:
        told = ", ".join(f"{kind} {count}" for kind, count in notes.items())
        say(f"{where}: also found: {told}; data.json and `hfft check-data` name them")


def _lines(findings: Sequence[Finding]) -> list[str]:
    lines = [f"  {finding.kind} ({finding.detail}): {', '.join(finding.files[:4])}" for finding in findings[:_SHOWN]]
    return [*lines, *([f"  and {len(findings) - _SHOWN} more"] if len(findings) > _SHOWN else [])]


def _warn_of_deep(count: int, source: str) -> None:
    images = "1 image has" if count == 1 else f"{count} images have"
    warn(
        f"{source}: {images} more than 8 bits per channel, which are scaled to 8 here; transformers' own "
        'pipeline("image-classification") saturates them instead: use the model through hfft.Classifier, or convert '
        "the files to 8 bits"
    )
