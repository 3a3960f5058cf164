"""`full_determinism: true` holds in every step of every phase: nothing that hfft does in between takes it back."""

import json

import pytest
from launches import ALONE, succeed

RECIPE = """
name: r
model: {checkpoint: vit}
data: {source: photos, augment: {flip: true}}
training: {optim: sgd, learning_rate: 0.05, num_train_epochs: 1, full_determinism: FULL, dataloader_num_workers: 1}
precision: float32
report: false
replay: {mode: REPLAY}
phases:
  - {name: head, unfreeze: head}
  - {name: all, unfreeze: all}
"""
PROBE = """
import json, sys
from pathlib import Path
import torch
from transformers import TrainerCallback
import hfft

def state():
    return [torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic]

seen = {}

def look(where):
    found = seen.setdefault(where, [])
    if state() not in found:
        found.append(state())

class Look(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        name = Path(args.output_dir).name
        model.register_forward_hook(
            lambda module, inputs, output: look(f"{name} {'training' if torch.is_grad_enabled() else 'evaluation'}")
        )

    def on_step_end(self, args, state, control, **kwargs):
        look(f"{Path(args.output_dir).name} step")

hfft.finetune(hfft.load_recipe("recipe.yaml"), callbacks=[Look()])
look("end")
print(json.dumps(seen))
"""


@pytest.mark.parametrize(("full", "replay"), [(True, "auto"), (True, '"off"'), (False, "auto")])
def test_full_determinism_holds_through_the_run(full, replay, work_with):
    recipe = RECIPE.replace("FULL", str(full).lower()).replace("REPLAY", replay)
    folder = work_with(recipe, {"train/ant": 6, "train/bee": 6, "validation/ant": 2, "validation/bee": 2})
    (folder / "probe.py").write_text(PROBE)
    seen = json.loads(succeed([*ALONE, "probe.py"], folder).stdout.splitlines()[-1])
    looked = {f"{phase} {what}" for phase in ("0-head", "1-all") for what in ("training", "evaluation", "step")}
    assert looked <= {*seen}
    assert {where: states for where, states in seen.items() if states != [[full, full]]} == {}
