"""A process is missed when it is gone or stopped, and not when it is busy."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hfft.errors import TrainingError
from hfft.system import liveness


class Store(dict):
    """The store of a launch, in this process."""

    set = dict.__setitem__

    def has_extended_api(self):
        return True

    def multi_get(self, keys):
        return [self[key].encode() for key in keys]


@pytest.fixture
def other():
    """Another process of this machine."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def ends(monkeypatch):
    """What a watch ends this process with; the process lives on."""
    said = []
    monkeypatch.setattr(liveness._Watch, "_end", lambda self, *words: said.append(words))
    return said


def watch_of(pid, *, machine=None):
    """A watch in process 0 that has heard of process 1 once."""
    store = Store()
    watch = liveness._Watch(store, SimpleNamespace(process_index=0, num_processes=2))
    store["hfft/alive/1"] = json.dumps([[1, 0], "there", pid, machine or liveness._machine()])
    return watch, store


def listen(watch, beats):
    for _ in range(beats):
        watch.beat()
        watch._listen()


def test_a_process_that_is_busy_is_not_missed(other, ends):
    """As one whose threads stand still while other code holds Python's lock."""
    watch, store = watch_of(other.pid)
    first = store["hfft/alive/1"]
    listen(watch, 100)
    assert ends == []
    assert store["hfft/alive/1"] != first  # which other machines hear


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_is_stopped_or_gone_is_missed(number, other, ends):
    watch, _ = watch_of(other.pid)
    listen(watch, 3)
    os.kill(other.pid, number)
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
    listen(watch, 4)
    assert ends == []
    listen(watch, 1)
    assert ends == [(f"process 1 (there pid {other.pid})", 7)]


def test_of_another_machine_nobody_here_can_say_whether_it_exists(other, ends):
    watch, store = watch_of(other.pid, machine="elsewhere")
    listen(watch, 60)
    store["hfft/alive/1"] = json.dumps([[2, 0], "there", other.pid, "elsewhere"])  # what a third process says
    listen(watch, 70)
    assert ends == []
    listen(watch, 1)
    assert ends == [(f"process 1 (there pid {other.pid})", 70)]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("[gloo/unbound_buffer.cc:81] Timed out waiting 15000ms for recv operation", "waited longer .* all of them"),
        ("[gloo/pair.cc:547] Connection closed by peer [127.0.0.1]:2961", "another process of this launch has ended"),
    ],
)
def test_a_wait_that_was_too_long_is_no_end_of_a_process(told, said, monkeypatch):
    state = SimpleNamespace(process_index=0, num_processes=2, wait_for_everyone=lambda: None)
    monkeypatch.setattr(liveness, "connect", Store)
    with pytest.raises(TrainingError, match=said), liveness.watched(state):
        raise RuntimeError(told)
