"""What a forked process has of its own, so that tests may use it in the place of a fresh one."""

import json
import os
import signal
import subprocess
import sys

import pytest
import warm

STATE = """
import json, os, random, sys
print(json.dumps([os.getcwd(), os.environ["MARK"], sys.argv, sys.path, __name__, os.getppid(), sys.stdin.read()]))
print("said", file=sys.stderr)
sys.exit(7)
"""
SLEEP = [sys.executable, "-c", "import time\nprint('up', flush=True)\ntime.sleep(60)"]


@pytest.fixture(params=["code", "file", "module"])
def program(request, tmp_path):
    (tmp_path / "state.py").write_text(STATE)
    return {"code": ["-c", STATE, "a", "b"], "file": ["state.py", "a"], "module": ["-m", "state", "a"]}[request.param]


def test_a_fork_says_of_itself_what_a_fresh_process_says(program, tmp_path):
    told = []
    for start in (subprocess.Popen, warm.Popen):
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        environment = {**os.environ, "MARK": "mine"}
        with start([sys.executable, *program], cwd=tmp_path, env=environment, text=True, **pipes) as process:
            output, errors = process.communicate("typed")
        told.append((json.loads(output), errors, process.returncode))
    assert told[1] == told[0]
    assert told[1][0][-2:] == [os.getpid(), "typed"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_fork_as_it_ends_a_fresh_process(number):
    codes = []
    for start in (subprocess.Popen, warm.Popen):
        with start(SLEEP, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True) as process:
            assert process.stdout.readline() == b"up\n"
            assert process.poll() is None
            os.killpg(process.pid, number)
            codes.append(process.wait(20))
    assert codes == [-number, -number]


def test_an_import_is_there_before_it_is_asked_for():
    asked = [
        sys.executable,
        "-c",
        "import sys; print('torch' in sys.modules, 'hfft.commands.finetune' in sys.modules)",
    ]
    assert warm.run(asked).stdout == "True True\n"


def test_what_is_read_at_an_import_is_never_ignored(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    asked = [sys.executable, "-c", "from huggingface_hub.constants import ENDPOINT; print(ENDPOINT)"]
    assert warm.run(asked).stdout == "http://127.0.0.1:9\n"


def test_a_failure_is_shown(tmp_path):
    done = warm.run([sys.executable, "-c", "raise ValueError('so')"])
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: so\n")


def test_a_home_of_its_own_costs_the_imports_of_the_hub_alone(tmp_path):
    """Elsewhere lies a module, and what is read at the import of huggingface_hub."""
    (tmp_path / "beside.py").write_text("THERE = True")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    asked = "import sys; print('torch' in sys.modules, 'huggingface_hub' in sys.modules); import beside; "
    asked += "from huggingface_hub.constants import HF_HOME; print(HF_HOME)"
    assert warm.run([sys.executable, "-c", asked], env=environment).stdout == f"True False\n{tmp_path}\n"


def test_what_a_fork_starts_is_a_fork_of_it():
    asked = "import sys; print('torch' in sys.modules); sys.exit(int(sys.argv[1]))"
    start = "import os, subprocess, sys\nfor variable in ({}, {'OMP_NUM_THREADS': '3'}):\n"
    start += "    words = [sys.executable, '-u', '-c', sys.argv[1], '7']\n"
    start += "    print(subprocess.run(words, env={**os.environ, **variable}).returncode, flush=True)"
    assert warm.run([sys.executable, "-c", start, asked]).stdout.split() == ["True", "7", "False", "7"]


def test_another_number_of_threads_makes_a_fresh_process():
    asked = [sys.executable, "-c", "import sys; print('torch' in sys.modules)"]
    assert warm.run(asked, env={**os.environ, "OMP_NUM_THREADS": "3"}).stdout == "False\n"
