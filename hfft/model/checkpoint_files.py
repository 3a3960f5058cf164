"""The files of a checkpoint folder, looked at before any of them is loaded: whole, and what their names say."""

import json
from contextlib import suppress
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from hfft.errors import ModelError
from hfft.recipe.loading import RECIPE

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_JSON = ("config.json", "preprocessor_config.json", "processor_config.json", _INDEX)
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".pkl", ".onnx", ".gguf", ".safetensors")
_ADAPTER = "adapter_config.json"
_SMALL = ("I8", "U8", "F8", "F6", "F4")  # types of weights that don't say by themselves what they stand for
_MOST_READ = 2 * 2**30  # bytes of weights that are searched for NaN before they are loaded: some seconds
_AGAIN = "download or copy it again"


def check_files(checkpoint: str, revision: str | None = None) -> None:
    """Check the files of a checkpoint without reading weights; of a Hub id those that are in the cache.

    Raises:
        ModelError: If one is missing, damaged or something else; names it.
    """
    folder = Path(checkpoint)
    if folder.is_file():
        raise _problem(f"{checkpoint} is a file; name the folder that it is in: {folder.parent}")
    if not folder.is_dir():
        with suppress(HFValidationError):
            cached = try_to_load_from_cache(checkpoint, "config.json", revision=revision)
            if isinstance(cached, str):
                _check_folder(Path(cached).parent, may_lack_some=True)
        return
    if not (folder / "config.json").exists():
        inside = sorted(path.parent.name for name in (RECIPE, "config.json") for path in folder.glob(f"*/{name}"))
        if inside:
            raise _problem(f"{folder} is no model, and holds some; name one of them: {', '.join(inside[:5])}")
    _check_folder(folder, may_lack_some=False)


def _check_folder(folder: Path, *, may_lack_some: bool) -> None:
    for name in _JSON:
        if (folder / name).exists():
            _check_json(folder / name)
    weights = folder / _WEIGHTS
    if weights.is_symlink() and not weights.exists():
        raise _problem(f"{weights} is a link to a file that is gone; {_AGAIN}")
    if weights.is_file():
        _tensor_names(weights)
    elif (folder / _INDEX).is_file():
        _check_shards(folder, may_lack_some=may_lack_some)


def check_weights(checkpoint: str) -> None:
    """Check that a folder has weights that hfft reads, none of which is NaN; of many gigabytes, that isn't looked at.

    Raises:
        ModelError: If there are none, or others, or one is NaN.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return
    if not any((folder / name).exists() for name in (_WEIGHTS, _INDEX, _ADAPTER)):
        there = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in _OTHER_WEIGHTS)
        if not there:
            raise _problem(f"{folder} has no weights ({_WEIGHTS})")
        raise _problem(
            f"{folder} has its weights as {', '.join(there[:5])}, and hfft reads {_WEIGHTS} alone (a pickle can run "
            "code); where you trust them, open the folder with transformers and save_pretrained it"
        )
    paths = [folder / _WEIGHTS] if (folder / _WEIGHTS).is_file() else sorted(folder.glob("model-*.safetensors"))
    if sum(path.stat().st_size for path in paths) > _MOST_READ:
        return
    for path in paths:
        with safe_open(path, "pt") as file:
            tensors = ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118 (no dict)
            broken = [name for name, tensor in tensors if tensor.is_floating_point() and tensor.isnan().any()]
        if broken:
            names = ", ".join(broken[:5])
            raise _problem(f"{path} holds NaN in {len(broken)} weights ({names}); {_AGAIN}")


def _problem(text: str) -> ModelError:
    return ModelError(f"model.checkpoint: {text}")


def _read(path: Path, length: int = -1) -> bytes:
    """The first bytes of a file, or all; ModelError where something else stands in its place."""
    try:
        with path.open("rb") as file:
            data = file.read(length)
    except OSError as error:
        raise _problem(f"{path} can't be read: {error.strerror}") from error
    if not data.strip(b"\0 \r\n\t"):
        raise _problem(f"{path} is empty; {_AGAIN}")
    if data.startswith(b"version https://git-lfs"):
        raise _problem(f"{path} is a Git LFS pointer and not the file itself; `git lfs pull` fetches that")
    if data.lstrip().startswith(b"<"):
        raise _problem(f"{path} is a web page and not the file that it is named after; {_AGAIN}")
    return data


def _check_json(path: Path) -> None:
    try:
        content = json.loads(_read(path).decode("utf-8"))
    except ValueError as error:
        raise _problem(f"{path} is no JSON ({error}): it was cut or damaged; {_AGAIN}") from error
    if not isinstance(content, dict) or not content:
        raise _problem(f"{path} holds {str(content)[:20]!r}, and no settings; {_AGAIN}")


def _tensor_names(path: Path) -> set[str]:
    """Names of the tensors in a safetensors file, of which the header alone is read; ModelError if it is damaged."""
    _read(path, 512)
    try:
        with safe_open(path, "np") as file:
            types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no dict)
    except SafetensorError as error:
        raise _problem(f"{path} is cut or damaged ({error}); {_AGAIN}") from error
    small = sorted({kind for kind in types.values() if kind.startswith(_SMALL)})
    if small:
        raise _problem(
            f"{path} holds quantized weights ({', '.join(small)}), which hfft doesn't read; take the original"
        )
    return set(types)


def _check_shards(folder: Path, *, may_lack_some: bool) -> None:
    """Look for the first shard that is missing, broken, or lacks a tensor that the index says it has."""
    index = json.loads(_read(folder / _INDEX)).get("weight_map")
    if not isinstance(index, dict):
        raise _problem(f"{folder / _INDEX} names no files (weight_map); {_AGAIN}")
    for name in sorted({str(value) for value in index.values()}):
        if not (folder / name).is_file():
            if not may_lack_some:
                raise _problem(f"{folder} lacks {name}, which {_INDEX} names; {_AGAIN}")
            continue
        found = _tensor_names(folder / name)
        lacking = [tensor for tensor, place in index.items() if place == name and tensor not in found]
        if lacking:
            raise _problem(
                f"{folder / name} lacks {len(lacking)} tensors that {_INDEX} names, such as {lacking[0]}; {_AGAIN}"
            )
