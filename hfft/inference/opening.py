"""A folder or a Hub id -> a model on its device, and its image processor."""

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
from hfft.system.hub_lookup import hub_problem

_FILES = ["*.json", "*.safetensors"]
_CODE = ["*.py"]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Opening(TypedDict, total=False):
    """What `open_model` takes beside a source."""

    revision: str | None
    trust_remote_code: bool
    subfolder: str | None


def open_model(
    source: str, *, revision: str | None = None, trust_remote_code: bool = False, subfolder: str | None = None
) -> tuple[PreTrainedModel, Any]:
    """Load a model or an adapter that was saved with its labels and its processor.

    Args:
        source: Folder or Hub id, of a model or of an adapter, which is merged into what it sits on.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Runs the Python code that the model brings, where it brings some.
        subfolder: Where in the folder or the repository it is, such as `adapter`; at its top when None.

    Returns:
        The model on the CPU, in evaluation mode, float32, and the processor.

    Raises:
        ModelError: If there is no such model, part of it is missing, or it brings code that isn't trusted.
    """
    is_folder = Path(source).is_dir()
    if is_folder and revision is not None:
        raise ModelError(f"{source}: a folder has no revision, found {revision!r}; leave it out")
    files = [*_FILES, *_CODE] if trust_remote_code else _FILES
    top = Path(source) if is_folder else _download(source, revision, files, subfolder)
    folder = _inside(top, source, subfolder)
    try:
        return _open_folder(folder, trust_remote_code=trust_remote_code)
    except ModelError as error:
        raise ModelError(str(error).replace(str(top), source)) from error


def local_folder(source: str, *, revision: str | None = None, subfolder: str | None = None) -> Path:
    """The folder of a model that `open_model` opens: itself, or where the Hub's files are.

    Raises:
        ModelError: If there is no such model.
    """
    top = Path(source) if Path(source).is_dir() else _download(source, revision, subfolder=subfolder)
    return _inside(top, source, subfolder)


def _inside(top: Path, source: str, subfolder: str | None) -> Path:
    folder = top / (subfolder or ".")
    if not folder.is_dir():
        raise ModelError(f"{source} has no folder {subfolder} with a model; leave the subfolder out, or name another")
    return folder


def holds_adapter(source: str, *, revision: str | None = None) -> bool:
    """Whether a folder or Hub id holds an adapter, and no plain model.

    Raises:
        ModelError: If there is no such repository.
    """
    return (local_folder(source, revision=revision) / ADAPTER_CONFIG_NAME).is_file()


def place(model: PreTrainedModel, device: torch.device | str | int | None, dtype: torch.dtype | str | None) -> None:
    """Move a model.

    Args:
        model: Is moved.
        device: The accelerator, if there is one, when None.
        dtype: Of the weights and the computation, such as `bfloat16`; float32 when None.

    Raises:
        ModelError: If there is no such device or type.
    """
    model.to(_device(device))  # pyright: ignore[reportArgumentType]
    model.to(_dtype(dtype))  # pyright: ignore[reportArgumentType]


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


def _download(repo_id: str, revision: str | None, files: Sequence[str] = _FILES, subfolder: str | None = None) -> Path:
    """The repository's files that make a model, in the cache of huggingface_hub."""
    inside = "" if subfolder is None else f"{subfolder.strip('/')}/"
    problem = hub_problem(repo_id, "model", revision)
    if problem is None:
        try:
            return Path(
                snapshot_download(
                    repo_id,
                    revision=revision,
                    allow_patterns=[inside + pattern for pattern in files],
                    ignore_patterns=f"{inside}*/*",
                )
            )
        except HFValidationError:
            problem = "it is no Hub id either (name, or owner/name)"
        except LocalEntryNotFoundError:
            at = "" if revision is None else f" at revision {revision!r}"
            problem = f"it was not downloaded before{at}, and the Hub is not asked (HF_HUB_OFFLINE) or not reached"
        except (HfHubHTTPError, httpx2.TransportError, OSError) as error:
            problem = f"its download failed: {first_line(error)}"
    raise ModelError(f"{repo_id} is no folder here, and {problem}")


def _device(asked: torch.device | str | int | None) -> torch.device:
    if asked is None:
        return _accelerator() or torch.device("cpu")
    try:
        device = torch.device(asked)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = "cpu" if (found := _accelerator()) is None else f"cpu, {found.type}"
        raise ModelError(f"device: {asked} can't be used: {first_line(error)}; here is: {there}") from error
    return device


def _dtype(asked: torch.dtype | str | None) -> torch.dtype:
    dtype = torch.float32 if asked is None else getattr(torch, asked, None) if isinstance(asked, str) else asked
    if dtype not in _DTYPES:
        allowed = ", ".join(str(one).removeprefix("torch.") for one in _DTYPES)
        raise ModelError(f"dtype: found {asked}; allowed: {allowed}")
    return dtype


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
