"""What holds for a run of `launches.write_phases` whatever spreads it over two processes: FSDP or DeepSpeed."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from launches import ALONE, ROOT, assert_same_result, launch, run, succeed, train
from safetensors.torch import load_file

ENVIRONMENT = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
SABOTAGE = """
import os
import {module}, torch
{module}.believe_in_accelerators()
import hfft
from transformers import TrainerCallback

class Slip(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            {slip}

recipe = hfft.load_recipe("vit.yaml", ["replay.mode=off", "training.max_steps=1"])
try:
    hfft.finetune(recipe, callbacks=[Slip()])
except hfft.HfftError as error:
    os.write(1, f"caught: {{error}}\\n".encode())
"""


@dataclass(frozen=True)
class Spread:
    """A way to spread a run.

    Attributes:
        config: Launch configuration.
        module: Stands for hfft in the processes.
        words: What environment.json calls it.
    """

    config: str
    module: str
    words: str

    def launch(
        self, workplace: Path, *command: Any, more: Sequence[Any] = (), fails: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in two processes."""
        begin = launch(self.config, "--num_processes", 2, *more)
        return (run if fails else succeed)([*begin, *command], workplace, **ENVIRONMENT)

    def train(self, *options: Any) -> list[str]:
        """The end of a command, as `launches.train`."""
        return train(*options, module=self.module)

    def assert_phases_and_files_of_one_process(self, workplace: Path) -> subprocess.CompletedProcess[str]:
        """Gradients are clipped by the norm of all of them; rates differ by block; images are accumulated."""
        done = self.launch(workplace, *self.train("vit", "two", "off", 1, 2))
        succeed([*ALONE, *train("vit", "one", "off", 4)], workplace)
        assert assert_same_result(workplace, "vit", "one", "two") == ["0-head", "1-blocks", "2-lora"]
        runs = [workplace / name / "of_vit" for name in ("one", "two")]
        kinds = [json.loads((folder / "environment.json").read_text())["spread_by"] for folder in runs]
        assert kinds == [None, self.words]
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
        return done

    def assert_bfloat16_is_autocast(self, workplace: Path) -> None:
        """With activation checkpointing; weights stay in float32."""
        options = ["precision=bfloat16", "training.activation_checkpointing=true", "training.max_steps=6"]
        self.launch(workplace, *self.train("vit", "two", "off", 2), *options)
        succeed([*ALONE, *train("vit", "one", "off", 4), *options], workplace)
        for phase in ("0-head", "1-blocks"):
            folders = [workplace / name / "of_vit" / phase for name in ("one", "two")]
            one, two = (load_file(next(folder.glob("*/model.safetensors"))) for folder in folders)
            assert {value.dtype for value in two.values()} == {torch.float32}
            for name, value in one.items():
                torch.testing.assert_close(two[name], value, rtol=1e-2, atol=1e-3)

    def assert_a_killed_run_continues_to_the_same_bits(self, workplace: Path) -> None:
        """With moments: of Adam in several groups, at rates of their own."""
        more = [f"phases.blocks.{setting}" for setting in ("optim=adamw_torch_fused", "early_stopping=8")]
        more.append("training.num_train_epochs=8")
        self.launch(workplace, *self.train("vit", "whole", "off", 2), *more)
        command = [*launch(self.config, "--num_processes", 2), *self.train("vit", "killed", "off", 2), *more]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **ENVIRONMENT}
        quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen([*map(str, command)], cwd=workplace, env=environment, **quiet) as process:
            end = time.monotonic() + 120
            while not [*(workplace / "killed").glob("of_vit/1-blocks/checkpoint-*")] and time.monotonic() < end:
                time.sleep(0.02)
            for own in (*psutil.Process(process.pid).children(recursive=True), process):
                own.kill()
        assert not (workplace / "killed/of_vit/1-blocks/result.json").exists()
        done = self.launch(workplace, *self.train("vit", "killed", "off", 2), *more)
        assert "phase 2/3 blocks: continues from checkpoint-" in done.stderr
        names = sorted(path.relative_to(workplace / "whole") for path in (workplace / "whole").rglob("*.safetensors"))
        assert len(names) >= 4
        for name in names:
            whole, killed = (load_file(workplace / folder / name) for folder in ("whole", "killed"))
            assert whole.keys() == killed.keys()
            assert all(torch.equal(whole[key], killed[key]) for key in whole), name

    def assert_a_slip_is_found(self, workplace: Path, slip: str) -> None:
        """The proof reads what was trained with, and not the whole copy that was kept aside.

        Args:
            workplace: Where the runs are.
            slip: A statement that changes q_proj of the first block of `model`, which is frozen.
        """
        (workplace / "sabotage.py").write_text(SABOTAGE.format(module=self.module, slip=slip))
        done = self.launch(workplace, "sabotage.py")
        name = "vit.layers.0.attention.q_proj.weight"
        expected = f"caught: 1 frozen tensors changed during the phase, the first is {name}"
        assert done.stdout.count(expected) == 2
