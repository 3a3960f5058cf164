"""What `model.checkpoint` names of what hfft wrote, and whether two checkpoints are the same files."""

from xxhash import xxh3_128

from hfft.paths import folder_at

_FILES = ("config.json", "*processor_config.json", "adapter_config.json", "*.safetensors", "*.index.json", "*.py")
_PIECE = 2**24  # bytes


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
