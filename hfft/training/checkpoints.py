"""Which checkpoint of a phase a killed run goes on from: the newest one that is whole."""

import json
import zipfile
from pathlib import Path

from accelerate.logging import get_logger
from safetensors import SafetensorError, safe_open

_LOG = get_logger(__name__)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the highest step whose files all open; a damaged one is passed over with a warning."""
    found = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()}
    for _, path in sorted(found.items(), reverse=True):
        problem = damage(path)
        if problem is None:
            return path
        _LOG.warning(f"{path}: not whole ({problem}); trying the one before")
    return None


def damage(folder: Path) -> str | None:
    """What keeps a checkpoint from being continued or reloaded; None where all its files open."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        weights = [*folder.glob("*.safetensors")]
        if not weights:
            return "no weights"
        for path in weights:
            with safe_open(path, framework="pt") as tensors:
                tensors.keys()
        for name in ("optimizer.pt", "scheduler.pt"):
            with zipfile.ZipFile(folder / name) as archive:
                broken = archive.testzip()
            if broken is not None:
                return f"{name}: {broken} is damaged"
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        return str(error).splitlines()[0]
    return None
