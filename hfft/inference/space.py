"""`hfft demo --space`: a folder that runs as a Space of the Hugging Face Hub, and without it."""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import SpaceCard, SpaceCardData

from hfft.errors import ModelError
from hfft.inference.classifier import Classifier, model_source
from hfft.inference.extras import require
from hfft.inference.opening import holds_adapter, local_folder
from hfft.inference.places import check_folder, name_of
from hfft.inference.standalone import without_hfft
from hfft.inference.writing import WritingError
from hfft.model.checkpoint import save_model
from hfft.model.remote_code import code_of
from hfft.system.files import write_folder, write_text
from hfft.system.markdown import escape

_MODEL = "model"  # folder in the Space
_FILES = (
    *("app.py", "requirements.txt", "README.md", ".gitattributes", "__pycache__/app.*"),
    *(f"{_MODEL}/*.json", f"{_MODEL}/*.safetensors"),
)
_END = """

if __name__ == "__main__":
    run_space({source}, {title!r})
"""
_BESIDE = 'os.path.join(os.path.dirname(os.path.abspath(__file__)), "model")'
_PACKAGES = ("torch", "torchvision", "transformers", "numpy", "pillow", "simplejpeg")
_LARGE = "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
_CARD = """---
{metadata}
---

# {title}

Labels images: {classes}. Made with hfft.
"""


def write_space(source: str, folder: Path, *, overwrite: bool = False) -> None:
    """Write app.py, requirements.txt, README.md and the model, or for a model on the Hub its name.

    Args:
        source: Run folder, model folder, adapter folder or Hub id. An adapter is merged into what it sits on.
        folder: Written whole or not at all.
        overwrite: Whether an earlier Space is replaced.

    Raises:
        MissingPackageError: If gradio is missing.
        DataError: If the folder can't be written.
        ModelError: If there is no such model, or it brings Python code, which nothing in the Space would run.
        WritingError: If writing fails.
    """
    require("demo", "gradio")
    place = check_folder(folder, "--space", _FILES, overwrite=overwrite)
    code = code_of(local_folder(model_source(source)))
    if code is not None:
        raise ModelError(
            f"--space: the model brings Python code of its own ({code}.py), which a Space would not run; "
            "`hfft demo` without --space shows it here"
        )
    classifier = Classifier.from_pretrained(source, device="cpu")
    on_hub = not Path(source).is_dir() and not holds_adapter(source)
    title = name_of(source)

    def write(aside: Path) -> None:
        write_text(aside / "app.py", _program(repr(source) if on_hub else _BESIDE, title))
        write_text(aside / "requirements.txt", _requirements(classifier.model))
        write_text(aside / "README.md", _card(title, classifier.classes, source if on_hub else None))
        if not on_hub:
            write_text(aside / ".gitattributes", _LARGE)
            save_model(classifier.model, classifier.processor, aside / _MODEL)

    try:
        write_folder(place, write)
    except OSError as error:
        raise WritingError(f"--space {folder}: can't be written: {error.strerror or error}") from error


def _program(source: str, title: str) -> str:
    from hfft.inference import page  # and gradio

    return without_hfft(page) + _END.format(source=source, title=title)


def _requirements(model: Any) -> str:
    """Those versions and later ones of the same number; a Space gets gradio by `sdk_version`."""
    packages = (*_PACKAGES, "timm") if model.config.model_type == "timm_wrapper" else _PACKAGES
    return "".join(f"{name}>={found},<{int(found.split('.')[0]) + 1}\n" for name, found in _versions(packages))


def _versions(packages: tuple[str, ...]) -> list[tuple[str, str]]:
    return [(name, version(name).partition("+")[0]) for name in packages]


def _card(title: str, classes: tuple[str, ...], model: str | None) -> str:
    metadata = SpaceCardData(
        title=title,
        sdk="gradio",
        sdk_version=version("gradio"),
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file="app.py",
        models=None if model is None else [model],
        tags=["image-classification", "hfft"],
    )
    shown = [escape(name) for name in (classes if len(classes) <= 12 else classes[:11])]
    shown += [f"{len(classes) - 11} more"] if len(classes) > 12 else []
    return str(SpaceCard(_CARD.format(metadata=metadata.to_yaml(), title=escape(title), classes=", ".join(shown))))
