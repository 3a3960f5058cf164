"""Every image file is read, decoded and fingerprinted once before training, by threads, with what was found kept."""

import hashlib
import json
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from huggingface_hub.constants import HF_HOME

from hfft.data.audit.examining import LEVELS, RECORD, SIDE, Examined, digest_of, examine_content
from hfft.data.images.decoding import RULE, read_row
from hfft.data.sources.labels import label_keys
from hfft.errors import DataError
from hfft.system.files import write_folder
from hfft.system.progress import SOON, bar

_TOGETHER = 8  # images that a thread takes at once
_DECODERS = ("pillow", "simplejpeg", "pillow-heif")


@dataclass(frozen=True)
class Audit:
    """What was found in rows, in their order.

    Attributes:
        files: Name of each row, (N,).
        labels: Class index of each row, (N,); multi-label, a tuple of them.
        records: (N,) of `RECORD`.
        thumbnails: (N, 32, 32) uint8, gray, mapped from a file; black where nothing was decoded.
        problems: Row to the reason why it can't be decoded.
        remarks: Row to what its decoder remarked.
    """

    files: tuple[str, ...]
    labels: np.ndarray
    records: np.ndarray
    thumbnails: np.ndarray
    problems: Mapping[int, str] = field(default_factory=dict)
    remarks: Mapping[int, str] = field(default_factory=dict)

    def fingerprint(self, rows: Sequence[int] | np.ndarray | None = None) -> str:
        """Hash over the name, label and content of some rows; of all when None."""
        digest = hashlib.blake2b(digest_size=16)
        numbers = range(len(self.files)) if rows is None else rows
        for row in numbers:
            content = bytes.fromhex(self.records["digest"][row].decode())
            digest.update(f"{self.files[row]}\0{self.labels[row]}\0".encode() + content)
        return digest.hexdigest()

    @property
    def broken(self) -> dict[str, str]:
        """Name of each row that can't be decoded, and why."""
        return {self.files[row]: problem for row, problem in sorted(self.problems.items())}

    def numbers(self, rows: Dataset) -> np.ndarray:
        """The numbers of some of the rows, found by their names."""
        places = {file: place for place, file in enumerate(self.files)}
        return np.array([places[file] for file in rows["file"][:]], dtype=np.int64)


@dataclass(frozen=True)
class Look:
    """How images are looked at.

    Attributes:
        level: `full` decodes each of them, `quick` reads their headers, `off` their bytes.
        background: Color that shows through transparent pixels.
        source: What the images are of; what was found is kept under this name. None keeps nothing.
    """

    level: str = "full"
    background: tuple[int, int, int] | None = None
    source: str | None = None


def audit(rows: Dataset, name: str, look: Look | None = None) -> Audit:
    """Look at every image of a split, in parallel; the result is the same for any number of threads.

    A file whose content was looked at before, by the same rule and the same decoders, is only read.

    Args:
        rows: Columns `image` (not decoded), `label` and `file`.
        name: Shown beside the progress bar, which appears when the work takes more than three seconds.
        look: How closely; in full when None.
    """
    look = look or Look()
    kept = _Kept.load(look)
    records = np.zeros(len(rows), dtype=RECORD)
    thumbnails = _on_disk(len(rows))
    problems: dict[int, str] = {}
    remarks: dict[int, str] = {}
    results = _examined(rows, partial(_examine, kept, look))
    for place, found in enumerate(bar(name, len(rows), results, delay=SOON)):
        records[place] = found.record
        if found.thumbnail is not None:
            thumbnails[place] = found.thumbnail
        if found.problem is not None:
            problems[place] = found.problem
        if found.remark is not None:
            remarks[place] = found.remark
    done = Audit(tuple(rows["file"][:]), label_keys(rows), records, thumbnails, problems, remarks)
    kept.save(look, done)
    return done


def _examine(kept: "_Kept", look: Look, row: dict[str, Any]) -> Examined:
    try:
        content = read_row(row)
    except DataError as error:
        return Examined((b"", b"", 0, 0, 0, 0.0, LEVELS.index(look.level), 1), str(error))
    return kept.find(digest_of(content)) or examine_content(content, look.level, look.background)


def _examined(rows: Dataset, look: Callable[[dict[str, Any]], Examined]) -> Iterator[Examined]:
    """Results in the order of the rows; a few rows are in memory at a time, as they may hold their images' bytes."""

    def several(start: int) -> list[Examined]:
        part = rows[start : start + _TOGETHER]
        return [look({"image": image, "file": file}) for image, file in zip(part["image"], part["file"], strict=True)]

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting: deque[Future[list[Examined]]] = deque()
    pool = ThreadPoolExecutor(threads, "hfft-audit")
    try:
        for start in range(0, len(rows), _TOGETHER):
            waiting.append(pool.submit(several, start))
            if len(waiting) > 2 * threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _on_disk(count: int) -> np.ndarray:
    """(N, 32, 32) uint8 zeros in a file without a name, so that they take no memory that is needed elsewhere."""
    if count == 0:
        return np.zeros((0, SIDE, SIDE), np.uint8)
    with tempfile.TemporaryFile() as stream:
        return np.memmap(stream, np.uint8, "w+", shape=(count, SIDE, SIDE))


@dataclass(frozen=True)
class _Kept:
    """What was found earlier in images of the same source, by the hash of their content.

    Attributes:
        order: Sorts `records` by digest.
        records: (N,) of `RECORD`.
        thumbnails: (N, 32, 32), mapped from the file.
        texts: Digest to `[problem, remark]`, for those that have one.
    """

    order: np.ndarray
    records: np.ndarray
    thumbnails: np.ndarray
    texts: Mapping[str, Sequence[str | None]]

    @classmethod
    def load(cls, look: Look) -> "_Kept":
        """Nothing where there is nothing, or what is there can't be read."""
        folder = _folder(look)
        if folder is not None:
            with suppress(OSError, ValueError, EOFError):
                records = np.load(folder / "records.npy", allow_pickle=False)
                thumbnails = np.load(folder / "thumbnails.npy", mmap_mode="r", allow_pickle=False)
                texts = json.loads((folder / "texts.json").read_text("utf-8"))
                if records.dtype == RECORD and thumbnails.shape == (len(records), SIDE, SIDE):
                    return cls(np.argsort(records["digest"], kind="stable"), records, thumbnails, texts)
        return cls(np.zeros(0, np.int64), np.zeros(0, RECORD), np.zeros((0, SIDE, SIDE), np.uint8), {})

    def save(self, look: Look, done: Audit) -> None:
        """Keep what was found, beside what was there; a folder that can't be written keeps nothing."""
        folder = _folder(look)
        digests = done.records["digest"]
        new = np.flatnonzero((digests != b"") & ~np.isin(digests, self.records["digest"]))
        if folder is None or look.level == "off" or len(new) == 0:
            return
        texts = dict(self.texts)
        for row in {*done.problems, *done.remarks} & set(new.tolist()):
            texts[digests[row].decode()] = (done.problems.get(row), done.remarks.get(row))
        old = len(self.records)

        def write(aside: Path) -> None:
            np.save(aside / "records.npy", np.concatenate([self.records, done.records[new]]))
            shape = (old + len(new), SIDE, SIDE)
            thumbnails = np.lib.format.open_memmap(aside / "thumbnails.npy", "w+", np.uint8, shape)
            thumbnails[:old] = self.thumbnails
            for start in range(0, len(new), 4096):
                thumbnails[old + start : old + start + 4096] = done.thumbnails[new[start : start + 4096]]
            thumbnails.flush()
            (aside / "texts.json").write_text(json.dumps(texts), "utf-8")

        with suppress(OSError):
            folder.parent.mkdir(parents=True, exist_ok=True)
            write_folder(folder, write)

    def find(self, digest: bytes) -> Examined | None:
        """What was found in an image with this content."""
        place = int(np.searchsorted(self.records["digest"], digest, sorter=self.order))
        if place == len(self.order) or self.records["digest"][self.order[place]] != digest:
            return None
        row = self.order[place]
        problem, remark = self.texts.get(digest.decode(), (None, None))
        record = self.records[row]
        thumbnail = None if problem is not None else np.asarray(self.thumbnails[row])
        return Examined(tuple(record.tolist()), problem, remark, thumbnail)


def _folder(look: Look) -> Path | None:
    """Where findings are kept: a folder for each source, rule, level and set of decoders."""
    if look.source is None:
        return None
    decoders = []
    for package in _DECODERS:
        with suppress(PackageNotFoundError):
            decoders.append(f"{package} {version(package)}")
    key = json.dumps([look.source, look.level, look.background, RULE, RECORD.str, SIDE, decoders], default=str)
    return Path(HF_HOME) / "hfft" / "audits" / hashlib.blake2b(key.encode(), digest_size=12).hexdigest()
