"""Processes that are killed, hang, fail or are asked to stop: all end soon, one says why, and the run goes on."""

import os
import re
import subprocess
import time

import pytest
import tiny
from launches import ALONE, launch, run, succeed
from safetensors.torch import load_file

RECIPE = """
name: r
model: {checkpoint: vit}
data: {source: photos, augment: {flip: true}}
training: {optim: sgd, learning_rate: 0.05, dataloader_num_workers: 0, num_train_epochs: 4}
precision: float32
report: false
replay: {mode: "off"}
phases:
  - {name: head, unfreeze: head}
  - {name: all, unfreeze: all}
"""
TRAIN = ["-m", "hfft", "train", "r.yaml"]
FAULTY = """
import functools, os, signal, sys
from transformers import TrainerCallback
import hfft.commands.finetune as command
import hfft.system.liveness as liveness
from hfft.cli import main
from hfft.errors import TrainingError

liveness._BEAT = 0.4
fault, rank = sys.argv[1], os.environ.get("RANK", "0")

class Fault(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        step = int(os.environ.get("FAULTY_STEP", "5"))
        if args.output_dir.endswith("1-all") and state.global_step == step and rank == os.environ.get("FAULTY", rank):
            if fault == "raise":
                raise TrainingError("the disk of this process is gone")
            os.kill(os.getpid(), getattr(signal, fault))

command.finetune = functools.partial(command.finetune, callbacks=[Fault()])
sys.exit(main(["train", *sys.argv[2:]]))
"""
WORKER = """
import functools, os, signal, sys
from pathlib import Path
import torch
from transformers import TrainerCallback
import hfft.data.images.batches as batches
import hfft.commands.finetune as command
from hfft.cli import main

split, begins, *words = sys.argv[1:]
begun = Path("begun")

class Begin(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if f"{Path(args.output_dir).name} {state.global_step}" == begins:
            begun.touch()

    def on_train_end(self, args, state, control, **kwargs):
        if f"{Path(args.output_dir).name} end" == begins:
            begun.touch()

def decode_row(row, own=batches.decode_row):
    is_worker = torch.utils.data.get_worker_info() is not None
    if is_worker and row["file"].startswith(split) and (begun.exists() or begins == "at once"):
        os.kill(os.getpid(), signal.SIGKILL)  # as the system does where memory is short
    return own(row)

batches.decode_row = decode_row
command.finetune = functools.partial(command.finetune, callbacks=[Begin()])
sys.exit(main(["train", *words]))
"""


@pytest.fixture
def workplace(tmp_path, photos):
    photos({"train/ant": 12, "train/bee": 12, "validation/ant": 4, "validation/bee": 4})
    tiny.save(tmp_path / "vit", "vit")
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "faulty.py").write_text(FAULTY)
    (tmp_path / "worker.py").write_text(WORKER)
    return tmp_path


def our_errors(done):
    """What was said of the failure; a process that the launcher stopped first says that it was interrupted."""
    return re.findall("^(?:error: |interrupted).*$", done.stderr, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("fault", "faulty", "said"),
    [
        ("SIGKILL", "0", "another process of this launch has ended; "),
        ("SIGSTOP", "1", r"process 1 \(.* pid \d+\) has not answered for 3 s; the same command continues"),
        ("raise", "1", "the disk of this process is gone"),
    ],
)
def test_one_of_two_processes_fails(fault, faulty, said, workplace):
    begun = time.monotonic()
    done = run([*launch(), "faulty.py", fault, "r.yaml"], workplace, FAULTY=faulty)
    seconds = time.monotonic() - begun
    assert done.returncode == 1
    assert len(our_errors(done)) == 1, done.stderr
    assert re.search(f"^(error: |interrupted, or ).*{said}", our_errors(done)[0])
    assert (workplace / "runs/r/0-head/result.json").is_file()
    assert not (workplace / "runs/r/metrics.json").exists()
    assert seconds < 60
    again = succeed([*launch(), *TRAIN], workplace)
    assert "phase 1/2 head: was finished" in again.stderr
    assert "phase 2/2 all: continues from checkpoint-" in again.stderr


@pytest.mark.slow
@pytest.mark.multiprocess
def test_an_error_is_told_by_whoever_comes_to_it_first(workplace):
    """The launcher stops the others then, some of them before they come to it."""
    late = 'import os, sys, time\ntime.sleep(5 * (os.environ["RANK"] == "0"))\n'
    (workplace / "late.py").write_text(f"{late}from hfft.cli import main\nsys.exit(main())\n")
    done = run([*launch(), "late.py", "train", "none.yaml"], workplace)
    assert done.returncode == 1
    assert [line[:17] for line in our_errors(done)] == ["error: none.yaml:"], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "code", "step"), [("SIGTERM", 143, 5), ("SIGINT", 130, 6), ("SIGINT", 130, 12)])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_bit_equal(fault, code, step, workplace):
    """In the middle of an epoch, at the end of one, which is evaluated first, and after the last step."""
    succeed([*ALONE, *TRAIN, "output_dir=whole"], workplace)
    done = run([*ALONE, "faulty.py", fault, "r.yaml"], workplace, FAULTY_STEP=str(step))
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "stopping once this step is saved; again to stop at once" in done.stderr
    assert f"phase 2/2 all: stopped after step {step}, which is saved" in done.stderr
    assert done.stderr.splitlines()[-1] == "interrupted; a run continues with the same command, without --overwrite"
    again = succeed([*ALONE, *TRAIN], workplace)
    assert f"phase 2/2 all: continues from checkpoint-{step}" in again.stderr
    weights = [load_file(workplace / name / "r/model/model.safetensors") for name in ("whole", "runs")]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_that_are_asked_to_stop_save_the_same_step(workplace):
    """Only one of them gets the signal."""
    done = run([*launch(), "faulty.py", "SIGTERM", "r.yaml"], workplace, FAULTY="1")
    assert done.returncode == 1  # the launcher's
    assert done.stderr.count("phase 2/2 all: stopped after step 5, which is saved") == 1
    assert done.stderr.count("; a run continues with the same command") == 1
    again = succeed([*launch(), *TRAIN], workplace)
    assert "phase 2/2 all: continues from checkpoint-5" in again.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_ends_with_one_line_and_costs_no_checkpoint(workplace):
    disk = workplace / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=250k", "none", disk]
    mounted = subprocess.run(mount, capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"can't mount a small file system: {mounted.stderr.decode().strip()}")
    command = [*ALONE, *TRAIN, f"output_dir={disk}"]
    try:
        done = run(command, workplace)
        assert done.returncode == 1, done.stderr
        assert "Traceback" not in done.stderr
        assert len(our_errors(done)) == 1
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        succeed(command, workplace)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("split", "begins", "replay", "title"),
    [
        ("train", "1-all 5", "off", "phase 2/2 all"),
        ("validation", "1-all 5", "off", "phase 2/2 all"),
        ("train", "at once", "auto", "phase 1/2 head"),
        ("validation", "1-all end", "auto", "result"),
    ],
    ids=["training", "evaluation", "recording", "result"],
)
def test_a_worker_that_the_system_kills_ends_with_one_line(split, begins, replay, title, workplace):
    words = ["r.yaml", f"replay.mode={replay}", "training.dataloader_num_workers=2"]
    done = run([*ALONE, "worker.py", split, begins, *words], workplace)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    (error,) = our_errors(done)
    assert re.match(
        rf"error: {title}: DataLoader worker \(pid.*(signal: Killed|exited unexpectedly)\. A process", error
    )
    assert error.endswith(
        "A process that reads images died, most often for lack of memory or of shared memory; fewer "
        "dataloader_num_workers need less, and the same command continues from the last whole checkpoint"
    )
    again = succeed([*ALONE, "-m", "hfft", "train", *words], workplace)
    assert ("phase 1/2 head: was finished" in again.stderr) == (title != "phase 1/2 head")
    assert (workplace / "runs/r/metrics.json").is_file()
