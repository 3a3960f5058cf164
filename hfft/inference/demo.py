"""`hfft demo`: a page on this machine that labels the images dropped on it, or a Space that shows the same page."""

import os
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import SpaceCard, SpaceCardData
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from hfft.errors import HfftError, ModelError, first_line
from hfft.inference.classifier import Classifier
from hfft.inference.opening import local_folder, model_source, source_name
from hfft.inference.outputs import check_output_folder, source_without_hfft, write_output_folder
from hfft.model.checkpoint import save_model
from hfft.model.remote_code import code_of
from hfft.system.files import write_text
from hfft.system.lazy_imports import require
from hfft.system.markdown import escape

_LOCALHOST = "127.0.0.1"
_MODEL = "model"  # folder in the Space
_SPACE_FILES = (
    *("app.py", "requirements.txt", "README.md", ".gitattributes", "__pycache__/app.*"),
    *(f"{_MODEL}/*.json", f"{_MODEL}/*.safetensors"),
)
_MODEL_NEXT_TO_APP = f'os.path.join(os.path.dirname(os.path.abspath(__file__)), "{_MODEL}")'
_PACKAGES = ("torch", "torchvision", "transformers", "numpy", "pillow", "simplejpeg")
_CARD = """---
{metadata}
---

# {title}

Labels images: {classes}. Made with hfft.
"""


class DemoError(HfftError):
    """A page that can't be served."""

    exit_code = 1


def serve_demo(
    source: str,
    *,
    host: str = _LOCALHOST,
    port: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    subfolder: str | None = None,
    on_start: Callable[[str], None],
) -> None:
    """Serve the page until Ctrl-C, without a network; uploaded images are removed at the end.

    The model is opened as by `Classifier.from_pretrained`. Another host than the default lets other machines in; the
    port is the first free one from 7860 on when None. `on_start` gets the page's address.

    Raises:
        MissingPackageError: If gradio is missing.
        ModelError: If there is no such model or device.
        DemoError: If the address or the port can't be used.
    """
    require("demo", "gradio")
    _check_address(host, port)
    classifier = Classifier.from_pretrained(
        source, device=device, trust_remote_code=trust_remote_code, subfolder=subfolder
    )
    with tempfile.TemporaryDirectory(prefix="hfft-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when gradio is imported
        for name in ("NO_PROXY", "no_proxy"):  # gradio asks its own server, which a proxy would not know
            os.environ[name] = ",".join(filter(None, (os.environ.get(name), _LOCALHOST, "localhost", host)))
        from hfft.inference import demo_page

        label = demo_page.make_labeler(classifier.model, classifier.processor)
        page = demo_page.build_page(label, source_name(source))
        try:
            address = demo_page.launch(page, server_name=host, server_port=port, prevent_thread_lock=True, quiet=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise _address_error(host, port, error) from error
        on_start(address)
        threading.Event().wait()


def _check_address(host: str, port: int | None) -> None:
    """Fail before the model is loaded; gradio would try a thousand ports of a wrong host."""
    if port is not None and port > 65535:  # which the system would take modulo 65536
        raise _address_error(host, port, ValueError("the last port is 65535"))
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a page that ended a moment ago doesn't count
            trial.bind(address)
    except OSError as error:
        raise _address_error(host, port, error) from error


def _address_error(host: str, port: int | None, error: Exception) -> DemoError:
    reason = getattr(error, "strerror", None) or first_line(error)
    where = host if port is None else f"{host}, port {port}"
    return DemoError(f"the page can't be served at {where}: {reason}; choose another with --host and --port")


def write_space(source: str, folder: Path, *, overwrite: bool = False) -> None:
    """Write a Space: app.py, requirements.txt, README.md, and the model, or of a model on the Hub its name.

    The folder is written whole or not at all; an adapter is merged into its base model.

    Raises:
        MissingPackageError: If gradio is missing.
        DataError: If the folder can't be written.
        ModelError: If there is no such model, or it brings Python code, which the Space would not run.
        WritingError: If writing fails.
    """
    require("demo", "gradio")
    folder = check_output_folder(folder, "--space", _SPACE_FILES, overwrite=overwrite)
    model_folder = local_folder(model_source(source))
    code = code_of(model_folder)
    if code is not None:
        raise ModelError(f"--space: a Space would not run the model's own Python code ({code}.py); leave --space out")
    classifier = Classifier.from_pretrained(source, device="cpu")
    on_hub = not Path(source).is_dir() and not (model_folder / ADAPTER_CONFIG_NAME).is_file()
    title = source_name(source)

    def write(aside: Path) -> None:
        write_text(aside / "app.py", _program(repr(source) if on_hub else _MODEL_NEXT_TO_APP, title))
        write_text(aside / "requirements.txt", _requirements(classifier.model.config.model_type))
        write_text(aside / "README.md", _card(title, classifier.classes, source if on_hub else None))
        if not on_hub:
            write_text(aside / ".gitattributes", "*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
            save_model(classifier.model, classifier.processor, aside / _MODEL)

    write_output_folder(folder, "--space", write)


def _program(source: str, title: str) -> str:
    from hfft.inference import demo_page  # and gradio

    start = f'if __name__ == "__main__":\n    run_space({source}, {title!r})\n'
    return f"{source_without_hfft(demo_page)}\n\n{start}"


def _requirements(model_type: str) -> str:
    """The installed versions and later ones of the same number; a Space gets gradio by `sdk_version`."""
    packages = (*_PACKAGES, "timm") if model_type == "timm_wrapper" else _PACKAGES
    found = {name: version(name).partition("+")[0] for name in packages}
    return "".join(f"{name}>={number},<{int(number.split('.')[0]) + 1}\n" for name, number in found.items())


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
