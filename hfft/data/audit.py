"""Every image file is opened and decoded once before training, so that a broken one is named before it costs hours."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset
from tqdm import tqdm

from hfft.data.content import read_content
from hfft.data.transforms import decode, is_deep, open_image
from hfft.errors import DataError

_SHOWN = 10
_LOG = get_logger(__name__)


@dataclass(frozen=True)
class Audit:
    """What was found in a split.

    Attributes:
        fingerprint: Hash over every row's file name, label and bytes.
        broken: Files that can't be decoded, each with the reason.
        deep: Number of images with more than 8 bits per channel.
    """

    fingerprint: str
    broken: dict[str, str]
    deep: int = 0


def audit(rows: Dataset, name: str) -> Audit:
    """Read and decode every image of a split, in parallel.

    Args:
        rows: Columns `image` (not decoded), `label` and `file`.
        name: Shown beside the progress bar, which appears when the work takes more than three seconds.
    """
    digest = hashlib.blake2b(digest_size=16)
    broken: dict[str, str] = {}
    deep = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # By number: the pool takes all its arguments at once, and rows may hold the bytes of their images.
        results = pool.map(lambda number: _examine(rows[number]), range(len(rows)))
        named = rows.select_columns(["file", "label"])
        row: Any
        for row, (content, problem, has_deep_pixels) in zip(
            named, tqdm(results, name, len(rows), delay=3, unit=" images"), strict=True
        ):
            deep += has_deep_pixels
            digest.update(f"{row['file']}\0{row['label']}\0".encode() + content)
            if problem is not None:
                broken[row["file"]] = problem
    return Audit(fingerprint=digest.hexdigest(), broken=broken, deep=deep)


def refuse_broken(audits: dict[str, Audit], source: str) -> None:
    """Raise one error that lists the undecodable files of all splits; if there are none, warn of deep images.

    Raises:
        DataError: If there is any.
    """
    broken = {file: problem for audit in audits.values() for file, problem in audit.broken.items()}
    if not broken:
        _warn_of_deep(sum(audit.deep for audit in audits.values()), source)
        return
    lines = [f"  {file}: {problem}" for file, problem in list(broken.items())[:_SHOWN]]
    more = [f"  and {len(broken) - _SHOWN} more"] if len(broken) > _SHOWN else []
    files = "1 file is" if len(broken) == 1 else f"{len(broken)} files are"
    raise DataError("\n".join([f"{source}: {files} no readable image; repair or remove:", *lines, *more]))


def _warn_of_deep(count: int, source: str) -> None:
    if count == 0:
        return
    PartialState()  # the logger asks it which process this is
    images = "1 image has" if count == 1 else f"{count} images have"
    _LOG.warning(
        f"{source}: {images} more than 8 bits per channel, which are scaled to 8 here; transformers' own "
        'pipeline("image-classification") saturates them instead: use the model through hfft.Classifier, or convert '
        "the files to 8 bits"
    )


def _examine(row: Any) -> tuple[bytes, str | None, bool]:
    """Hash of an image's bytes, why it can't be decoded, and whether it is a deep one."""
    if row["image"] is None:
        return b"", "the row holds no image", False
    try:
        content = read_content(row["image"])
    except OSError as error:
        return b"", error.strerror or str(error), False
    digest = hashlib.blake2b(content, digest_size=16).digest()
    try:
        image = open_image(content)
        decode(image, draft=True)
    except DataError as error:
        return digest, str(error), False
    return digest, None, is_deep(image)
