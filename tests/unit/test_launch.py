"""Fewer processes than were asked for, or sharding that hfft can't do, is an error and no surprise."""

from types import SimpleNamespace

import pytest
import torch

from hfft import launch
from hfft.errors import RunError
from hfft.launch import check_launch


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in (*launch._COUNTS, "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)


def state(processes=1):
    return SimpleNamespace(num_processes=processes)


def under(monkeypatch, *command):
    parent = SimpleNamespace(cmdline=lambda: [str(word) for word in command])
    monkeypatch.setattr(launch.psutil, "Process", lambda: SimpleNamespace(parent=lambda: parent))


def test_nothing_was_asked_for():
    check_launch(state())


@pytest.mark.parametrize(
    ("variable", "who"), [("WORLD_SIZE", "the launcher"), ("SLURM_STEP_NUM_TASKS", "srun"), ("PMI_SIZE", "mpirun")]
)
def test_processes_that_would_each_train_alone(monkeypatch, variable, who):
    monkeypatch.setenv(variable, "4")
    with pytest.raises(RunError, match=f"{who} was asked for 4 processes and 1 of them would train alone"):
        check_launch(state())
    check_launch(state(4))


@pytest.mark.parametrize(
    "command",
    [
        ["python", "/usr/bin/accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "hfft", "train", "r.yaml"],
        ["python", "/usr/bin/accelerate-launch", "--num_processes=2", "--cpu", "train.py", "r.yaml"],
        ["python", "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "train.py"],
    ],
)
def test_accelerate_launch_that_started_one_process_only(monkeypatch, command):
    under(monkeypatch, *command)
    with pytest.raises(RunError, match=r"accelerate launch was asked for 2 processes .*/cpu2\.yaml"):
        check_launch(state())


def test_accelerate_launch_reads_its_config_file(monkeypatch, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 3\n")
    under(monkeypatch, "python", "-m", "accelerate.commands.launch", "--cpu", "--config_file", config, "train.py")
    with pytest.raises(RunError, match="asked for 3 processes"):
        check_launch(state())


@pytest.mark.parametrize(
    "command",
    [
        ["bash"],
        ["python", "launch", "accelerate"],
        ["python", "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "train.py"],
    ],
)
def test_launches_of_one_process(monkeypatch, command):
    under(monkeypatch, *command)
    check_launch(state())


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_sharding_is_refused(monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    with pytest.raises(RunError, match=f"{name} was asked for, and hfft doesn't train under it yet: use recipes"):
        check_launch(state(2))


def test_gpus_that_stay_unused_are_told_of(monkeypatch):
    lines = []
    monkeypatch.setattr(launch._LOG, "info", lines.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    check_launch(state())
    check_launch(state(4))
    (line,) = lines
    assert "4 GPUs are visible and one is used" in line
    assert "accelerate launch --multi_gpu --num_processes 4 -m hfft train" in line
