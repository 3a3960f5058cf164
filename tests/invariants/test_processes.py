"""One process or two, same global batch: the same weights, and every evaluation image counted once."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
RECIPE = """
name: NAME
model: {checkpoint: FAMILY}
data: {source: photos, augment: {crop: [0.6, 1.0], flip: true}}
training: {optim: sgd, learning_rate: 0.05, dataloader_num_workers: 0, num_train_epochs: 2}
precision: float32
phases:
  - {name: head, unfreeze: head}
  - {name: all, unfreeze: all}
"""
LORA = "  - {name: lora, adapter: {on: attention}}\n"


def launch():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [*ACCELERATE, "--config_file", ROOT / "recipes/accelerate/cpu2.yaml", "--main_process_port", port]


def run(command, folder):
    done = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def workplace(tmp_path, photos):
    # 21 and 9 images don't divide evenly between two processes: one has nothing to do in the last step
    photos({"train/ant": 11, "train/bee": 10, "validation/ant": 5, "validation/bee": 4, "test/ant": 4, "test/bee": 5})
    for family in ("vit", "dinov2", "resnet"):
        dropout = {} if family == "resnet" else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        tiny.save(tmp_path / family, family, **dropout)
        recipe = RECIPE.replace("NAME", f"of_{family}").replace("FAMILY", family)
        (tmp_path / f"{family}.yaml").write_text(recipe + (LORA if family == "dinov2" else ""))
    return tmp_path


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("family", ["dinov2", "resnet"])
def test_two_processes_end_with_the_weights_of_one(family, workplace):
    """DINOv2 has a mask token that no image reaches, and ResNet a loss that ignores how many images there are."""
    batch = "training.per_device_train_batch_size={}"
    one = ["-m", "hfft", "train", f"{family}.yaml", "output_dir=one", batch.format(4)]
    two = ["-m", "hfft", "train", f"{family}.yaml", "output_dir=two", batch.format(2)]
    run([sys.executable, *one], workplace)
    done = run([*launch(), *two], workplace)
    runs = [workplace / name / f"of_{family}" for name in ("one", "two")]
    environments = [json.loads((folder / "environment.json").read_text()) for folder in runs]
    assert [environment["processes"] for environment in environments] == [1, 2]
    phases = sorted(path.parent.name for path in runs[0].glob("*/result.json"))
    assert len(phases) == (3 if family == "dinov2" else 2)
    for name in [*(f"{phase}/*/*.safetensors" for phase in phases), "model/model.safetensors"]:
        weights = [load_file(next(folder.glob(name))) for folder in runs]
        assert weights[0].keys() == weights[1].keys()
        for key in weights[0]:
            torch.testing.assert_close(weights[1][key], weights[0][key], rtol=1e-4, atol=1e-6)
    tables = [pd.read_parquet(folder / "predictions.parquet") for folder in runs]
    assert len(tables[1]) == 18
    assert tables[1]["file"].is_unique
    assert tables[0][["split", "file", "label", "prediction"]].equals(
        tables[1][["split", "file", "label", "prediction"]]
    )
    np.testing.assert_allclose(tables[1]["probability"], tables[0]["probability"], atol=1e-5)
    assert done.stderr.count("trains head;") == 1  # the main process alone speaks
    assert done.stderr.count("head: replays what enters") == 1  # of which each process computed a share


PLAIN = """
import sys
import tiny, toy
from transformers import Trainer, TrainingArguments

class Frozen(Trainer):
    def compute_loss(self, model, *args, **kwargs):
        model.eval()  # leaves BatchNorm out of the comparison
        return super().compute_loss(model, *args, **kwargs)

settings = TrainingArguments(
    "plain", per_device_train_batch_size=int(sys.argv[1]), max_steps=1, optim="sgd", learning_rate=0.1,
    max_grad_norm=0, lr_scheduler_type="constant", remove_unused_columns=False, report_to="none", disable_tqdm=True,
    use_cpu=True,
)
model = tiny.build("resnet")
before = model.classifier[1].weight.clone()
data = toy.phase_data(train=8)
trainer = Frozen(model, settings, train_dataset=data.train, data_collator=data.collate)
trainer.train()
if trainer.is_world_process_zero():
    print("update", (model.classifier[1].weight - before).norm().item())
"""


@pytest.mark.slow
@pytest.mark.multiprocess
def test_plain_trainer_doubles_the_gradient_of_a_resnet_on_two_processes(tmp_path, monkeypatch):
    """Trap C as it stands in the installed transformers: why models' own losses are not used."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    (tmp_path / "plain.py").write_text(PLAIN)
    one = run([sys.executable, "plain.py", "8"], tmp_path)
    two = run([*launch(), "plain.py", "4"], tmp_path)
    updates = [float(done.stdout.partition("update ")[2].split()[0]) for done in (one, two)]
    assert updates[1] / updates[0] == pytest.approx(2, abs=0.01)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_script_under_accelerate_launch(workplace):
    """`scripts/train.py` on two processes, and on one through the same launcher."""
    script = ROOT / "scripts/train.py"
    quick = ["training.max_steps=1", "training.per_device_train_batch_size=4"]
    run([*launch(), script, "vit.yaml", "name=two", *quick], workplace)
    single = [*ACCELERATE, "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--cpu"]
    run([*single, "--dynamo_backend", "no", script, "vit.yaml", "name=one", *quick], workplace)
    for name, processes in (("one", 1), ("two", 2)):
        environment = json.loads((workplace / "runs" / name / "environment.json").read_text())
        assert environment["processes"] == processes
        assert (workplace / "runs" / name / "metrics.json").is_file()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_cpu_flag_of_accelerate_silently_starts_one_process(workplace):
    """Trap H as it stands: why recipes/accelerate/cpu2.yaml exists."""
    probe = workplace / "probe.py"
    # one write each, as two processes share the pipe
    ask = "import os\nfrom accelerate import PartialState\nworld = PartialState(cpu=True).num_processes\n"
    probe.write_text(ask + "os.write(1, f'world {world}\\n'.encode())\n")
    flags = [
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    assert run([*ACCELERATE, *flags, probe], workplace).stdout.split() == ["world", "1"]
    assert sorted(run([*launch(), probe], workplace).stdout.split()) == ["2", "2", "world", "world"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_bad_recipe_is_reported_once_by_two_processes(workplace):
    command = [*launch(), "-m", "hfft", "train", "vit.yaml", "training.lerning_rate=1"]
    done = subprocess.run([*map(str, command)], cwd=workplace, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.count("did you mean 'learning_rate'?") == 1
