"""One process, or one launch of several, at work in a run folder at a time."""

import errno
import os
import socket
from contextlib import suppress
from pathlib import Path

from accelerate.logging import get_logger
from filelock import FileLock, Timeout

from hfft.errors import RunError
from hfft.system.distributed import on_main

_RETRIES = 1  # seconds: another process may just be removing the file

_LOG = get_logger(__name__)


class RunLock:
    """The right to write into a run folder: a lock on a file next to it, which ends with the process that holds it.

    The main process holds it for all of a launch. `with` gives it back.
    """

    def __init__(self, folder: Path) -> None:
        """Choose the folder, which need not be there."""
        self._folder = folder
        place = Path(os.path.realpath(folder))
        self._path = place.with_name(f".{place.name}.lock")
        self._lock = FileLock(self._path, timeout=_RETRIES, fallback_to_soft=False)

    def __enter__(self) -> "RunLock":
        """Take nothing yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let others in, and leave no file behind; filelock passes over a lock on one that is gone."""
        if self._lock.is_locked:
            with suppress(OSError):  # of a system that removes it after the release
                self._path.unlink()
            self._lock.release()

    def take_if_there(self) -> None:
        """As `take`, if there is such a folder: a bad request leaves nothing behind where there is none."""
        on_main(lambda: self._take() if self._folder.exists() else None)

    def take(self) -> None:
        """Take it for all processes of this launch, unless it has it; RunError if another launch has it."""
        on_main(self._take)

    def _take(self) -> None:
        if self._lock.is_locked:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            holder = ""
            with suppress(OSError):
                holder = self._path.read_text(encoding="utf-8")
            raise RunError(
                f"{self._folder}: another process is at work there{holder}; wait for its end, stop it, or give this "
                "run a name of its own (name=...)"
            ) from None
        except (OSError, NotImplementedError) as error:
            if getattr(error, "errno", None) in (errno.EACCES, errno.EROFS):
                return  # nobody can write there, which is said when the folder is looked at
            _LOG.warning(f"{self._folder}: start only one process there, as the file system keeps no locks: {error}")
            return
        with suppress(OSError):  # of a system that keeps others, and us, from a locked file
            self._path.write_text(f" (process {os.getpid()} on {socket.gethostname()})", encoding="utf-8")
