"""Rows of tensors kept on disk between phases and runs: boundary activations, for replay.py.

A cache folder holds one folder per recording, `<key>.recording`: files of some hundred rows each, and a manifest that
is written last. Every file is checked against its own checksum before it is used, so that what a killed run, a full
disk or a failing one left behind is computed again and never trained on.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from hfft.replay.store import FORMAT, Layout, Leaf, checksum, say
from hfft.system.files import read_json, write_json

_MANIFEST = "manifest.json"
_SUFFIX = ".recording"
_FILE_BYTES = 64 * 2**20  # a file is held in memory until it is written
_FILE_ROWS = 1024
_MARGIN_BYTES = 2**30  # of disk, left to everybody else


class Recording:
    """A finished recording, opened for reading: a sequence of rows, each one tensor per leaf.

    The files are mapped and read when a row is, so that a recording may be larger than memory. Pickled it is its path.
    """

    def __init__(self, layout: Layout) -> None:
        """Map the files; OSError if one of them isn't there or isn't what it should be."""
        self._layout = layout
        self._files = [layout.open(span) for span in layout.spans]

    def __len__(self) -> int:
        """Number of rows."""
        return self._layout.rows

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """One row, without a copy.

        What is written into these tensors changes the row for this process and stays in memory: clone them first.
        Sent to another process such a tensor takes its whole file along: send the copies that `rows` makes.
        """
        number, row = self._locate(index)
        return tuple(tensor[row] for tensor in self._files[number])

    @property
    def bytes(self) -> int:
        """Bytes of all rows."""
        return len(self) * sum(leaf.bytes for leaf in self._layout.leaves)

    def rows(self, indices: Iterable[int]) -> tuple[Tensor, ...]:
        """Copy some rows, in the order given, into one (B, ...) tensor per leaf."""
        places = [self._locate(index) for index in indices]
        leaves = range(len(self._layout.leaves))
        return tuple(torch.stack([self._files[number][leaf][row] for number, row in places]) for leaf in leaves)

    def __reduce__(self) -> tuple[Any, ...]:
        """Send the path, not the rows."""
        return Recording, (self._layout,)

    def _locate(self, index: int) -> tuple[int, int]:
        return divmod(range(len(self))[index], self._layout.file_rows)


class Recorder:
    """Fills a recording, file by file and in any order; what a killed process had written is kept.

    Several processes may share the work, each with recorders made from the same arguments: each writes spans of its
    own, for example `recorder.missing(recorder.spans[rank::world])`, and one of them finishes when all are done.

    Attributes:
        spans: The rows of each file. All but the last have the same length, a multiple of the batch size: about
            64 MiB, and 1,024 rows at most.
    """

    def __init__(
        self, folder: Path, key: str, *, rows: int, leaves: Sequence[Leaf], about: Mapping[str, Any], batch: int
    ) -> None:
        """Begin a recording, or go on with an unfinished one.

        Args:
            folder: The cache.
            key: A file name without a suffix, made from all that the rows depend on.
            rows: How many there will be.
            leaves: The tensors of a row.
            about: What the manifest tells people; must be JSON.
            batch: Rows that are computed at once, and so written to one file.
        """
        row_bytes = max(sum(leaf.bytes for leaf in leaves), 1)
        file_rows = max(min(_FILE_ROWS, _FILE_BYTES // row_bytes) // batch, 1) * batch
        self._layout = Layout(_path(folder, key), key, rows, file_rows, tuple(leaves))
        self._about = json.loads(json.dumps(about))  # as it will be read
        self.spans = self._layout.spans

    def missing(self, spans: Sequence[range] | None = None) -> list[range]:
        """Those of some spans (all if None) that are still to be written; the files of the others are read for it."""
        return self._layout.missing(self.spans if spans is None else spans)

    def room(self, span: range) -> list[Tensor]:
        """Memory for the rows of one file, to be filled and written: one (len(span), ...) tensor per leaf."""
        return [torch.empty(block.shape, dtype=block.dtype) for block in self._layout.blocks(span)]

    def write(self, span: range, tensors: Sequence[Tensor]) -> None:
        """Write one file; it appears whole or not at all.

        Args:
            span: One of `spans`.
            tensors: One per leaf, (len(span), ...), on any device.

        Raises:
            ValueError: If the tensors aren't what the recorder was made for.
            OSError: If the disk is full or fails; nothing of this file is left then.
        """
        blocks = [tensor.detach().cpu().contiguous() for tensor in tensors]
        found = [Leaf(block.dtype, tuple(block.shape)) for block in blocks]
        if span not in self.spans or found != self._layout.blocks(span):
            raise ValueError(f"rows {span}: expected {self._layout.blocks(span)}, found {found}")
        self._layout.path.mkdir(parents=True, exist_ok=True)
        self._layout.write(span, blocks)

    def finish(self) -> Recording:
        """Write the manifest, which makes this a recording that can be found, and open it.

        Raises:
            OSError: If a file isn't there, or the manifest can't be written.
        """
        layout = self._layout
        layout.path.mkdir(parents=True, exist_ok=True)
        recording = Recording(layout)
        files = {layout.file(span) for span in self.spans}
        for path in layout.path.iterdir():  # what killed processes left
            if path not in files:
                path.unlink(missing_ok=True)
        leaves = [{"dtype": str(leaf.dtype).removeprefix("torch."), "shape": leaf.shape} for leaf in layout.leaves]
        content = {"format": FORMAT, "key": layout.key, "rows": layout.rows, "file_rows": layout.file_rows}
        content |= {"bytes": recording.bytes, "leaves": leaves, "about": self._about}
        write_json(layout.path / _MANIFEST, {**content, "crc32": _manifest_checksum(content)})
        return recording


def find_recording(folder: Path, key: str) -> Recording | None:
    """Open a finished recording after reading every byte of it once, and note that it was used.

    Call it inside `locked`. A damaged file is named in the log and removed; the recording counts as unfinished then,
    and a `Recorder` with the same arguments writes only that file again.

    Args:
        folder: The cache.
        key: As given to the recorder.

    Returns:
        The recording, or None if there is none, or none that is whole and of a format known here.

    Raises:
        OSError: If the folder can't be written to.
    """
    manifest = _path(folder, key) / _MANIFEST
    try:
        layout = _read_manifest(manifest, key)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        say(logging.WARNING, f"{manifest}: damaged ({error}); the recording counts as unfinished")
        return None
    if missing := layout.missing(layout.spans):
        files = f"{len(missing)} of {len(layout.spans)} files"
        say(logging.WARNING, f"{layout.path}: {files} are missing or damaged; they are computed again")
        manifest.unlink(missing_ok=True)
        return None
    os.utime(manifest)
    return Recording(layout)


@contextmanager
def locked(folder: Path, key: str) -> Iterator[None]:
    """Be the only one who finds or fills a recording; a second run waits here, and says so once.

    The lock is the operating system's: it ends with the process, however that ends. A file system without locks
    makes filelock fall back to a marker file, or raises OSError. Runs that share a recording without a lock do the
    work twice and still get the right rows, since a file is always whole.
    """
    path = _path(folder, key)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        if not _hold(held, path):
            say(logging.INFO, f"{path}: waiting for another run that fills or checks it")
            held.enter_context(_lock(path))
        yield


def make_room(folder: Path, needed: int, budget: int, *, keep: Collection[str] = ()) -> bool:
    """Remove the recordings that weren't used for longest until there is room for another.

    Unfinished ones count too, from their last written file on. A recording that another run is filling stays; one
    that another run has opened may go: that run keeps its rows, and the disk gets the space when it ends.

    Args:
        folder: The cache.
        needed: Bytes that are still to be written.
        budget: Bytes that all recordings of the folder may take together.
        keep: Keys of recordings that must stay.

    Returns:
        Whether there is room, on the disk too. If there can't be, nothing is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder / "room"):  # two runs that look at once would each take the other's locks for runs at work
        return _make_room(folder, needed, budget, {_path(folder, key) for key in keep})


def _make_room(folder: Path, needed: int, budget: int, kept: Collection[Path]) -> bool:
    sizes = {path: _folder_bytes(path) for path in folder.glob(f"*{_SUFFIX}")}
    free = shutil.disk_usage(folder).free
    excess = max(sum(sizes.values()) + needed - budget, needed + _MARGIN_BYTES - free)
    if excess <= 0:
        return True
    with ExitStack() as held:
        removable = [path for path in sorted(sizes, key=_last_use) if path not in kept and _hold(held, path)]
        if excess > sum(sizes[path] for path in removable):
            return False
        for path in removable:
            if excess > 0:
                _remove(path, sizes[path])
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
    """Seconds since the epoch; of an unfinished recording, when its last file was written."""
    for place in (path / _MANIFEST, path):
        with suppress(FileNotFoundError):
            return place.stat().st_mtime
    return 0.0


def _folder_bytes(path: Path) -> int:
    total = 0
    for entry in path.glob("*"):
        with suppress(FileNotFoundError):  # another run renames and removes
            total += entry.stat().st_size
    return total


def _remove(path: Path, size: int) -> None:
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(_last_use(path)))
    (path / _MANIFEST).unlink(missing_ok=True)  # first, so that a kill leaves an unfinished recording
    with suppress(FileNotFoundError):  # another run was faster
        shutil.rmtree(path)
    say(logging.INFO, f"{path}: removed to make room ({size / 1e9:.2f} GB, last used {used})")


def _read_manifest(path: Path, key: str) -> Layout:
    content = read_json(path)
    stored = content.pop("crc32", None)
    if content.get("format") != FORMAT:
        raise ValueError(f"format {content.get('format')}, this version knows {FORMAT}")
    if stored != _manifest_checksum(content):
        raise ValueError("wrong checksum")
    if content["key"] != key:
        raise ValueError(f"it belongs to {content['key']}")
    leaves = tuple(Leaf(getattr(torch, leaf["dtype"]), tuple(leaf["shape"])) for leaf in content["leaves"])
    return Layout(path.parent, key, content["rows"], content["file_rows"], leaves)


def _manifest_checksum(content: Mapping[str, Any]) -> str:
    return checksum([json.dumps(content, sort_keys=True).encode()])
