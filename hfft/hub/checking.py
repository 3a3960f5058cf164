"""Reading back: what was pushed, downloaded into an empty cache and compared with the run by hashes and logits."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from huggingface_hub import get_token, snapshot_download
from PIL import Image
from transformers import AutoConfig

from hfft.data.images.decoding import Decoded, decode_row
from hfft.data.images.transforms import evaluation_transform
from hfft.data.sources.reading import images_of_run
from hfft.errors import DataError, ModelError, PushError
from hfft.hub.access import hub_errors, tidy_client
from hfft.hub.content import File, hash_file
from hfft.inference.opening import open_model
from hfft.runs.locating import adapter_base
from hfft.system.signals import apart

_IMAGES = 4
_TOLERANCE = 1e-5  # of logits, relative to the largest where that is above 1


def read_back(
    repo_id: str,
    commit: str,
    files: Sequence[File],
    folders: Mapping[Path, str],
    run: Path,
    *,
    trust_remote_code: bool,
) -> tuple[int, bool, float]:
    """Download a commit into an empty cache and compare it with the files that were pushed, and with the run's models.

    `folders` are model and adapter folders of the run -> their folders in the repository. What differs is a PushError.

    Returns:
        How many images went through both models, whether they are the run's own, and the logits' largest difference.
    """
    PartialState()  # loggers below ask it which process this is
    with TemporaryDirectory(prefix="hfft-", ignore_cleanup_errors=True) as cache:
        with hub_errors(f"{repo_id}: the files were sent (commit {commit[:8]}), reading them back"), tidy_client():
            download = partial(snapshot_download, repo_id, revision=commit, cache_dir=cache, token=get_token())
            snapshot = Path(apart(download))
        where = f"{repo_id} at {commit[:8]}"
        for file in files:
            path = snapshot / file.path
            if not path.is_file():
                raise PushError(f"{where}: {file.path} was sent and isn't there; push again")
            if hash_file(path) != file.sha256:
                raise PushError(f"{where}: {file.path} isn't what was sent; push again")
        images, from_data = _images(run)
        differences = [
            _compare_logits(ours, snapshot / place, images, where, trust_remote_code=trust_remote_code)
            for ours, place in folders.items()
        ]
    return len(images), from_data, max(differences)


def has_labels_of_base(adapter: Path, base_model: str | None) -> bool:
    """Whether transformers' pipeline would answer with the labels of what an adapter sits on, which are others.

    It makes the network from the base's config, and only another number of classes keeps it from that. `base_model`
    is the Hub id of the base, where the folder doesn't say what others can open.
    """
    name, revision = adapter_base(adapter) if base_model is None else (base_model, None)
    try:
        base = AutoConfig.from_pretrained(name, revision=revision)
        own = AutoConfig.from_pretrained(adapter)
    except (OSError, ValueError, KeyError):
        return False  # what can't be opened answers nothing
    return base.num_labels == own.num_labels and base.id2label != own.id2label


def _compare_logits(
    ours: Path, theirs: Path, images: Sequence[Decoded], where: str, *, trust_remote_code: bool
) -> float:
    expected = _logits(ours, images, trust_remote_code=trust_remote_code)
    try:
        found = _logits(theirs, images, trust_remote_code=trust_remote_code)
    except ModelError as error:
        raise PushError(
            f"{where}: what was pushed can't be opened: {str(error).replace(str(theirs), where)}"
        ) from error
    if found.shape != expected.shape:
        raise PushError(f"{where}: the model there has {found.shape[1]} classes, and {ours} {expected.shape[1]}")
    difference = float((found - expected).abs().max())
    if not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
        raise PushError(
            f"{where}: its logits differ from those of {ours} by {difference:.2g}; is the adapter's base another one?"
        )
    return difference


def _logits(folder: Path, images: Sequence[Decoded], *, trust_remote_code: bool) -> torch.Tensor:
    """(N, K) float32, image by image as sizes may differ, through the folder's own processor."""
    model, processor = open_model(str(folder), trust_remote_code=trust_remote_code)
    transform = evaluation_transform(processor)
    with torch.inference_mode():
        return torch.cat([model(pixel_values=transform(image).unsqueeze(0)).logits.float() for image in images])


def _images(run: Path) -> tuple[list[Decoded], bool]:
    """A few held-out images of the run, and True; noise, and False, where its data is gone."""
    found: list[Decoded] = []
    with suppress(DataError):
        splits = images_of_run(run).splits
        rows: Dataset = next(splits[name] for name in ("validation", "test", "train") if name in splits)
        for place in np.linspace(0, len(rows) - 1, min(_IMAGES, len(rows))).astype(int).tolist():
            with suppress(DataError):  # one that the run left out
                found.append(decode_row(rows[place]))
    if found:
        return found, True
    noise = np.random.default_rng(0).integers(0, 256, (_IMAGES, 256, 256, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise], False
