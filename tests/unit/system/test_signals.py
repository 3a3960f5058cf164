import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from hfft.system import signals
from hfft.system.signals import apart, patient, prompt_interruption, stop_signal

HALF_MADE = """
import gc, os, signal, time
from hfft.system.signals import prompt_interruption

class HalfMade:
    def __init__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        self.made = True

    def __del__(self):
        self.made

try:
    with prompt_interruption():
        HalfMade()
except KeyboardInterrupt:
    print("interrupted")
gc.collect()
"""

LAST_WORDS = """
import os, signal, sys
from hfft import cli

say = cli.print_error
def interrupted(line):
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    say(line)
cli.print_error = interrupted
sys.exit(cli.main(["report", "nowhere"]))
"""


def test_a_process_that_is_stopped_while_it_tells_of_its_error_tells_it_still():
    """A launcher stops the others within milliseconds of the first that fails."""
    done = subprocess.run([sys.executable, "-c", LAST_WORDS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: nowhere is no run folder: it has no recipe.yaml\n")


POOL = """
import atexit, threading, time
from concurrent.futures import ThreadPoolExecutor
from hfft.system.signals import end_process

atexit.register(print, "tidied up")
pool = ThreadPoolExecutor()
pool.submit(time.sleep, 60)
print("working")
end_process(3)
"""


def test_a_process_ends_although_a_thread_of_a_pool_works():
    command = [sys.executable, "-c", POOL]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=12)
    assert (done.returncode, done.stdout) == (3, "working\ntidied up\n")


LAUNCHED = """
import sys
from hfft import cli

class Late:
    def __del__(self):
        print("torn down")

late = Late()
sys.argv = ["hfft", "report", "nowhere"]
sys.exit(cli.main())
"""


@pytest.mark.parametrize(("rank", "said"), [({"RANK": "0"}, ""), ({}, "torn down\n")])
def test_a_process_of_a_launch_ends_before_the_interpreter_is_torn_down(rank, said):
    """With threads of gloo, one was seen to abort there, after all was done."""
    environment = {**os.environ, **rank}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHED], capture_output=True, text=True, check=False, env=environment
    )
    assert (done.returncode, done.stdout) == (2, said)


def test_what_is_done_apart_is_interrupted_at_once():
    left = threading.Event()

    def work():
        with prompt_interruption():
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            apart(lambda: left.wait(60))

    with pytest.raises(KeyboardInterrupt):
        work()
    assert not left.is_set()
    left.set()


def test_results_and_errors_of_what_is_done_apart_arrive():
    assert apart(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        apart(lambda: 1 // 0)


def test_an_interruption_arrives_although_a_finalizer_swallowed_it():
    class Swallows:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)  # the exception is raised, and dropped, here

    def work():
        with prompt_interruption():
            Swallows()
            gc.collect()
            time.sleep(5)

    before = signal.getsignal(signal.SIGINT), sys.unraisablehook
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        sys.unraisablehook = before[1]
    assert signal.getsignal(signal.SIGINT) is before[0]
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_an_interruption_arrives_although_most_of_the_time_goes_to_finalizers():
    """As with data loaders, which wait for their workers to end there."""
    finalized = 0

    class Waits:
        def __del__(self):
            nonlocal finalized
            finalized += 1
            if finalized == 1:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1.1)

    def work():
        with prompt_interruption():
            for _ in range(20):
                Waits()
                time.sleep(0.01)

    before = sys.unraisablehook
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
    finally:
        sys.unraisablehook = before
    assert finalized == 1


def test_what_was_half_made_is_not_complained_about():
    done = subprocess.run([sys.executable, "-c", HALF_MADE], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("interrupted\n", "")


def test_without_an_interruption_everything_is_as_before():
    before = signal.getsignal(signal.SIGINT), sys.unraisablehook
    with prompt_interruption():
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert (signal.getsignal(signal.SIGINT), sys.unraisablehook) == before


def interrupt(number=signal.SIGINT):
    os.kill(os.getpid(), number)
    time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_either_signal_interrupts_and_is_remembered(number):
    def work():
        with prompt_interruption():
            interrupt(number)
            time.sleep(5)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert stop_signal() == number


def test_the_first_signal_waits_for_patient_work_to_save(capfd):
    done = []

    def work():
        with prompt_interruption(), patient():
            interrupt()
            done.append("step")
            interrupt(signal.SIGTERM)  # a launcher passes the terminal's Ctrl-C on, soon
            done.append("saved")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["step", "saved"]
    assert stop_signal() == signal.SIGINT
    assert capfd.readouterr().err == "stopping once this step is saved; again to stop at once\n"


def test_a_second_signal_does_not_wait(monkeypatch):
    done = []

    def work():
        with prompt_interruption(), patient():
            interrupt()
            done.append("step")
            monkeypatch.setattr(signals, "_ECHO", 0.0)
            interrupt()
            done.append("saved")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["step"]


def test_patience_without_a_signal_changes_nothing():
    with prompt_interruption():
        with patient():
            pass
        assert stop_signal() is None


def test_a_forked_worker_ends_by_sigterm_and_not_by_ctrl_c():
    def child():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    with prompt_interruption():
        worker = multiprocessing.get_context("fork").Process(target=child)
        worker.start()
        worker.join(5)
    assert worker.exitcode == -signal.SIGTERM
    assert stop_signal() is None
