"""The files of a recording: some hundred rows each, with a checksum, mapped into memory when they are read."""

import json
import logging
import os
import re
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from errno import EIO
from io import RawIOBase
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hfft.system.progress import SOON, bar

FORMAT = 1
_CHUNK_BYTES = 2**20
_LOG = get_logger(__name__)


@dataclass(frozen=True)
class Leaf:
    """One tensor of a row.

    Attributes:
        dtype: Any that safetensors knows; float32, bfloat16 and float16 among them.
        shape: Of one row, without the batch dimension.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes per row."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Layout:
    """Which rows lie in which file of a recording, and what a whole file looks like."""

    path: Path
    key: str
    rows: int
    file_rows: int
    leaves: tuple[Leaf, ...]

    @property
    def spans(self) -> list[range]:
        """The rows of each file."""
        return [range(start, min(start + self.file_rows, self.rows)) for start in range(0, self.rows, self.file_rows)]

    def file(self, span: range) -> Path:
        """Path of the file with these rows."""
        return self.path / f"{span.start:09d}.safetensors"

    def open(self, span: range) -> tuple[Tensor, ...]:
        """Map a file, one (R, ...) tensor per leaf, unread; OSError if it isn't there or isn't what it should be."""
        try:
            with safe_open(self.file(span), "pt") as file:  # which maps and does not read (0.8)
                metadata = file.metadata() or {}
                tensors = tuple(file.get_tensor(str(number)) for number in range(len(file.keys())))
        except SafetensorError as error:
            raise _damage(self.file(span), str(error)) from error
        if {name: metadata.get(name) for name in ("format", "key", "rows")} != self._identity(span):
            raise _damage(self.file(span), "it belongs to another recording")
        if [Leaf(tensor.dtype, tuple(tensor.shape)) for tensor in tensors] != self.blocks(span):
            raise _damage(self.file(span), "its tensors have other shapes or dtypes")
        return tensors

    def missing(self, spans: Sequence[range]) -> list[range]:
        """Those whose file isn't whole; a damaged one is named in the log and removed."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = pool.map(self._is_whole, spans)
            whole = list(bar("checking recordings", len(spans), results, unit="files", delay=SOON))
        return [span for span, is_whole in zip(spans, whole, strict=True) if not is_whole]

    def blocks(self, span: range) -> list[Leaf]:
        """Dtype and shape, (R, ...), of the tensors in a file."""
        return [Leaf(leaf.dtype, (len(span), *leaf.shape)) for leaf in self.leaves]

    def write(self, span: range, tensors: Sequence[Tensor]) -> None:
        """Write a file whole or not at all, straight from the tensors' memory; other threads run meanwhile."""
        named = {str(number): tensor for number, tensor in enumerate(tensors)}
        about = {**self._identity(span), "crc32": checksum(map(_raw, tensors))}
        publish(self.file(span), lambda aside: save_file(named, aside, about))

    def _identity(self, span: range) -> dict[str, str]:
        return {"format": str(FORMAT), "key": self.key, "rows": f"{span.start}-{span.stop}"}

    def _is_whole(self, span: range) -> bool:
        try:
            self.open(span)
            stored, computed = _checksums(self.file(span))
            if stored != computed:
                raise _damage(self.file(span), f"checksum {computed} instead of {stored}")
        except FileNotFoundError:
            return False
        except OSError as error:
            say(logging.WARNING, f"{self.file(span)}: damaged ({error.strerror}); it is computed again")
            self.file(span).unlink(missing_ok=True)
            return False
        return True


def checksum(pieces: Iterable[Any]) -> str:
    """CRC-32, the fastest of the standard library, for accidents and not against attacks."""
    value = 0
    for piece in pieces:
        value = zlib.crc32(piece, value)
    return f"{value:08x}"


def _checksums(path: Path) -> tuple[str, str]:
    """The checksum that a file carries, and that of its content, leaf by leaf.

    It is read as a file and not through the map, where a disk error would end the process instead of raising OSError.
    """
    with path.open("rb", buffering=0) as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        stored = header.pop("__metadata__").get("crc32")
        start = file.tell()
        bounds = [header[str(number)]["data_offsets"] for number in range(len(header))]
        return stored, checksum(piece for begin, end in bounds for piece in _pieces(file, start + begin, start + end))


def _pieces(file: RawIOBase, begin: int, end: int) -> Iterator[bytes]:
    file.seek(begin)
    while begin < end and (piece := file.read(min(_CHUNK_BYTES, end - begin))):
        begin += len(piece)
        yield piece


def _raw(tensor: Tensor) -> Any:
    """The bytes of a contiguous tensor, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def publish(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file whole or not at all; another process may write the same one at the same time."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        write(aside)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except SafetensorError as error:  # which hides the system's
        aside.unlink(missing_ok=True)
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _damage(path: Path, reason: str) -> OSError:
    return OSError(EIO, reason, str(path))


def say(level: int, line: str) -> None:
    """Log a line, once for all processes."""
    PartialState()  # the logger asks it which process this is
    _LOG.log(level, line)
