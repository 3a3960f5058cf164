"""Fewer processes than were asked for, or what hfft can't do or the recipe decides, is an error and no surprise."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType

from hfft.errors import RunError
from hfft.system import launch
from hfft.system.launch import check_launch, check_launch_options


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    asked = (*launch._ALWAYS, *launch._FSDP_ASKED)
    switches = ("ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    for name in (*launch._COUNTS, *asked, *switches):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("FSDP_CPU_RAM_EFFICIENT_LOADING", raising=False)


def state(processes=1, kind=DistributedType.MULTI_GPU):
    return SimpleNamespace(num_processes=processes, distributed_type=kind)


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
    with pytest.raises(RunError, match="4 processes and 1"):
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


def test_deepspeed_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RunError, match=r"FSDP 2 .*recipes/accelerate/fsdp2\.yaml"), launch.launched():
        pass


def test_fsdp_2_on_gpus(monkeypatch):
    assert not launch.is_fsdp_asked()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "True")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")  # accelerate launch's default
    check_launch(state(2))
    assert launch.is_fsdp_asked()
    assert launch.os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


@pytest.mark.parametrize(
    ("kind", "where"), [(DistributedType.MULTI_CPU, "on CPUs"), (DistributedType.NO, "in one process")]
)
def test_fsdp_that_would_quietly_be_something_else(monkeypatch, kind, where):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(RunError, match=f"not active: {where}"):
        check_launch(state(2, kind))


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FSDP_VERSION", "1", "fsdp_version: found 1; allowed: 2"),
        ("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT", "found SHARDED_STATE_DICT; allowed: FULL_STATE_DICT"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: found true; allowed: false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "activation_checkpointing in the recipe does the same"),
    ],
)
def test_what_fsdp_is_not_asked_for_here(monkeypatch, variable, value, message):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(variable, value)
    with pytest.raises(RunError, match=message):
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


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(launch._LOG, "warning", lines.append)
    return lines


def test_another_precision_than_the_launchs_is_told_once(monkeypatch, told):
    check_launch_options({"a": "bfloat16", "b": "float32"})
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what the launcher sets where nothing is asked
    check_launch_options({"a": "bfloat16", "b": "float32"})
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    check_launch_options({"a": "bfloat16"})
    assert told == []
    check_launch_options({"a": "bfloat16", "b": "float32"})
    (line,) = told
    assert "asks for bf16" in line
    assert "b trains in float32" in line
    assert "a trains" not in line


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp8"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
        ("ACCELERATE_DYNAMO_MODE", "max-autotune"),
        ("ACCELERATE_DYNAMO_USE_FULLGRAPH", "True"),
        ("ACCELERATE_USE_MEGATRON_LM", "true"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true"),
    ],
)
def test_what_no_recipe_asks_for_is_refused(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(RunError, match=variable):
        check_launch_options({"b": "float32"})


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "NO"),
        ("ACCELERATE_DYNAMO_MODE", "default"),
        ("ACCELERATE_DYNAMO_USE_DYNAMIC", "False"),
    ],
)
def test_what_the_launcher_sets_anyway_is_fine(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    check_launch_options({"b": "float32"})


def test_a_cpu_that_the_launch_asks_for_where_there_is_an_accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    check_launch_options({"b": "float32"})
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(RunError, match="CUDA_VISIBLE_DEVICES"):
        check_launch_options({"b": "float32"})
