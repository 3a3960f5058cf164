"""One process at work in a run folder; the lock ends with its process, even where its children live on."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import warm

from hfft.commands.cross_validate import cross_validate
from hfft.commands.finetune import finetune
from hfft.errors import RunError
from hfft.recipe.loading import load_recipe
from hfft.system.locking import RunLock

HOLDER = """
import os, sys, time
from pathlib import Path
from hfft.system.locking import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take()
if os.fork() == 0:  # as a process that reads images
    time.sleep(60)
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of `runs/r`, with a child of its own."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "runs/r")]
    process = warm.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    assert int(process.stdout.readline()) == process.pid
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("spelling", ["runs/r", "runs/./r", "link/r"])
def test_a_second_process_is_refused_until_the_first_one_dies(holder, spelling, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("runs")
    (tmp_path / "runs/r").mkdir()
    with RunLock(Path(spelling)) as lock:
        for take in (lock.take, lock.take_if_there):
            with pytest.raises(RunError, match=rf"there \(process {holder.pid}"):
                take()
        os.kill(holder.pid, signal.SIGKILL)  # its child lives
        holder.wait()
        lock.take()
        lock.take()


def test_runs_and_cross_validations_ask_for_it(tmp_path):
    content = {
        "name": "r",
        "model": {"checkpoint": "none/here"},
        "data": {"source": "none"},
        "phases": [{"name": "h"}],
    }
    recipe = load_recipe({**content, "output_dir": str(tmp_path)})
    with RunLock(tmp_path / "r") as lock:
        lock.take()
        (tmp_path / "r").mkdir()
        for overwrite in (False, True):
            with pytest.raises(RunError, match="at work there"):
                finetune(recipe, overwrite=overwrite)
            with pytest.raises(RunError, match="at work there"):
                cross_validate(dataclasses.replace(recipe, folds=2), overwrite=overwrite)


def test_nothing_is_made_for_a_folder_that_is_not_there(tmp_path):
    with RunLock(tmp_path / "runs/r") as lock:
        lock.take_if_there()
        assert list(tmp_path.iterdir()) == []


def test_two_runs_of_one_process_are_kept_apart_too(tmp_path):
    with RunLock(tmp_path / "r") as lock, RunLock(tmp_path / "r") as other, RunLock(tmp_path / "s") as another:
        lock.take()
        another.take()
        with pytest.raises(RunError, match="at work there"):
            other.take()
    with RunLock(tmp_path / "r") as lock:
        lock.take()


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("hfft.system.locking._LOG.warning", lines.append)
    with RunLock(tmp_path / "r") as lock:
        monkeypatch.setattr(lock._lock, "acquire", lambda: (_ for _ in ()).throw(OSError(38, "not implemented")))
        lock.take()
    assert len(lines) == 1
    assert "start only one process there" in lines[0]
