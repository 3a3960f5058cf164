"""Python processes without the seconds of imports: forked from one that has imported everything.

`Popen` is `subprocess.Popen` whose process is forked where nothing speaks against it, and fresh elsewhere: with its
own id, signals, exit code, environment, folder, files, and end of an interpreter. Imports are what it doesn't prove.
Python processes that a fork starts, such as those of a launcher, are forks of it.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import gc
import io
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import termios
import types
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

# Beginnings of variables that are read when a library is imported, so that a fork couldn't obey a change of them.
_AT_IMPORT = ("HF_", "HOME", "HUGGING", "LANG", "LC_", "LD_", "MKL_", "MPL", "OMP_", "PYTHON", "TRANSFORMERS")
_OF_THE_HUB = ("HF_", "HUGGING", "PYTHONPATH", "TRANSFORMERS")  # those that no import of the second list reads
_ALL = (
    *(
        "hfft.cli",
        "hfft.commands.compare",
        "hfft.commands.cross_validate",
        "hfft.commands.evaluate",
        "hfft.hub.pushing",
        "hfft.inference.classifier",
    ),
    *(
        "hfft.report.card",
        "hfft.report.page",
        "hfft.commands.finetune",
        "hfft.commands.sweep",
    ),
    *("accelerate.commands.launch", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg"),
    *("peft", "pyarrow.parquet", "torch.distributed.run", "torchvision.transforms.v2"),
)
_WITHOUT_HUB = (
    *("matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "pandas", "pyarrow.parquet", "sympy"),
    *("scipy.optimize", "torch._dynamo.aot_compile", "torch.distributed.tensor", "torchvision.transforms.v2"),
)
_LAUNCHER = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux's prctl


class Popen(subprocess.Popen):
    """A process of `[sys.executable, "-m", MODULE, ...]`, of a file, or of `-c` and code."""

    def _execute_child(self, args: Any, *more: Any) -> None:
        request = _request(args, *more)
        imports = None if request is None else self._importable(request["environment"])
        if request is None or imports is None:
            super()._execute_child(args, *more)
            return
        files = more[9:15]
        theirs = (files[0], files[3], files[5])
        given = [number if file == -1 else file for number, file in enumerate(theirs)]
        self.pid = self._fork(imports, request, given)
        self._child_created = True
        self._close_pipe_fds(*files)

    @staticmethod
    def _importable(environment: Mapping[str, str]) -> tuple[str, ...] | None:
        """What may have been imported before this environment was known."""
        changed = dict(_at_import(environment).items() ^ _AT_START.items())
        if not changed:
            return _ALL
        return _WITHOUT_HUB if all(name.startswith(_OF_THE_HUB) for name in changed) else None

    @staticmethod
    def _fork(imports: tuple[str, ...], request: dict[str, Any], files: Sequence[int]) -> int:
        return _server(imports).fork(request, files)


class _OfAFork(Popen):
    """A process that a fork starts."""

    @staticmethod
    def _importable(environment: Mapping[str, str]) -> tuple[str, ...] | None:
        return () if _at_import(environment) == _at_import(os.environ) else None

    @staticmethod
    def _fork(imports: tuple[str, ...], request: dict[str, Any], files: Sequence[int]) -> int:
        child = os.fork()
        if child == 0:
            _become({**request, "files": files})
            _execute_and_exit(request["words"])
        return child


def _request(args: Any, *more: Any) -> dict[str, Any] | None:
    """What a fork is told, of the arguments of `subprocess.Popen._execute_child`; None if it could not obey."""
    executable, preexec_fn, _, pass_fds, cwd, env, _, _, shell = more[:9]
    words = [] if shell or isinstance(args, str | bytes) else [os.fspath(word) for word in args]
    is_plain = sys.platform == "linux" and words[:1] == [sys.executable] and len(words) > 1
    if executable or preexec_fn or pass_fds or not is_plain:
        return None
    return {
        "words": words[1:],
        "folder": os.fspath(cwd or os.getcwd()),
        "environment": dict(os.environ if env is None else env),
        "new_session": bool(more[20]),
    }


def run(command: Sequence[Any], **options: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with text in its pipes, as a fork if that is the same."""
    with Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def _at_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_AT_IMPORT)}


_AT_START = _at_import(os.environ)


@functools.cache
def _server(imports: Sequence[str]) -> _Server:
    return _Server(imports)


class _Server:
    """The process that has imported, seen from outside."""

    def __init__(self, imports: Sequence[str]) -> None:
        self._socket, theirs = socket.socketpair()
        others = {name: value for name, value in os.environ.items() if not name.startswith(_AT_IMPORT)}
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno()), *imports]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env={**others, **_AT_START})

    def fork(self, request: Mapping[str, Any], files: Sequence[int]) -> int:
        """Start a process; its id. It becomes a child of this process, as its parent ends at once."""
        content = json.dumps(request).encode()
        with _adopting():
            socket.send_fds(self._socket, [len(content).to_bytes(8, "big")], files)
            self._socket.sendall(content)
            answer = _read(self._socket, 8)
        return int.from_bytes(answer, "big")


@contextmanager
def _adopting() -> Any:
    """Children of children that end become children of this process."""
    libc = ctypes.CDLL(None)
    libc.prctl(_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        libc.prctl(_SUBREAPER, 0, 0, 0, 0)


def _read(stream: socket.socket, length: int) -> bytes:
    content = b""
    while len(content) < length:
        piece = stream.recv(length - len(content))
        if not piece:
            raise EOFError("the process that has imported everything is gone")
        content += piece
    return content


def _serve(stream: socket.socket) -> dict[str, Any]:
    """Fork for each request; returns in a fork alone, with what it shall do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the tests, whose end is this process's end
    while True:
        begin, files, _, _ = socket.recv_fds(stream, 8, 3)
        if not begin:
            os._exit(0)
        request = json.loads(_read(stream, int.from_bytes(begin, "big")))
        told, adopted = os.pipe(), os.pipe()
        parent = os.fork()
        if parent == 0:
            child = os.fork()
            if child == 0:
                os.close(adopted[1])
                os.read(adopted[0], 1)  # until it has its new parent
                stream.detach()
                return {**request, "files": files}
            os.write(told[1], child.to_bytes(8, "big"))
            os._exit(0)
        os.waitpid(parent, 0)
        answer = os.read(told[0], 8)
        for file in (*told, *adopted, *files):
            os.close(file)
        stream.sendall(answer)


def _become(request: Mapping[str, Any]) -> None:
    """What a new interpreter has of its own."""
    _take_files(request["files"])
    if request["new_session"]:
        os.setsid()
        if os.isatty(0):
            with suppress(PermissionError):  # a worker of a launch, whose terminal is the launcher's
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.chdir(request["folder"])
    own, new = (where.get("PYTHONPATH", "") for where in (os.environ, request["environment"]))
    if own != new:
        rest = [path for path in sys.path[1:] if path not in own.split(os.pathsep)]
        sys.path[1:] = [*filter(None, new.split(os.pathsep)), *rest]
    os.environ.clear()
    os.environ.update(request["environment"])
    for ending in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(ending, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        setattr(sys, name, _stream(number, at_once=request["words"][0] == "-u"))
    random.seed()
    sys.modules["numpy"].random.seed()
    subprocess.Popen = _OfAFork
    if "hfft.cli" in sys.modules:
        sys.modules["hfft.system.distributed"]._imported_by = os.getpid()  # it tells forks of a notebook by it
        sys.modules[_LAUNCHER].Popen = _OfAFork


def _take_files(files: Sequence[int]) -> None:
    for number, file in enumerate(files):
        os.dup2(file, number)
    for file in map(int, os.listdir("/proc/self/fd")):
        if file > 2:
            with suppress(OSError):  # the listing's own
                os.close(file)


def _stream(number: int, *, at_once: bool) -> io.TextIOWrapper:
    mode = "w" if number else "r"
    if number and at_once:
        return io.TextIOWrapper(io.FileIO(number, mode, closefd=False), write_through=True)
    return open(number, mode, buffering=1 if os.isatty(number) or number == 2 else -1, closefd=False)


def _execute(words: Sequence[str]) -> None:
    words = words[1:] if words[0] == "-u" else words
    first = words[0]
    if first == "-m":
        sys.argv = list(words[1:])
        sys.path[0] = os.getcwd()
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path[0] = ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = list(words)
        sys.path[0] = os.path.dirname(os.path.abspath(first))
        runpy.run_path(first, run_name="__main__")


def _execute_and_exit(words: Sequence[str]) -> None:
    """With the end of an interpreter, and never back into the code that forked."""
    code: Any = 0
    try:
        _execute(words)
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)  # noqa: T201
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    ctypes.pythonapi.Py_Exit(code)


def _import(names: Sequence[str]) -> None:
    for name in names:
        import_module(name)
    sys.modules.pop("accelerate.commands.launch", None)  # which runs as __main__
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    _import(sys.argv[2:])
    wanted = _serve(socket.socket(fileno=int(sys.argv[1])))
    _become(wanted)
    _execute(wanted["words"])
