"""Each image is read, decoded and measured once before training, in threads; results are cached by content."""

import hashlib
import json
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from huggingface_hub.constants import HF_HOME
from PIL import Image

from hfft.data.images.augmentation import as_pillow
from hfft.data.images.decoding import RULE, decode_small, open_image, read_content
from hfft.data.images.modes import from_black, has_profile, is_deep, on_background
from hfft.data.sources.labels import label_keys
from hfft.errors import DataError
from hfft.system.files import write_folder
from hfft.system.progress import SOON, bar

Color = tuple[int, int, int]
SIDE = 32  # of a thumbnail, pixels
# Bits of `traits`.
DEEP, FLOATS, TRANSPARENT, FRAMES, INKS, BLANK = (1 << bit for bit in range(6))
RECORD = np.dtype(
    [
        ("digest", "S32"),  # of the file's content, in hexadecimal digits; empty where it can't be read
        ("format", "S8"),  # Pillow's name
        ("width", np.uint32),
        ("height", np.uint32),
        ("traits", np.uint16),
        ("peak", np.float32),  # the largest value of a deep image
        ("broken", np.uint8),
    ]
)
_BATCH = 8  # images that a thread takes at once
_DECODERS = ("pillow", "simplejpeg", "pillow-heif")
_LARGE = 16_000_000  # pixels; such images are decoded one at a time
_ONE_LARGE = threading.Lock()


@dataclass(frozen=True)
class Examined:
    """The result for one image: values of `RECORD`, why it can't be decoded, and what its decoder remarked."""

    record: tuple[Any, ...]
    problem: str | None = None
    remark: str | None = None
    thumbnail: np.ndarray | None = None  # (32, 32) uint8, gray; None where nothing was decoded


@dataclass(frozen=True)
class Audit:
    """The results for rows, in their order.

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
    problems: Mapping[int, str]
    remarks: Mapping[int, str]

    def fingerprint(self, rows: Sequence[int] | np.ndarray | None = None) -> str:
        """Hash over the name, label and content of some rows; of all when None."""
        digest = hashlib.blake2b(digest_size=16)
        for row in range(len(self.files)) if rows is None else rows:
            content = bytes.fromhex(self.records["digest"][row].decode())
            digest.update(f"{self.files[row]}\0{self.labels[row]}\0".encode() + content)
        return digest.hexdigest()

    def numbers(self, rows: Dataset) -> np.ndarray:
        """The numbers of some of the rows, found by their names."""
        numbers = {file: number for number, file in enumerate(self.files)}
        return np.array([numbers[file] for file in rows["file"][:]], dtype=np.int64)


def audit(
    rows: Dataset, level: str = "full", *, background: Color | None = None, cached_for: str | None = None
) -> Audit:
    """Examine every image of some rows, in parallel; the result is the same for any number of threads.

    Args:
        rows: Columns `image` (not decoded), `label` and `file`.
        level: `full` decodes each image, `quick` reads its header, `off` its bytes alone.
        background: Color that shows through transparent pixels.
        cached_for: Source of the images. Content of this source that an earlier audit decoded, by the same rule and
            the same decoders, is read and not decoded; None caches nothing.
    """
    cache = _Cache(None)
    if cached_for is not None and level != "off":
        cache = _Cache(_cache_folder(cached_for, level, background))

    def examine(image: dict[str, Any] | None) -> Examined:
        try:
            content = read_content(image)
        except DataError as error:
            return _broken(b"", error)
        return cache.find(_digest(content)) or examine_content(content, level, background)

    records, thumbnails = np.zeros(len(rows), dtype=RECORD), np.zeros((0, SIDE, SIDE), np.uint8)
    if len(rows):
        with tempfile.TemporaryFile() as stream:  # without a name; in memory they would take what is needed elsewhere
            thumbnails = np.memmap(stream, np.uint8, "w+", shape=(len(rows), SIDE, SIDE))
    problems: dict[int, str] = {}
    remarks: dict[int, str] = {}
    for row, found in enumerate(bar("checking images", len(rows), _in_threads(rows, examine), delay=SOON)):
        records[row] = found.record
        if found.thumbnail is not None:
            thumbnails[row] = found.thumbnail
        if found.problem is not None:
            problems[row] = found.problem
        if found.remark is not None:
            remarks[row] = found.remark
    done = Audit(tuple(rows["file"][:]), label_keys(rows), records, thumbnails, problems, remarks)
    cache.extend(done)
    return done


def _broken(digest: bytes, error: DataError) -> Examined:
    return Examined((digest, b"", 0, 0, 0, 0.0, 1), str(error))


def _digest(content: bytes) -> bytes:
    """32 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest().encode()


def examine_content(content: bytes, level: str, background: Color | None = None) -> Examined:
    """Examine an encoded image at a level of `audit`; what can't be decoded is a problem and no exception."""
    digest = _digest(content)
    if level == "off":
        return Examined((digest, b"", 0, 0, 0, 0.0, 0))
    try:
        image = open_image(content)
        if level == "quick":
            return Examined((digest, *_header(image), 0.0, 0))
        with _ONE_LARGE if image.width * image.height > _LARGE else nullcontext():
            return _decoded(content, digest, background)
    except DataError as error:
        return _broken(digest, error)


def _header(image: Image.Image) -> tuple[bytes, int, int, int]:
    """Format, width, height and traits."""
    has_frames = False
    if image.format != "MPO":  # a photo with a preview of itself
        with suppress(OSError, ValueError, EOFError, SyntaxError):  # damaged behind the first frame
            has_frames = getattr(image, "is_animated", False)
    traits = (FRAMES if has_frames else 0) | (INKS if has_profile(image) else 0)
    return (image.format or "").encode(), image.width, image.height, traits


def _decoded(content: bytes, digest: bytes, background: Color | None) -> Examined:
    image, picture, remark = decode_small(content)
    kind, width, height, traits = _header(image)
    peak = 0.0
    if is_deep(image):
        peak = float(np.asarray(from_black(image)).max())
        traits |= DEEP | (FLOATS if image.mode == "F" else 0)
    if isinstance(picture, Image.Image) and picture.mode == "RGBA":
        traits |= TRANSPARENT
    gray = as_pillow(on_background(picture, background)).convert("L")
    low, high = gray.getextrema()
    if high - low <= 2:  # pyright: ignore[reportOperatorIssue]
        traits |= BLANK
    thumbnail = np.asarray(gray.resize((SIDE, SIDE), Image.Resampling.BOX))
    return Examined((digest, kind, width, height, traits, peak, 0), None, remark, thumbnail)


def _in_threads(rows: Dataset, examine: Callable[[dict[str, Any] | None], Examined]) -> Iterator[Examined]:
    """Results in the order of the rows; few rows are in memory at a time, as they may hold their images' bytes."""

    def examine_batch(start: int) -> list[Examined]:
        return [examine(image) for image in rows[start : start + _BATCH]["image"]]

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting: deque[Future[list[Examined]]] = deque()
    pool = ThreadPoolExecutor(threads, "hfft-audit")
    try:
        for start in range(0, len(rows), _BATCH):
            waiting.append(pool.submit(examine_batch, start))
            if len(waiting) > 2 * threads:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _cache_folder(source: str, level: str, background: Color | None) -> Path:
    """A folder for each source, level, background, decoding rule and set of decoders."""
    decoders = []
    for package in _DECODERS:
        with suppress(PackageNotFoundError):
            decoders.append(f"{package} {version(package)}")
    key = json.dumps([source, level, background, RULE, RECORD.str, SIDE, decoders], default=str)
    return Path(HF_HOME) / "hfft" / "audits" / hashlib.blake2b(key.encode(), digest_size=12).hexdigest()


class _Cache:
    """Results of earlier audits, by the hash of an image's content.

    The folder holds records.npy, thumbnails.npy, which is mapped, and texts.json: digest to `[problem, remark]`.
    """

    def __init__(self, folder: Path | None) -> None:
        """Empty where there is no folder, or what is there can't be read."""
        self._folder = folder
        self._records, self._thumbnails = np.zeros(0, RECORD), np.zeros((0, SIDE, SIDE), np.uint8)
        self._texts: dict[str, Sequence[str | None]] = {}
        if folder is not None:
            with suppress(OSError, ValueError, EOFError):
                records = np.load(folder / "records.npy", allow_pickle=False)
                thumbnails = np.load(folder / "thumbnails.npy", mmap_mode="r", allow_pickle=False)
                texts = json.loads((folder / "texts.json").read_text("utf-8"))
                if records.dtype == RECORD and thumbnails.shape == (len(records), SIDE, SIDE):
                    self._records, self._thumbnails, self._texts = records, thumbnails, texts
        self._order = np.argsort(self._records["digest"], kind="stable")
        self._digests = self._records["digest"][self._order]

    def find(self, digest: bytes) -> Examined | None:
        """The result for an image with this content."""
        rank = int(np.searchsorted(self._digests, digest))
        if rank == len(self._digests) or self._digests[rank] != digest:
            return None
        row = self._order[rank]
        problem, remark = self._texts.get(digest.decode(), (None, None))
        thumbnail = None if problem is not None else np.asarray(self._thumbnails[row])
        return Examined(tuple(self._records[row].tolist()), problem, remark, thumbnail)

    def extend(self, done: Audit) -> None:
        """Add what is new; a folder that can't be written keeps nothing."""
        digests = done.records["digest"]
        new = np.flatnonzero((digests != b"") & ~np.isin(digests, self._digests))
        if self._folder is None or len(new) == 0:
            return
        texts, old = dict(self._texts), len(self._records)
        for row in {*done.problems, *done.remarks} & set(new.tolist()):
            texts[digests[row].decode()] = (done.problems.get(row), done.remarks.get(row))

        def write(folder: Path) -> None:
            np.save(folder / "records.npy", np.concatenate([self._records, done.records[new]]))
            shape = (old + len(new), SIDE, SIDE)
            thumbnails = np.lib.format.open_memmap(folder / "thumbnails.npy", "w+", np.uint8, shape)
            thumbnails[:old] = self._thumbnails
            for start in range(0, len(new), 4096):
                thumbnails[old + start : old + start + 4096] = done.thumbnails[new[start : start + 4096]]
            thumbnails.flush()
            (folder / "texts.json").write_text(json.dumps(texts), "utf-8")

        with suppress(OSError):
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            write_folder(self._folder, write)
