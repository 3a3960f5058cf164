"""Launches from Python, and main processes that work longer than a collective operation waits."""

import json

import pytest
import tiny
from launches import ALONE, free_port, launch, run

RECIPE = """
name: r
model: {checkpoint: vit}
data: {source: photos, audit: quick}
training: {per_device_train_batch_size: 3, dataloader_num_workers: 0, num_train_epochs: 1, ddp_timeout: 2}
precision: float32
report: false
phases:
  - {name: head, unfreeze: head, learning_rate: 0.01}
"""
# The audit, a lock that another run holds, label issues, results: each of them longer than `ddp_timeout`.
SLOW = """
import sys, time
import hfft.data.audit.filtering, hfft.evaluators.label_issues, hfft.commands.results, hfft.replay.cache
from hfft.cli import main

def slow(module, name):
    own = getattr(module, name)
    def do(*words, **options):
        time.sleep(2.5 * (name not in slowed))
        slowed.append(name)
        return own(*words, **options)
    setattr(module, name, do)

slowed = []
slow(hfft.data.audit.filtering, "audit")
slow(hfft.replay.cache, "find_recording")
slow(hfft.evaluators.label_issues, "out_of_fold")
slow(hfft.commands.results, "write_results")
code = main(["train", "r.yaml"])
print("slowed", *sorted(set(slowed)), flush=True)
sys.exit(code)
"""


FROM_PYTHON = """
import sys
import accelerate
import hfft

def train():
    hfft.finetune(hfft.load_recipe("r.yaml"))

accelerate.PartialState()  # as what a notebook did before leaves it
if sys.argv[1] == "debug_launcher":
    accelerate.debug_launcher(train, num_processes=2)
else:
    accelerate.notebook_launcher(train, num_processes=2, use_port=sys.argv[2])
"""


@pytest.fixture
def workplace(tmp_path, photos):
    photos({"train/ant": 6, "train/bee": 6, "validation/ant": 2, "validation/bee": 2})
    tiny.save(tmp_path / "vit", "vit")
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "from_python.py").write_text(FROM_PYTHON)
    return tmp_path


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("launcher", ["debug_launcher", "notebook_launcher"])
def test_accelerates_launchers_for_python(launcher, workplace):
    done = run([*ALONE, "from_python.py", launcher, free_port()], workplace)
    assert done.returncode == 0, done.stderr
    assert json.loads((workplace / "runs/r/environment.json").read_text())["processes"] == 2
    assert (workplace / "runs/r/metrics.json").is_file()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_main_process_may_work_for_longer_than_a_collective_operation_waits(workplace):
    done = run([*launch(), "slow.py"], workplace)
    assert done.returncode == 0, done.stderr
    assert "slowed audit find_recording out_of_fold write_results" in done.stdout
    assert (workplace / "runs/r/metrics.json").is_file()
