"""A headless Chromium, and servers in processes of their own."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_SECONDS = 120  # that a server may take to start


@contextmanager
def chromium() -> Iterator[Any]:
    """A new page of a browser; skips the test where there is no browser."""
    with sync_playwright() as engines:
        path = next(filter(None, map(shutil.which, _NAMES)), engines.chromium.executable_path)
        if not Path(path).is_file():
            pytest.skip(f"no Chromium: none of {', '.join(_NAMES)} is installed, nor playwright's own")
        browser = engines.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            yield browser.new_page()
        finally:
            browser.close()


@contextmanager
def served(command: Sequence[str], address: str, **changes: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start a server; gives the line in which it tells its address, and the process, which is ended."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **changes},
    )
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_pass_on, args=(process, lines), daemon=True).start()
    seen = []
    try:
        while address not in (line := lines.get(timeout=_SECONDS) or "the end"):
            seen.append(line)
            assert line != "the end", "".join(seen)
        yield line, process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _pass_on(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)
