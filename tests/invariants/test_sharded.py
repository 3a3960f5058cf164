"""Under FSDP 2, here on two CPU processes (fsdp_on_cpu.py), a run ends as in one process and leaves the same files."""

import re

import pytest
import tiny
import torch
from launches import (
    ACCELERATE,
    ALONE,
    assert_same_result,
    free_port,
    launch,
    run,
    succeed,
    train,
    write_phases,
    write_recipe,
)
from safetensors.torch import load_file
from spread import ENVIRONMENT, Spread

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

FSDP = Spread("fsdp2.yaml", "fsdp_on_cpu", "FSDP 2")


@pytest.fixture
def workplace(tmp_path, photos):
    photos({"train/ant": 11, "train/bee": 10, "validation/ant": 5, "validation/bee": 4, "test/ant": 4, "test/bee": 5})
    for family in ("dinov2", "convnext", "resnet"):
        write_recipe(tmp_path, family)
    write_phases(tmp_path)
    return tmp_path


def told(done):
    """What fsdp_on_cpu said of each network: tensors spread, of how many; numbers here, of how many; units."""
    found = re.findall(r"spread: (\d+) of (\d+) tensors, (\d+) of (\d+) numbers here, (\d+) units", done.stdout)
    return [tuple(map(int, numbers)) for numbers in found]


def test_phases_of_a_vit_end_with_the_weights_of_one_process(workplace):
    done = FSDP.assert_phases_and_files_of_one_process(workplace)
    assert len(told(done)) == 3
    for spread, tensors, here, whole, units in told(done):
        assert (spread, units) == (tensors, 6)  # 4 blocks, the norm, and the rest
        assert here < 0.6 * whole


@pytest.mark.parametrize(
    ("family", "replay", "changes"),
    [
        ("convnext", "off", []),
        ("dinov2", "force", ["phases.all.unfreeze={blocks: 2}"]),
        ("resnet", "auto", ["training.activation_checkpointing=false"]),
    ],
)
def test_so_do_other_networks_with_replay_and_without(family, replay, changes, workplace):
    done = FSDP.launch(workplace, *FSDP.train(family, "two", replay, 2), *changes)
    succeed([*ALONE, *train(family, "one", replay, 4), *changes], workplace)
    assert_same_result(workplace, family, "one", "two")
    if family == "dinov2":  # what lies in front of a cut is in no process's way
        head, blocks, _ = told(done)
        assert head[0] == 2
        assert blocks[0] < blocks[1] / 2 + 1
        assert done.stderr.count(": replays what enters") == 3


def test_statistics_of_released_batchnorm_are_those_of_ddp(workplace):
    """Of the first process's part of each batch, in all processes."""
    more = ["phases.all.batchnorm=train", "keep=last", "training.dataloader_drop_last=true"]
    FSDP.launch(workplace, *FSDP.train("resnet", "fsdp", "off", 4), *more)
    succeed([*launch(), *train("resnet", "ddp", "off", 4), *more], workplace)
    fsdp, ddp = (load_file(workplace / name / "of_resnet/model/model.safetensors") for name in ("fsdp", "ddp"))
    start = load_file(workplace / "resnet/model.safetensors")
    moved = [name for name in fsdp if name.endswith("running_var") and not torch.equal(fsdp[name], start[name])]
    assert len(moved) > 10
    for name, value in ddp.items():
        torch.testing.assert_close(fsdp[name], value, rtol=1e-4, atol=1e-6)


def test_bfloat16_and_activation_checkpointing(workplace):
    FSDP.assert_bfloat16_is_autocast(workplace)


def test_a_killed_run_continues_to_the_same_bits(workplace):
    FSDP.assert_a_killed_run_continues_to_the_same_bits(workplace)


def test_a_frozen_number_that_changed_in_a_shard_of_one_process_is_found(workplace):
    weight = "model.vit.layers[0].attention.q_proj.weight"
    FSDP.assert_a_slip_is_found(workplace, f"if torch.distributed.get_rank() == 1: {weight}.to_local()[-1, 0] += 1e-3")


def test_every_family_can_be_sharded(workplace):
    """One step of each, everything unfrozen and with LoRA."""
    done = FSDP.launch(workplace, "-m", "shard_families")
    lines = [line for line in done.stdout.splitlines() if line]
    assert {line.split()[0] for line in lines} == set(tiny.CONFIGS)
    assert [line for line in lines if not line.endswith(": as a plain one")] == []


def test_on_a_cpu_fsdp_is_refused_and_not_quietly_ddp(workplace):
    done = FSDP.launch(workplace, "-m", "hfft", "train", "vit.yaml", fails=True)
    assert done.returncode != 0
    assert (
        done.stderr.count("error: FSDP was asked for, and is not active: on CPUs accelerate trains whole copies") == 1
    )
    assert not (workplace / "runs").exists()


def test_accelerate_still_makes_fsdp_on_cpus_to_ddp(workplace):
    """Why it is refused; where this fails, accelerate has mended it."""
    ask = "import os\nfrom accelerate import Accelerator\nkind = Accelerator(cpu=True).distributed_type\n"
    (workplace / "probe.py").write_text(ask + "os.write(1, f'{kind}\\n'.encode())\n")
    assert FSDP.launch(workplace, "probe.py").stdout.split() == ["DistributedType.MULTI_CPU"] * 2


def test_settings_that_do_not_go_with_shards_are_refused(workplace):
    done = FSDP.launch(workplace, *FSDP.train("vit", "two", "off", 2), "phases.lora.optim=adafactor", fails=True)
    assert "phases.lora.optim: found 'adafactor'; allowed under FSDP 2: adamw_torch" in done.stderr
    version = [
        *ACCELERATE,
        "--use_fsdp",
        "--fsdp_version",
        1,
        "--num_processes",
        2,
        "--main_process_port",
        free_port(),
    ]
    done = run([*version, *FSDP.train("vit", "two", "off", 2)], workplace, **ENVIRONMENT)
    assert "error: fsdp_version: found 1; allowed: 2" in done.stderr
