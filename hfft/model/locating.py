"""What `model.checkpoint` names of what hfft wrote, and whether two checkpoints are the same files."""

from pathlib import Path

from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME
from xxhash import xxh3_128

from hfft.errors import ModelError
from hfft.system.files import folder_at, read_json

_FILES = ("config.json", "*processor_config.json", "adapter_config.json", "*.safetensors", "*.index.json", "*.py")
_PIECE = 2**24  # bytes
GIVEN = "given"  # below a run's folder: a model object that the run began with
MERGED = "merged"  # below an adapter phase's folder: the network with the adapter added


def files_fingerprint(checkpoint: str) -> str | None:
    """Hash over the files of a checkpoint's folder that a model is made from; None for one of the Hub.

    Args:
        checkpoint: Folder or Hub id.
    """
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

    Args:
        checkpoint: As in a recipe: also a run folder, or a phase's.

    Raises:
        ModelError: If the run or the phase isn't finished, or the folder holds the adapter of a phase alone.
    """
    folder = folder_at(checkpoint)
    if folder is None or (folder / "config.json").is_file():
        return checkpoint
    if (folder / "recipe.yaml").is_file():
        result = run_result(folder)
        if result is None:
            raise _unfinished(folder, "this run")
        return str(result)
    if (folder / "plan.json").is_file():
        if not (folder / "result.json").is_file():
            raise _unfinished(folder, "this phase")
        best = folder / read_json(folder / "result.json")["checkpoint"]
        folder = folder / MERGED if (folder / MERGED).is_dir() else best
    if (folder / ADAPTER_CONFIG_NAME).is_file() and not (folder / "config.json").is_file():
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
    result = run_result(run) if (run / "recipe.yaml").is_file() else None
    return checkpoint if result is None else str(result)


def run_result(run: Path) -> Path | None:
    """The model folder that a run ended with, or its adapter folder where nothing was merged."""
    return next((run / name for name in ("model", "adapter") if (run / name / "config.json").is_file()), None)


def _unfinished(folder: Path, what: str) -> ModelError:
    return ModelError(
        f"model.checkpoint: {folder}: {what} is not finished; run its `hfft train` command again, or name the folder "
        "of a phase that is"
    )
