"""Under FSDP 2, here on two CPU processes (fsdp_on_cpu.py), a run ends as in one process and leaves the same files."""

import json
import os
import re
import subprocess
import time

import psutil
import pytest
import tiny
import torch
import warm
from families import KINDS
from launches import (
    ACCELERATE,
    ALONE,
    assert_same_result,
    free_port,
    launch,
    run,
    run_jobs,
    succeed,
    train,
    write_phases,
    write_recipe,
)
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

SABOTAGE = """
import os
import fsdp_on_cpu, torch
fsdp_on_cpu.believe_in_accelerators()
import hfft
from transformers import TrainerCallback

class Slip(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            if torch.distributed.get_rank() == 1:
                model.vit.layers[0].attention.q_proj.weight.to_local()[-1, 0] += 1e-3

recipe = hfft.load_recipe("vit.yaml", ["replay.mode=off", "training.max_steps=1"])
try:
    hfft.finetune(recipe, callbacks=[Slip()])
except hfft.HfftError as error:
    os.write(1, f"caught: {error}\\n".encode())
"""


def spread(workplace, *command, fails=False):
    """Run a command in two processes under FSDP 2."""
    begin = launch("fsdp2.yaml", "--num_processes", 2)
    return (run if fails else succeed)([*begin, *command], workplace)


def train_spread(*options):
    """The end of a command, as `launches.train`."""
    return train(*options, module="fsdp_on_cpu")


@pytest.fixture
def workplace(tmp_path, photos):
    photos({"train/ant": 11, "train/bee": 10, "validation/ant": 5, "validation/bee": 4, "test/ant": 4, "test/bee": 5})
    for family in ("dinov2", "convnext", "resnet"):
        write_recipe(tmp_path, family)
    write_phases(tmp_path)
    return tmp_path


def shards(done):
    """What fsdp_on_cpu said of each network: tensors spread, of how many; numbers here, of how many; units."""
    found = re.findall(r"spread: (\d+) of (\d+) tensors, (\d+) of (\d+) numbers here, (\d+) units", done.stdout)
    return [tuple(map(int, numbers)) for numbers in found]


UNMEASURED = ["label_hints=false", "retain.measure=false"]  # in dinov2 and vit it is
OTHERS = {  # replay and changes
    "convnext": ("off", UNMEASURED),
    "dinov2": ("force", ["phases.all.unfreeze={blocks: 2}"]),
    "resnet": ("auto", ["training.activation_checkpointing=false", *UNMEASURED]),
}
BATCHNORM = ["phases.all.batchnorm=train", "keep=last", "training.dataloader_drop_last=true", *UNMEASURED]
BFLOAT16 = ["precision=bfloat16", "training.activation_checkpointing=true", "training.max_steps=6", *UNMEASURED]


@pytest.mark.timeout(900)
def test_two_processes_end_with_the_weights_and_files_of_one(workplace, subtests):
    """Runs of several kinds in one launch of two processes, and each of them alone."""
    jobs = {
        "vit": train("vit", "two", "off", 1, 2),
        **{family: [*train(family, "two", replay, 2), *more] for family, (replay, more) in OTHERS.items()},
        "batchnorm": [*train("resnet", "fsdp", "off", 4), *BATCHNORM],
        "bfloat16": [*train("vit", "two_bf16", "off", 2), *BFLOAT16],
    }
    done = run_jobs(
        {name: words[2:] for name, words in jobs.items()}, workplace, "fsdp2.yaml", "--num_processes", 2, kind="fsdp"
    )
    succeed([*ALONE, *train("vit", "one", "off", 4)], workplace)
    succeed([*ALONE, *train("vit", "one_bf16", "off", 4), *BFLOAT16], workplace)
    succeed([*launch(), *train("resnet", "ddp", "off", 4), *BATCHNORM], workplace)
    for family, (replay, more) in OTHERS.items():
        succeed([*ALONE, *train(family, "one", replay, 4), *more], workplace)
    with subtests.test("vit"):
        check_vit(workplace, done["vit"])
    for family in OTHERS:
        with subtests.test(family):
            assert_same_result(workplace, family, "one", "two")
    with subtests.test("replay"):  # what lies in front of the split point is in no process's way
        head, blocks, _ = shards(done["dinov2"])
        assert head[0] == 2
        assert blocks[0] < blocks[1] / 2 + 1
        assert done["dinov2"].stderr.count(": replays what enters") == 3
    with subtests.test("batchnorm"):
        check_batchnorm(workplace)
    with subtests.test("bfloat16"):
        check_bfloat16(workplace)


def check_vit(workplace, done):
    """Gradients are clipped by the norm of all of them; rates differ by block; images are accumulated."""
    assert assert_same_result(workplace, "vit", "one", "two") == ["0-head", "1-blocks", "2-lora"]
    runs = [workplace / name / "of_vit" for name in ("one", "two")]
    kinds = [json.loads((folder / "environment.json").read_text())["spread_by"] for folder in runs]
    assert kinds == [None, "FSDP 2"]
    for phase in ("0-head", "1-blocks", "2-lora"):
        lines = [(folder / phase / "history.jsonl").read_text().splitlines() for folder in runs]
        norms = [[json.loads(line).get("grad_norm", 0.0) for line in own] for own in lines]
        assert norms[1] == pytest.approx(norms[0], rel=1e-4)
        assert max(norms[0]) > 0.3  # some were clipped
        results = [json.loads((folder / phase / "result.json").read_text()) for folder in runs]
        assert results[0]["frozen"] == results[1]["frozen"]
        assert results[0]["best_step"] == results[1]["best_step"]
        assert results[0]["metrics"] == pytest.approx(results[1]["metrics"])
        checkpoint = f"{phase}/{results[0]['checkpoint']}"
        files = [{file.name for file in (folder / checkpoint).iterdir()} for folder in runs]
        assert {name for name in files[1] if "rng_state" not in name} == files[0] - {"rng_state.pth"}
    stopped = json.loads((runs[1] / "1-blocks/result.json").read_text())
    assert stopped["best_step"] < stopped["steps"]  # so that the best weights were put back
    kept = [torch.load(folder / checkpoint / "optimizer.pt", weights_only=True) for folder in runs]
    assert kept[0]["param_groups"] == kept[1]["param_groups"]
    assert len(kept[0]["param_groups"]) > 1
    assert kept[0]["state"].keys() == kept[1]["state"].keys() != set()
    for number, state in kept[0]["state"].items():
        torch.testing.assert_close(kept[1]["state"][number], state, rtol=1e-4, atol=1e-6)
    assert len(shards(done)) == 3
    for spread_tensors, tensors, here, whole, units in shards(done):
        assert (spread_tensors, units) == (tensors, 6)  # 4 blocks, the norm, and the rest
        assert here < 0.6 * whole


def check_batchnorm(workplace):
    """Statistics of released BatchNorm are those of DDP: of the first process's part of each batch, in both."""
    fsdp, ddp = (load_file(workplace / name / "of_resnet/model/model.safetensors") for name in ("fsdp", "ddp"))
    start = load_file(workplace / "resnet/model.safetensors")
    moved = [name for name in fsdp if name.endswith("running_var") and not torch.equal(fsdp[name], start[name])]
    assert len(moved) > 10
    for name, value in ddp.items():
        torch.testing.assert_close(fsdp[name], value, rtol=1e-4, atol=1e-6)


def check_bfloat16(workplace):
    """bfloat16 is autocast: weights stay in float32."""
    for phase in ("0-head", "1-blocks"):
        folders = [workplace / name / "of_vit" / phase for name in ("one_bf16", "two_bf16")]
        one, two = (load_file(next(folder.glob("*/model.safetensors"))) for folder in folders)
        assert {value.dtype for value in two.values()} == {torch.float32}
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-2, atol=1e-3)


def test_a_killed_run_continues_to_the_same_bits(workplace):
    """With moments: of Adam in several groups, at rates of their own."""
    more = [f"phases.blocks.{setting}" for setting in ("optim=adamw_torch_fused", "early_stopping=8")]
    more += ["training.num_train_epochs=4", *UNMEASURED]
    spread(workplace, *train_spread("vit", "whole", "off", 2), *more)
    command = [*launch("fsdp2.yaml", "--num_processes", 2), *train_spread("vit", "killed", "off", 2), *more]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    with warm.Popen([*map(str, command)], cwd=workplace, env=environment, **quiet) as process:
        end = time.monotonic() + 120
        while not [*(workplace / "killed").glob("of_vit/1-blocks/checkpoint-*")] and time.monotonic() < end:
            time.sleep(0.02)
        for own in (*psutil.Process(process.pid).children(recursive=True), process):
            own.kill()
    assert not (workplace / "killed/of_vit/1-blocks/result.json").exists()
    done = spread(workplace, *train_spread("vit", "killed", "off", 2), *more)
    assert "phase 2/3 blocks: continues from checkpoint-" in done.stderr
    names = sorted(path.relative_to(workplace / "whole") for path in (workplace / "whole").rglob("*.safetensors"))
    assert len(names) >= 4
    for name in names:
        whole, killed = (load_file(workplace / folder / name) for folder in ("whole", "killed"))
        assert whole.keys() == killed.keys()
        assert all(torch.equal(whole[key], killed[key]) for key in whole), name


def test_a_frozen_number_that_changed_in_a_shard_of_one_process_is_found(workplace):
    """The proof reads what was trained with, and not the whole copy that was kept aside."""
    (workplace / "sabotage.py").write_text(SABOTAGE)
    done = spread(workplace, "sabotage.py")
    name = "vit.layers.0.attention.q_proj.weight"
    expected = f"caught: 1 frozen tensors changed during the phase, the first is {name}"
    assert done.stdout.count(expected) == 2


@pytest.mark.parametrize(
    "families", [KINDS, pytest.param(tuple(tiny.CONFIGS), marks=pytest.mark.nightly)], ids=["kinds", "all"]
)
def test_families_can_be_sharded(families, workplace):
    """One step of each, everything unfrozen and with LoRA."""
    done = spread(workplace, "-m", "shard_families", *families)
    lines = [line for line in done.stdout.splitlines() if line]
    assert {line.split()[0] for line in lines} == set(families)
    assert [line for line in lines if not line.endswith(": as a plain one")] == []


def test_on_a_cpu_fsdp_is_refused_and_not_quietly_ddp(workplace):
    done = spread(workplace, "-m", "hfft", "train", "vit.yaml", fails=True)
    assert done.returncode != 0
    assert (
        done.stderr.count("error: FSDP was asked for, and is not active: on CPUs accelerate trains whole copies") == 1
    )
    assert not (workplace / "runs").exists()


def test_accelerate_still_makes_fsdp_on_cpus_to_ddp(workplace):
    """Why it is refused; where this fails, accelerate has mended it."""
    ask = "import os\nfrom accelerate import Accelerator\nkind = Accelerator(cpu=True).distributed_type\n"
    (workplace / "probe.py").write_text(ask + "os.write(1, f'{kind}\\n'.encode())\n")
    assert spread(workplace, "probe.py").stdout.split() == ["DistributedType.MULTI_CPU"] * 2


def test_settings_that_do_not_go_with_shards_are_refused(workplace):
    done = spread(workplace, *train_spread("vit", "two", "off", 2), "phases.lora.optim=adafactor", fails=True)
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
    done = run([*version, *train_spread("vit", "two", "off", 2)], workplace)
    assert "error: fsdp_version: found 1; allowed: 2" in done.stderr
