"""The images of a run: described for data.json, and found again where its recipe says."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hfft.data.audit.filtering import Checked
from hfft.data.audit.findings import described
from hfft.data.sources.advice import missing_path
from hfft.data.sources.reading import ImageData, load_data
from hfft.data.sources.targets import targets_of
from hfft.errors import DataError
from hfft.runs.record import RunRecord
from hfft.system.paths import expanded


def describe_images(checked: Checked) -> dict[str, Any]:
    """Content of data.json."""
    images, prints = checked.images, checked.fingerprints
    return {
        "labels": list(images.labels),
        "task": images.task,
        "splits": {name: describe_split(images, name, fingerprint) for name, fingerprint in prints.items()},
        "skipped": [asdict(skip) for skip in checked.skipped],
        "findings": [described(finding) for finding in checked.findings],
    }


def describe_split(images: ImageData, split: str, fingerprint: str) -> Mapping[str, Any]:
    """What data.json holds of a split."""
    targets = targets_of(images.splits[split], len(images.labels))
    return {
        "images": len(images.splits[split]),
        "counts": images.counts(split),
        "carved": split in images.carved,
        "fingerprint": fingerprint,
        **({} if targets is None else {"targets": hashlib.blake2b(targets.tobytes(), digest_size=16).hexdigest()}),
    }


def images_of_run(folder: Path) -> ImageData:
    """What the recipe of a run finds, without the images that the run left out as they can't be read.

    Those of a folder or a file are not looked for on the Hub, where the same name may be that of somebody's data set.

    Args:
        folder: Of the run; where it was downloaded from the Hub, its recipe alone.

    Raises:
        DataError: If they aren't there any more. Whether they are still the same isn't looked at.
    """
    run = RunRecord(folder)
    recipe, origin = run.recipe, run.environment.get("origin", {}).get("data", {})
    source = recipe.data.source
    if origin.get("kind") == "local" and not Path(expanded(source)).exists():
        raise DataError(f"data.source of {folder}: {missing_path(source)}")
    return load_data(recipe.data, recipe.seed, without=[skip["file"] for skip in run.skipped])
