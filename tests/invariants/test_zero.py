"""Under DeepSpeed ZeRO-2, here on two CPU processes (zero_on_cpu.py), a run ends as in one, with the same files."""

import importlib.util
import json
import os
import re
import subprocess
import time

import psutil
import pytest
import torch
from launches import ALONE, ROOT, assert_same_result, launch, run, succeed, train, write_phases, write_recipe
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.multiprocess,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the extra deepspeed"),
]

ZERO = ("deepspeed_zero2.yaml", "--num_processes", 2)
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


@pytest.fixture
def workplace(tmp_path, photos):
    photos({"train/ant": 11, "train/bee": 10, "validation/ant": 5, "validation/bee": 4, "test/ant": 4, "test/bee": 5})
    for family in ("dinov2", "convnext"):
        write_recipe(tmp_path, family)
    write_phases(tmp_path)
    return tmp_path


def under_zero(workplace, *command, more=(), fails=False):
    return (run if fails else succeed)([*launch(*ZERO, *more), *command], workplace, **ENVIRONMENT)


def partitioned(*options, **more):
    return train(*options, module="zero_on_cpu", **more)


def told(done):
    """What zero_on_cpu said of each network: the stage, numbers that this process has moments of, all that train."""
    found = re.findall(r"ZeRO stage (\d), moments of (\d+) of (\d+) numbers here", done.stdout)
    return [tuple(map(int, numbers)) for numbers in found]


def test_phases_of_a_vit_end_with_the_weights_and_the_files_of_one_process(workplace):
    """Gradients are clipped by the norm of all of them; rates differ by block; images are accumulated."""
    done = under_zero(workplace, *partitioned("vit", "two", "off", 1, 2))
    succeed([*ALONE, *train("vit", "one", "off", 4)], workplace)
    assert assert_same_result(workplace, "vit", "one", "two") == ["0-head", "1-blocks", "2-lora"]
    assert [stage for stage, _, _ in told(done)] == [2, 2, 2]
    assert all(here < 0.6 * trained for _, here, trained in told(done))
    assert [line for line in done.stderr.splitlines() if "warning" in line.lower() or "mismatch" in line] == []
    runs = [workplace / name / "of_vit" for name in ("one", "two")]
    kinds = [json.loads((folder / "environment.json").read_text())["spread_by"] for folder in runs]
    assert kinds == [None, "DeepSpeed ZeRO-2"]
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


@pytest.mark.parametrize(
    ("family", "replay", "changes"),
    [("convnext", "off", []), ("dinov2", "force", ["phases.all.unfreeze={blocks: 2}"])],
)
def test_so_do_other_networks_with_replay_and_without(family, replay, changes, workplace):
    done = under_zero(workplace, *partitioned(family, "two", replay, 2), *changes)
    succeed([*ALONE, *train(family, "one", replay, 4), *changes], workplace)
    assert_same_result(workplace, family, "one", "two")
    assert done.stderr.count(": replays what enters") == (3 if replay == "force" else 0)


def test_bfloat16_is_autocast_and_weights_stay_in_float32(workplace):
    options = ["precision=bfloat16", "training.activation_checkpointing=true", "training.max_steps=6"]
    under_zero(workplace, *partitioned("vit", "two", "off", 2), *options)
    succeed([*ALONE, *train("vit", "one", "off", 4), *options], workplace)
    for phase in ("0-head", "1-blocks"):
        files = [next((workplace / name / "of_vit" / phase).glob("*/model.safetensors")) for name in ("one", "two")]
        one, two = map(load_file, files)
        assert {value.dtype for value in two.values()} == {torch.float32}
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-2, atol=1e-3)


def test_a_killed_run_continues_to_the_same_bits(workplace):
    """With moments: of Adam in several groups, at rates of their own."""
    more = ["training.num_train_epochs=8", "phases.blocks.optim=adamw_torch_fused", "phases.blocks.early_stopping=8"]
    under_zero(workplace, *partitioned("vit", "whole", "off", 2), *more)
    command = [*map(str, [*launch(*ZERO), *partitioned("vit", "killed", "off", 2), *more])]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **ENVIRONMENT}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=workplace, env=environment, **quiet) as process:
        end = time.monotonic() + 120
        while not [*(workplace / "killed").glob("of_vit/1-blocks/checkpoint-*")] and time.monotonic() < end:
            time.sleep(0.02)
        for own in (*psutil.Process(process.pid).children(recursive=True), process):
            own.kill()
    assert not (workplace / "killed/of_vit/1-blocks/result.json").exists()
    done = under_zero(workplace, *partitioned("vit", "killed", "off", 2), *more)
    assert "phase 2/3 blocks: continues from checkpoint-" in done.stderr
    names = sorted(path.relative_to(workplace / "whole") for path in (workplace / "whole").rglob("*.safetensors"))
    assert len(names) >= 4
    for name in names:
        whole, killed = (load_file(workplace / folder / name) for folder in ("whole", "killed"))
        assert whole.keys() == killed.keys()
        assert all(torch.equal(whole[key], killed[key]) for key in whole), name


SABOTAGE = """
import os
import zero_on_cpu, torch
zero_on_cpu.believe_in_accelerators()
import hfft
from transformers import TrainerCallback

class Slip(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model.vit.layers[0].attention.q_proj.weight[-1, 0] += 1e-3

recipe = hfft.load_recipe("vit.yaml", ["replay.mode=off", "training.max_steps=1"])
try:
    hfft.finetune(recipe, callbacks=[Slip()])
except hfft.HfftError as error:
    os.write(1, f"caught: {error}\\n".encode())
"""


def test_a_frozen_number_that_changed_is_found(workplace):
    """The proof reads what was trained with, and not the whole copy that was kept aside."""
    (workplace / "sabotage.py").write_text(SABOTAGE)
    done = under_zero(workplace, "sabotage.py")
    expected = "caught: 1 frozen tensors changed during the phase, the first is vit.layers.0.attention.q_proj.weight"
    assert done.stdout.count(expected) == 2


def test_what_hfft_does_not_do_under_deepspeed_is_refused(workplace):
    done = under_zero(workplace, "-m", "hfft", "train", "vit.yaml", fails=True)
    assert done.returncode != 0
    assert done.stderr.count("error: DeepSpeed was asked for, and is not active: on CPUs accelerate trains whole") == 1
    done = under_zero(workplace, *partitioned("vit", "two", "off", 2), more=("--zero_stage", 3), fails=True)
    assert "error: zero_stage: found 3; allowed: 2" in done.stderr
    done = under_zero(workplace, *partitioned("vit", "two", "off", 2), "phases.lora.optim=adafactor", fails=True)
    assert "phases.lora.optim: found 'adafactor'; allowed under DeepSpeed ZeRO-2: adamw_torch" in done.stderr
    assert not (workplace / "two").exists()
