"""Weights that a checkpoint's name stands for where it is a run folder or a phase's; are two checkpoints the same."""

import os
from pathlib import Path

from xxhash import xxh3_128

from hfft.errors import ModelError, RecipeError
from hfft.runs.record import ADAPTER_CONFIG, GIVEN, PhaseRecord, RunRecord
from hfft.system.files import folder_at, read_json

_FILES = ("config.json", "*processor_config.json", "adapter_config.json", "*.safetensors", "*.index.json", "*.py")
_PIECE = 2**24  # bytes


def files_fingerprint(checkpoint: str) -> str | None:
    """Hash over the files of a checkpoint's folder that a model is made from; None for one of the Hub."""
    folder = folder_at(checkpoint)
    if folder is None:
        return None
    digest = xxh3_128()
    for path in sorted({path for pattern in _FILES for path in folder.glob(pattern)}):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    return digest.hexdigest()


def weights_place(checkpoint: str) -> str:
    """The folder with the weights that a checkpoint stands for: a run's result, a phase's best weights, else itself.

    Raises:
        ModelError: If the run or the phase isn't finished, or the folder holds the adapter of a phase alone.
    """
    folder = folder_at(checkpoint)
    if folder is None or (folder / "config.json").is_file():
        return checkpoint
    run, phase = RunRecord(folder), PhaseRecord(folder)
    if run.is_run and run.is_finished:
        return str(run.model_dir)
    if run.is_run or (phase.has_begun and phase.weights is None):
        raise ModelError(
            f"model.checkpoint: {folder}: this {'run' if run.is_run else 'phase'} is not finished; run its `hfft "
            "train` command again, or name the folder of a phase that is"
        )
    folder = phase.weights or folder
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        raise ModelError(
            f"model.checkpoint: {folder} holds the adapter of a phase, without the weights that it sits on; name the "
            "run's folder, or adapter/ in it"
        )
    return str(folder)


def processor_place(checkpoint: str) -> str:
    """The folder with a checkpoint's image processor: for a phase's weights, the result of their run."""
    folder = folder_at(checkpoint)
    if folder is None or any(folder.glob("*processor_config.json")):
        return checkpoint
    run = folder.absolute().parent.parent
    is_written = RunRecord(run).is_run and RunRecord(run).model_dir.is_dir()
    return str(RunRecord(run).model_dir) if is_written else checkpoint


def adapter_base(adapter: Path) -> tuple[str, str | None]:
    """What an adapter folder sits on, and its revision: a checkpoint, or weights of the run that it lies in.

    Those are named relative to the adapter, so that a run can be moved; earlier versions wrote absolute paths.
    """
    content = read_json(adapter / ADAPTER_CONFIG)
    name = str(content["base_model_name_or_path"])
    own = adapter.absolute() / name if name.startswith("../") else _own_weights(adapter, Path(name))
    return name if own is None else os.path.normpath(own), content.get("revision")


def _own_weights(adapter: Path, base: Path) -> Path | None:
    """Weights in the adapter's own run that an absolute base names; None where it sits on something else.

    By the recipe: an adapter sits on the phase before it, unless head phases alone came before.
    """
    run = RunRecord(adapter.absolute().parent)
    if not base.is_absolute() or not run.is_run:
        return None
    if base.name == GIVEN and (run.folder / GIVEN).is_dir():
        return run.folder / GIVEN
    try:
        phases = run.recipe.phases
    except RecipeError:  # of another version of hfft
        return None
    for number in range(1, len(phases)):
        before, own = phases[:number], run.phase(number - 1, phases[number - 1].name).folder / base.name
        sits_on_it = phases[number].adapter is not None and not all(phase.trains_head_alone for phase in before)
        if sits_on_it and base.parent.name == own.parent.name and own.is_dir():
            return own
    return None
