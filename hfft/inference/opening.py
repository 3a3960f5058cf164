"""A run folder, a model or adapter folder, or a Hub id -> a model on its device, and its image processor."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import httpx2
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedModel
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from hfft.errors import ModelError, first_line
from hfft.model.checkpoint import reopen
from hfft.runs.record import ADAPTER, MODEL, RunRecord
from hfft.system.hub_lookup import hub_problem

_FILES = ["*.json", "*.safetensors"]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Opening(TypedDict, total=False):
    """Options of `open_model`."""

    revision: str | None
    trust_remote_code: bool
    subfolder: str | None


def model_source(source: str | os.PathLike[str]) -> str:
    """The model folder of a finished run, or its adapter folder where nothing was merged; anything else as it is."""
    run = RunRecord(source)
    if not run.is_run or (run.folder / "config.json").is_file():  # a pushed model has both
        return str(source)
    run.check_finished()
    return str(run.model_dir)


def source_name(source: str) -> str:
    """What a run, a model folder or a repository on the Hub is called."""
    if not Path(source).is_dir():
        return source.rpartition("/")[2]
    folder = Path(source).resolve()
    is_result = folder.name in (MODEL, ADAPTER) and RunRecord(folder.parent).is_run
    return folder.parent.name if is_result else folder.name


def open_model(
    source: str, *, revision: str | None = None, trust_remote_code: bool = False, subfolder: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """Load a model or an adapter, which is merged into its base model, with its labels and its processor.

    The model is on the CPU, in evaluation mode and float32. `subfolder` says where in the folder or the repository it
    is.

    Raises:
        ModelError: If there is no such model, part of it is missing, or it brings code that isn't trusted.
    """
    if revision is not None and Path(source).is_dir():
        raise ModelError(f"{source}: a folder has no revision, found {revision!r}; leave it out")
    top, folder = _find(source, revision, subfolder, files=[*_FILES, "*.py"] if trust_remote_code else _FILES)
    try:
        return _open_folder(folder, trust_remote_code=trust_remote_code)
    except ModelError as error:
        raise ModelError(str(error).replace(str(top), source)) from error


def local_folder(source: str, revision: str | None = None, subfolder: str | None = None) -> Path:
    """The folder that `open_model` opens, in the Hub's cache for a Hub id; ModelError if there is no such model."""
    return _find(source, revision, subfolder, files=_FILES)[1]


def move_model(
    model: PreTrainedModel, device: torch.device | str | int | None, dtype: torch.dtype | str | None
) -> None:
    """Move a model to a device, the accelerator if there is one when None, and to a dtype, float32 when None.

    Raises:
        ModelError: If there is no such device or dtype.
    """
    model.to(_device(device))  # pyright: ignore[reportArgumentType]
    model.to(_dtype(dtype))  # pyright: ignore[reportArgumentType]


def _find(source: str, revision: str | None, subfolder: str | None, *, files: Sequence[str]) -> tuple[Path, Path]:
    """The local folder of a source, and the model's in it."""
    top = Path(source) if Path(source).is_dir() else _download(source, revision, files, subfolder)
    folder = top / (subfolder or ".")
    if not folder.is_dir():
        raise ModelError(f"{source} has no folder {subfolder} with a model; leave the subfolder out, or name another")
    return top, folder


def _open_folder(folder: Path, *, trust_remote_code: bool) -> tuple[PreTrainedModel, Any]:
    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        return reopen(folder, trust_remote_code=trust_remote_code)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: the adapter has no config.json, so nobody can know its labels")
    from hfft.model.adapters import open_adapter  # and PEFT, which other models don't need

    try:
        return open_adapter(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{folder}: the adapter can't be loaded: {first_line(error)}") from error


def _download(repo_id: str, revision: str | None, files: Sequence[str], subfolder: str | None) -> Path:
    """Download the model files of a repository to the cache of huggingface_hub."""
    inside = "" if subfolder is None else f"{subfolder.strip('/')}/"
    problem = hub_problem(repo_id, "model", revision)
    if problem is None:
        wanted: dict[str, Any] = {"allow_patterns": [inside + one for one in files], "ignore_patterns": f"{inside}*/*"}
        try:
            return Path(snapshot_download(repo_id, revision=revision, **wanted))
        except HFValidationError:
            problem = "it is no Hub id either (name, or owner/name)"
        except LocalEntryNotFoundError:
            at = "" if revision is None else f" at revision {revision!r}"
            problem = f"it was not downloaded before{at}, and the Hub is not asked (HF_HUB_OFFLINE) or not reached"
        except (HfHubHTTPError, httpx2.TransportError, OSError) as error:
            problem = f"its download failed: {first_line(error)}"
    raise ModelError(f"{repo_id} is no folder here, and {problem}")


def _device(asked: torch.device | str | int | None) -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if asked is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(asked)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        available = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        raise ModelError(f"device: {asked} can't be used: {first_line(error)}; here is: {available}") from error
    return device


def _dtype(asked: torch.dtype | str | None) -> torch.dtype:
    dtype = torch.float32 if asked is None else getattr(torch, asked, None) if isinstance(asked, str) else asked
    if dtype not in _DTYPES:
        allowed = ", ".join(str(one).removeprefix("torch.") for one in _DTYPES)
        raise ModelError(f"dtype: found {asked}; allowed: {allowed}")
    return dtype
