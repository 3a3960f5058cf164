"""Files of a folder of images that become no row: found by their names and their first bytes."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from stat import S_ISREG

from hfft.data.audit.findings import Finding
from hfft.data.sources.folders import UNREAD, files_of, is_image
from hfft.data.sources.layout import find_layout
from hfft.system.text import printable_path

_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n": "PNG",
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
_BOXES = {b"avif": "AVIF", b"heic": "HEIF", b"heix": "HEIF", b"mif1": "HEIF"}


def find_strays(folder: Path, files: Collection[str], *, by_folder: bool = False) -> Iterator[Finding]:
    """Images that are left out of a folder of class folders, each with the reason.

    Args:
        folder: Holds class folders, or split folders of class folders.
        files: Names of the rows, below the folder.
        by_folder: As `find_layout` has it.
    """
    splits = [root for roots in find_layout(folder, by_folder=by_folder).splits.values() for root in roots]
    beside, within = map(set, files_of(folder, splits))
    for file in sorted(beside | within):
        reason = _reason(file, is_beside=file in beside)
        name = printable_path(file.relative_to(folder).as_posix())
        if reason is not None and name not in files:
            yield Finding("left out", reason, (name,), 1)


def _reason(file: Path, *, is_beside: bool) -> str | None:
    if is_image(file):
        return "lies beside the class folders" if is_beside else None
    if file.suffix.lower() in UNREAD:
        return f"{file.suffix.lower()} is not read"
    kind = _kind(file)
    return None if kind is None else f"is {kind}, and its name does not say so"


def _kind(file: Path) -> str | None:
    """The format of an image, as its first bytes tell."""
    try:
        if not S_ISREG(os.stat(file).st_mode):
            return None
        with open(file, "rb") as stream:
            start = stream.read(16)
    except OSError:
        return None
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WEBP"
    if start[4:8] == b"ftyp":
        return _BOXES.get(start[8:12])
    return next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None)
