"""Under DeepSpeed ZeRO-2, here on two CPU processes (zero_on_cpu.py), a run ends as in one, with the same files."""

import importlib.util
import re

import pytest
from launches import ALONE, assert_same_result, succeed, train, write_phases, write_recipe
from spread import Spread

pytestmark = [
    pytest.mark.slow,
    pytest.mark.multiprocess,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs the extra deepspeed"),
]

ZERO = Spread("deepspeed_zero2.yaml", "zero_on_cpu", "DeepSpeed ZeRO-2")


@pytest.fixture
def workplace(tmp_path, photos):
    photos({"train/ant": 11, "train/bee": 10, "validation/ant": 5, "validation/bee": 4, "test/ant": 4, "test/bee": 5})
    for family in ("dinov2", "convnext"):
        write_recipe(tmp_path, family)
    write_phases(tmp_path)
    return tmp_path


def told(done):
    """What zero_on_cpu said of each network: the stage, numbers that this process has moments of, all that train."""
    found = re.findall(r"ZeRO stage (\d), moments of (\d+) of (\d+) numbers here", done.stdout)
    return [tuple(map(int, numbers)) for numbers in found]


def test_phases_of_a_vit_end_with_the_weights_and_the_files_of_one_process(workplace):
    done = ZERO.assert_phases_and_files_of_one_process(workplace)
    assert [stage for stage, _, _ in told(done)] == [2, 2, 2]
    assert all(here < 0.6 * trained for _, here, trained in told(done))
    assert [line for line in done.stderr.splitlines() if "warning" in line.lower() or "mismatch" in line] == []


@pytest.mark.parametrize(
    ("family", "replay", "changes"),
    [("convnext", "off", []), ("dinov2", "force", ["phases.all.unfreeze={blocks: 2}"])],
)
def test_so_do_other_networks_with_replay_and_without(family, replay, changes, workplace):
    done = ZERO.launch(workplace, *ZERO.train(family, "two", replay, 2), *changes)
    succeed([*ALONE, *train(family, "one", replay, 4), *changes], workplace)
    assert_same_result(workplace, family, "one", "two")
    assert done.stderr.count(": replays what enters") == (3 if replay == "force" else 0)


def test_bfloat16_is_autocast_and_weights_stay_in_float32(workplace):
    ZERO.assert_bfloat16_is_autocast(workplace)


def test_a_killed_run_continues_to_the_same_bits(workplace):
    ZERO.assert_a_killed_run_continues_to_the_same_bits(workplace)


def test_a_frozen_number_that_changed_is_found(workplace):
    ZERO.assert_a_slip_is_found(workplace, "model.vit.layers[0].attention.q_proj.weight[-1, 0] += 1e-3")


def test_what_hfft_does_not_do_under_deepspeed_is_refused(workplace):
    done = ZERO.launch(workplace, "-m", "hfft", "train", "vit.yaml", fails=True)
    assert done.returncode != 0
    assert done.stderr.count("error: DeepSpeed was asked for, and is not active: on CPUs accelerate trains whole") == 1
    done = ZERO.launch(workplace, *ZERO.train("vit", "two", "off", 2), more=("--zero_stage", 3), fails=True)
    assert "error: zero_stage: found 3; allowed: 2" in done.stderr
    done = ZERO.launch(workplace, *ZERO.train("vit", "two", "off", 2), "phases.lora.optim=adafactor", fails=True)
    assert "phases.lora.optim: found 'adafactor'; allowed under DeepSpeed ZeRO-2: adamw_torch" in done.stderr
    assert not (workplace / "two").exists()
