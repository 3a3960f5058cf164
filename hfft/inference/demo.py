"""`hfft demo`: a page on this machine that labels the images dropped on it."""

import os
import socket
import tempfile
import threading
from collections.abc import Callable

from hfft.errors import HfftError, first_line
from hfft.inference.classifier import Classifier
from hfft.inference.extras import require
from hfft.inference.places import name_of

LOCAL = "127.0.0.1"
_LAST_PORT = 65535


class DemoError(HfftError):
    """A page that can't be served."""

    exit_code = 1


def serve_demo(
    source: str,
    *,
    host: str = LOCAL,
    port: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    subfolder: str | None = None,
    tell: Callable[[str], None],
) -> None:
    """Serve the page until Ctrl-C. It works without a network, and what was dropped on it is removed at the end.

    Args:
        source: Run folder, model folder, adapter folder or Hub id.
        host: Address to listen on; others than the default let other machines in.
        port: The first free one from 7860 on when None.
        device: Where to compute; on the accelerator, if there is one, when None.
        trust_remote_code: As for `Classifier.from_pretrained`.
        subfolder: As for `Classifier.from_pretrained`.
        tell: Is called with the page's address once it is there.

    Raises:
        MissingPackageError: If gradio is missing.
        ModelError: If there is no such model or device.
        DemoError: If the address or the port can't be had.
    """
    require("demo", "gradio")
    _check_address(host, port)
    classifier = Classifier.from_pretrained(
        source, device=device, trust_remote_code=trust_remote_code, subfolder=subfolder
    )
    with tempfile.TemporaryDirectory(prefix="hfft-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when gradio is imported
        _bypass_proxy(host)
        from hfft.inference import page

        label = page.make_labeler(classifier.model, classifier.processor)
        try:
            address = page.launch(
                page.make_page(label, name_of(source)),
                server_name=host,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise DemoError(_trouble(host, port, error)) from error
        tell(address)
        threading.Event().wait()


def _bypass_proxy(host: str) -> None:
    """Gradio asks its own server whether it is there, and a proxy would not know it."""
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), LOCAL, "localhost", host)))


def _check_address(host: str, port: int | None) -> None:
    """Find out before any work whether the page can be there; gradio would try a thousand ports of a wrong host."""
    if port is not None and port > _LAST_PORT:  # which the system would take modulo 65536
        raise DemoError(_trouble(host, port, ValueError(f"the last port is {_LAST_PORT}")))
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a page that ended a moment ago doesn't count
            trial.bind(place)
    except OSError as error:
        raise DemoError(_trouble(host, port, error)) from error


def _trouble(host: str, port: int | None, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or first_line(error)
    where = host if port is None else f"{host}, port {port}"
    return f"the page can't be served at {where}: {reason}; --host and --port choose another place"
