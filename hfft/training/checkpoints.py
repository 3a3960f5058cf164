"""Which checkpoint of a phase a killed run goes on from: the newest one that is whole."""

import zipfile
from pathlib import Path

from accelerate import PartialState
from accelerate.logging import get_logger
from safetensors import SafetensorError, safe_open

from hfft.errors import first_line
from hfft.system.files import read_json

_LOG = get_logger(__name__)


def newest_checkpoint(folder: Path, *, is_scaled: bool = False) -> Path | None:
    """The checkpoint with the highest step whose files all open; a damaged one is passed over with a warning.

    Args:
        folder: Of a phase.
        is_scaled: Whether the phase scales its loss (float16), without whose state it would go on otherwise.
    """
    found = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()}
    for _, path in sorted(found.items(), reverse=True):
        problem = damage(path, is_scaled=is_scaled)
        if problem is None:
            return path
        _LOG.warning(f"{path}: not whole ({problem}); trying the one before")
    return None


def damage(folder: Path, *, is_scaled: bool = False) -> str | None:
    """What keeps a checkpoint from being continued by as many processes; None where all its files open."""
    try:
        weights = [*folder.glob("*.safetensors")]
        if not weights:
            return "no weights"
        config = "adapter_config.json" if (folder / "adapter_model.safetensors").exists() else "config.json"
        for path in (folder / "trainer_state.json", folder / config):
            read_json(path)
        for path in weights:
            with safe_open(path, framework="pt") as tensors:
                tensors.keys()
        # Trainer goes on without the scaler's and the random states, silently.
        for name in ("optimizer.pt", "scheduler.pt", *(("scaler.pt",) if is_scaled else ()), *_random_states()):
            with zipfile.ZipFile(folder / name) as archive:
                broken = archive.testzip()
            if broken is not None:
                return f"{name}: {broken} is damaged"
    except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
        return first_line(error)
    return None


def _random_states() -> list[str]:
    """The files that Trainer writes, one for each process."""
    processes = PartialState().num_processes
    return ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
