"""The files of a checkpoint folder, looked at before any of them is loaded: whole, and what their names say."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open

from hfft.errors import ModelError
from hfft.recipe.loading import RECIPE
from hfft.system.files import read_json

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_JSON = ("config.json", "preprocessor_config.json", "processor_config.json", _INDEX)
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".pkl", ".onnx", ".gguf", ".safetensors")
_ADAPTER = "adapter_config.json"
_SMALL = ("I8", "U8", "F8", "F6", "F4")  # types of weights that don't say by themselves what they stand for
_LENGTH = 8  # bytes in front of a safetensors header: its length, little-endian
_MOST_READ = 2 * 2**30  # bytes of weights that are searched for NaN before they are loaded: some seconds
_AGAIN = "download or copy it again"


def file_problem(checkpoint: str, revision: str | None = None) -> str | None:
    """Why a checkpoint can't be loaded, as far as its files say without reading weights.

    Args:
        checkpoint: A folder, or a Hub id, of which those files are looked at that are in the cache.
        revision: Of the Hub id.

    Returns:
        The file and what is wrong with it, or None.
    """
    place = Path(checkpoint)
    if place.is_dir():
        return _other_folder(place) or _folder_problem(place, is_whole=True)
    if place.is_file():
        return f"{checkpoint} is a file; name the folder that it is in: {place.parent}"
    try:
        cached = try_to_load_from_cache(checkpoint, "config.json", revision=revision)
    except HFValidationError:
        return None
    return _folder_problem(Path(cached).parent, is_whole=False) if isinstance(cached, str) else None


def check_weights(checkpoint: str) -> None:
    """Check that a folder has weights that hfft reads, none of which is NaN; of many gigabytes, that isn't looked at.

    Args:
        checkpoint: One in which `file_problem` found nothing; a Hub id is not looked at.

    Raises:
        ModelError: If there are none, or others, or one is NaN.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return
    if not any((folder / name).exists() for name in (_WEIGHTS, _INDEX, _ADAPTER)):
        raise _no_weights(folder)
    paths = [folder / _WEIGHTS] if (folder / _WEIGHTS).is_file() else sorted(folder.glob("model-*.safetensors"))
    if sum(path.stat().st_size for path in paths) > _MOST_READ:
        return
    for path in paths:
        broken = list(_nan_tensors(path))
        if broken:
            names = ", ".join(broken[:5])
            raise ModelError(f"model.checkpoint: {path} holds NaN in {len(broken)} weights ({names}); {_AGAIN}")


def _no_weights(folder: Path) -> ModelError:
    there = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in _OTHER_WEIGHTS)
    if not there:
        return ModelError(f"model.checkpoint: {folder} has no weights ({_WEIGHTS})")
    return ModelError(
        f"model.checkpoint: {folder} has its weights as {', '.join(there[:5])}, and hfft reads {_WEIGHTS} alone "
        "(a pickle can run code); where you trust them, open the folder with transformers and save_pretrained it"
    )


def _other_folder(folder: Path) -> str | None:
    """What a folder is, if it holds models and is none."""
    if (folder / "config.json").exists():
        return None
    inside = sorted(path.parent.name for name in (RECIPE, "config.json") for path in folder.glob(f"*/{name}"))
    return f"{folder} is no model, and holds some; name one of them: {', '.join(inside[:5])}" if inside else None


def _folder_problem(folder: Path, *, is_whole: bool) -> str | None:
    for name in _JSON:
        problem = _json_problem(folder / name) if (folder / name).exists() else None
        if problem is not None:
            return f"{folder / name} {problem}"
    if (folder / _WEIGHTS).is_symlink() and not (folder / _WEIGHTS).exists():
        return f"{folder / _WEIGHTS} is a link to a file that is gone; {_AGAIN}"
    if (folder / _WEIGHTS).is_file():
        problem = _tensors(folder / _WEIGHTS)
        return f"{folder / _WEIGHTS} {problem}" if isinstance(problem, str) else None
    if (folder / _INDEX).is_file():
        return _shard_problem(folder, is_whole=is_whole)
    return None


def _nan_tensors(path: Path) -> Iterator[str]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (no dict)
            tensor = file.get_tensor(name)
            if tensor.is_floating_point() and tensor.isnan().any():
                yield name


def _json_problem(path: Path) -> str | None:
    """What keeps a file from being read as a JSON object with something in it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return f"can't be read: {error.strerror}"
    problem = _foreign(data)
    if problem is not None:
        return problem
    try:
        content = json.loads(data.decode("utf-8"))
    except ValueError as error:
        return f"is no JSON ({error}): it was cut or damaged; {_AGAIN}"
    if not isinstance(content, dict) or not content:
        return f"holds {str(content)[:20]!r}, and no settings; {_AGAIN}"
    return None


def _foreign(start: bytes) -> str | None:
    """What is in the place of a file, by its first bytes."""
    if not start.strip(b"\0 \r\n\t"):
        return f"is empty; {_AGAIN}"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the file that it stands for; `git lfs pull` fetches that"
    if start.lstrip().startswith(b"<"):
        return f"is a web page and not the file that it is named after; {_AGAIN}"
    return None


def _tensors(path: Path) -> set[str] | str:
    """Names of the tensors in a safetensors file, from its header; or what is wrong with the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(512)
            problem = _foreign(start)
            length = int.from_bytes(start[:_LENGTH], "little")
            if problem is not None or len(start) < _LENGTH:
                return problem or f"is cut: it has {size} bytes; {_AGAIN}"
            file.seek(_LENGTH)
            header = file.read(min(length, size))
    except OSError as error:
        return f"can't be read: {error.strerror}"
    try:
        content: dict[str, Any] = json.loads(header)
        content.pop("__metadata__", None)
        wanted = _LENGTH + length + max((entry["data_offsets"][1] for entry in content.values()), default=0)
        small = sorted({entry["dtype"] for entry in content.values() if entry["dtype"].startswith(_SMALL)})
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"is no whole safetensors file; {_AGAIN}"
    if small:
        return f"holds quantized weights ({', '.join(small)}), which hfft doesn't read; take the original"
    if size != wanted:
        return f"is cut or damaged: it has {size:,} of {wanted:,} bytes; {_AGAIN}"
    return set(content)


def _shard_problem(folder: Path, *, is_whole: bool) -> str | None:
    """The first shard that is missing, broken, or lacks a tensor that the index says it has."""
    index = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(index, dict):
        return f"{folder / _INDEX} names no files (weight_map); {_AGAIN}"
    for name in sorted({str(value) for value in index.values()}):
        if not (folder / name).is_file():
            if is_whole:
                return f"{folder} lacks {name}, which {_INDEX} names; {_AGAIN}"
            continue
        found = _tensors(folder / name)
        if isinstance(found, str):
            return f"{folder / name} {found}"
        lacking = [tensor for tensor, place in index.items() if place == name and tensor not in found]
        if lacking:
            return f"{folder / name} lacks {len(lacking)} tensors that {_INDEX} names, such as {lacking[0]}; {_AGAIN}"
    return None
