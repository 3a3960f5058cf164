"""Recordings on disk: a folder `<key>.recording` of safetensors files, and a manifest that is written last.

The cache may be deleted at any time: a recording that fails a check is removed and recorded anew.
"""

import os
import re
import shutil
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from errno import EIO
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hfft.system.files import read_json, write_file, write_json
from hfft.system.progress import SOON, bar

_FORMAT = 1
_MANIFEST = "manifest.json"
_SUFFIX = ".recording"
_FILE_BYTES = 64 * 2**20  # a file is held in memory until it is written
_FILE_ROWS = 1024
_MARGIN_BYTES = 2**30  # of disk, left to everybody else

_LOG = get_logger(__name__)
_verified: set[Path] = set()  # recordings that this process has written, or read once from end to end


@dataclass(frozen=True)
class Leaf:
    """One tensor of a row: `shape` is without the batch dimension, `dtype` any that safetensors knows."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes per row."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class RecordingFiles:
    """The files of a recording, finished or not; all have `file_rows` rows but the last.

    Several processes may fill one recording: each writes spans of its own, and one of them finishes.
    """

    path: Path
    rows: int
    file_rows: int
    leaves: tuple[Leaf, ...]

    @property
    def spans(self) -> list[range]:
        """The rows of each file."""
        return [range(start, min(start + self.file_rows, self.rows)) for start in range(0, self.rows, self.file_rows)]

    def blocks(self, span: range) -> list[Tensor]:
        """Memory for the tensors of a file, (R, ...)."""
        return [torch.empty((len(span), *leaf.shape), dtype=leaf.dtype) for leaf in self.leaves]

    def open(self, span: range, *, verify: bool = False) -> tuple[Tensor, ...]:
        """Map a file, one (R, ...) tensor per leaf; it is read only to verify its content.

        Raises:
            OSError: If it isn't there; ValueError if its size, its header, or the content to verify is wrong.
        """
        path = self._file(span)
        try:
            with safe_open(path, "pt") as file:  # which maps, does not read, and knows the size (safetensors 0.8)
                metadata = file.metadata() or {}
                tensors = tuple(file.get_tensor(str(number)) for number in range(len(file.keys())))
        except SafetensorError as error:
            raise ValueError(f"{path.name}: {error}") from error
        if {**metadata, **self._identity(span)} != metadata:
            raise ValueError(f"{path.name}: it belongs to another recording")
        expected = [Leaf(leaf.dtype, (len(span), *leaf.shape)) for leaf in self.leaves]
        if [Leaf(tensor.dtype, tuple(tensor.shape)) for tensor in tensors] != expected:
            raise ValueError(f"{path.name}: its tensors have other shapes or dtypes")
        if verify and _checksum(tensors) != metadata.get("crc32"):
            raise ValueError(f"{path.name}: wrong checksum")
        return tensors

    def missing(self, spans: Sequence[range]) -> list[range]:
        """Those whose file isn't there or isn't whole, such as after a kill."""
        missing = []
        for span in spans:
            try:
                self.open(span, verify=True)
            except (OSError, ValueError):
                missing.append(span)
        return missing

    def write(self, span: range, tensors: Sequence[Tensor]) -> None:
        """Write the file of a span, whole or not at all: tensors such as `blocks`; OSError if it fails."""
        self.path.mkdir(parents=True, exist_ok=True)
        named = {str(number): tensor for number, tensor in enumerate(tensors)}
        metadata = {**self._identity(span), "crc32": _checksum(tensors)}
        path = self._file(span)
        try:
            write_file(path, lambda aside: save_file(named, aside, metadata))
        except SafetensorError as error:  # which hides the system's error
            number = re.search(r"os error (\d+)", str(error))
            code = int(number[1]) if number else EIO
            raise OSError(code, os.strerror(code), str(path)) from error

    def finish(self) -> "Recording":
        """Write the manifest, by which the recording is found; OSError if that fails or a file isn't there."""
        self.path.mkdir(parents=True, exist_ok=True)
        recording = Recording(self)
        files = {self._file(span) for span in self.spans}
        for path in self.path.iterdir():  # what killed processes left
            if path not in files:
                path.unlink(missing_ok=True)
        leaves = [{"dtype": str(leaf.dtype).removeprefix("torch."), "shape": leaf.shape} for leaf in self.leaves]
        content = {"format": _FORMAT, "key": self.path.stem, "rows": self.rows, "file_rows": self.file_rows}
        write_json(self.path / _MANIFEST, {**content, "leaves": leaves})
        _verified.add(self.path)
        return recording

    def _file(self, span: range) -> Path:
        return self.path / f"{span.start:09d}.safetensors"

    def _identity(self, span: range) -> dict[str, str]:
        return {"format": str(_FORMAT), "key": self.path.stem, "rows": f"{span.start}-{span.stop}"}


class Recording:
    """A finished recording, opened for reading: a sequence of rows, each one tensor per leaf.

    The files are mapped and read when a row is, so that a recording may be larger than memory. Pickled it is its path.
    """

    def __init__(self, files: RecordingFiles) -> None:
        """Map the files; raises as `RecordingFiles.open` does."""
        self._files = files
        self._tensors = [files.open(span) for span in files.spans]

    def __len__(self) -> int:
        """Number of rows."""
        return self._files.rows

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """One row, without a copy: sent to another process it takes its whole file along, unlike those of `rows`."""
        number, row = self._locate(index)
        return tuple(tensor[row] for tensor in self._tensors[number])

    def rows(self, indices: Iterable[int]) -> tuple[Tensor, ...]:
        """Copy some rows, in the order given, into one (B, ...) tensor per leaf."""
        return tuple(torch.stack(leaf) for leaf in zip(*map(self.__getitem__, indices), strict=True))

    def __reduce__(self) -> tuple[Any, ...]:
        """Send the path, not the rows."""
        return Recording, (self._files,)

    def _locate(self, index: int) -> tuple[int, int]:
        return divmod(range(len(self))[index], self._files.file_rows)


def plan_recordings(
    folder: Path, leaves: Mapping[str, Sequence[Leaf]], *, rows: int, batch: int
) -> list[RecordingFiles]:
    """Recordings by key, which have their rows in the same files: of 64 MiB and 1,024 rows at most, whole batches."""
    row_bytes = max(1, *(sum(leaf.bytes for leaf in one) for one in leaves.values()))
    file_rows = max(min(_FILE_ROWS, _FILE_BYTES // row_bytes) // batch, 1) * batch
    return [RecordingFiles(_path(folder, key), rows, file_rows, tuple(one)) for key, one in leaves.items()]


def find_recording(folder: Path, key: str, rows: int) -> Recording | None:
    """Open a finished recording if there is one, and note that it was used; its content is checked once per process.

    Call it inside `locked`. A damaged recording is named in the log and removed; OSError if it can't be.
    """
    path = _path(folder, key)
    if not (path / _MANIFEST).is_file():
        return None
    try:
        files = _read_manifest(path, rows)
        recording = Recording(files)
        if path not in _verified:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                checks = pool.map(partial(files.open, verify=True), files.spans)
                list(bar("checking recordings", len(files.spans), checks, unit="files", delay=SOON))
            _verified.add(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _LOG.warning(f"{path}: damaged ({error}); it is recorded anew")
        shutil.rmtree(path)
        return None
    os.utime(path)
    return recording


@contextmanager
def locked(folder: Path, key: str) -> Iterator[None]:
    """Be the only one who finds or fills a recording; a second run waits here, at most until this process ends."""
    path = _path(folder, key)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        if not _hold(held, path):
            _LOG.info(f"{path}: waiting for another run that fills or checks it")
            held.enter_context(_lock(path))
        yield


def make_room(folder: Path, needed: int, budget: int, *, keep: Collection[str] = ()) -> bool:
    """Remove the recordings that weren't used for longest until there is room for another, on the disk too.

    Unfinished ones count too, from their last written file on. A recording that another run is filling stays, and so
    do those with a key in `keep`. One that another run has opened may go: that run keeps its rows, and the disk gets
    the space when it ends.

    Returns:
        Whether there is room for the `needed` bytes within the budget. If there can't be, nothing is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = {_path(folder, key) for key in keep}
    with ExitStack() as held:
        held.enter_context(_lock(folder / "room"))  # two runs at once would take each other's locks for runs at work
        sizes = {path: _folder_bytes(path) for path in folder.glob(f"*{_SUFFIX}")}
        free = shutil.disk_usage(folder).free
        excess = max(sum(sizes.values()) + needed - budget, needed + _MARGIN_BYTES - free)
        if excess <= 0:
            return True
        removable = [path for path in sorted(sizes, key=_last_use) if path not in kept and _hold(held, path)]
        if excess > sum(sizes[path] for path in removable):
            return False
        for path in removable:
            if excess > 0:
                used = time.strftime("%Y-%m-%d %H:%M", time.localtime(_last_use(path)))
                (path / _MANIFEST).unlink(missing_ok=True)  # first, so that a kill leaves an unfinished recording
                with suppress(FileNotFoundError):  # another run was faster
                    shutil.rmtree(path)
                _LOG.info(f"{path}: removed to make room ({sizes[path] / 1e9:.2f} GB, last used {used})")
                excess -= sizes[path]
    return True


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}{_SUFFIX}"


def _lock(path: Path) -> FileLock:
    return FileLock(path.with_name(f".{path.name}.lock"))


def _hold(held: ExitStack, path: Path) -> bool:
    """Lock a recording until `held` closes, unless somebody has."""
    try:
        held.enter_context(_lock(path).acquire(timeout=0))
    except Timeout:
        return False
    return True


def _last_use(path: Path) -> float:
    with suppress(FileNotFoundError):  # another run removes
        return path.stat().st_mtime
    return 0.0


def _folder_bytes(path: Path) -> int:
    total = 0
    for entry in path.glob("*"):
        with suppress(FileNotFoundError):  # another run renames and removes
            total += entry.stat().st_size
    return total


def _read_manifest(path: Path, rows: int) -> RecordingFiles:
    content = read_json(path / _MANIFEST)
    expected = {"format": _FORMAT, "key": path.stem, "rows": rows}
    if {**content, **expected} != content:
        raise ValueError(f"{_MANIFEST}: of another recording; expected {expected}")
    leaves = tuple(Leaf(getattr(torch, leaf["dtype"]), tuple(leaf["shape"])) for leaf in content["leaves"])
    return RecordingFiles(path, rows, content["file_rows"], leaves)


def _checksum(tensors: Sequence[Tensor]) -> str:
    """CRC-32 of contiguous tensors, the fastest of the standard library; for accidents and not against attacks."""
    value = 0
    for tensor in tensors:
        content: Any = tensor.reshape(-1).view(torch.uint8).numpy()  # not copied
        value = zlib.crc32(content, value)
    return f"{value:08x}"
