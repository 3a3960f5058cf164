"""docs/inference.md: its commands run, and its program for onnxruntime alone answers as the model does."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import hfft
from hfft.cli import main

TEXT = (Path(__file__).parents[2] / "docs/inference.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def workplace(tmp_path, photos, monkeypatch):
    """A folder with photos and a finished run where the page expects them."""
    photos({f"{split}/{name}": 6 for split in ("train", "validation", "test") for name in ("rose", "tulip")})
    photos({"a": 2}, name="new_photos")
    photos({"b": 2}, name="more")
    tiny.save(tmp_path / "net", "convnext", 2)
    (tmp_path / "recipe.yaml").write_text(
        "{name: flowers, model: {checkpoint: net}, data: {source: photos}, precision: float32, training: "
        "{dataloader_num_workers: 0, disable_tqdm: true}, phases: [{name: head, unfreeze: head, learning_rate: 0.1}]}"
    )
    monkeypatch.chdir(tmp_path)
    hfft.finetune(hfft.load_recipe("recipe.yaml"))
    return tmp_path


def test_its_commands_run(workplace, capsys):
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    ours = [line for line in lines if "hfft" in line and "|" not in line and line != "hfft demo runs/flowers"]
    others = [line for line in lines if line not in ours]
    assert len(ours) == 5
    for line in ours:
        assert main(shlex.split(line)[1:]) == 0, (line, capsys.readouterr().err)
    assert [line.split()[0] for line in others] == ["find", "pip", "pip", "hfft", "hf", "hf"]
    (piped,) = [line for line in others if line.startswith("find")]
    (workplace / "new_photos/a/000.png").rename("new_photos/a/000.jpg")
    command = piped.replace("hfft", f"{shlex.quote(sys.executable)} -m hfft")
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert "new_photos/a/000.jpg" in done.stdout


@pytest.mark.parametrize("size", [(50, 70), (71, 48)])
@pytest.mark.parametrize("processor", ["exact", "shorter edge"])
def test_its_program_answers_as_the_model_does(processor, size, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny.build("vit", 3)
    with torch.no_grad():
        model.classifier.weight.mul_(40)  # so that another crop or color gives other answers
    model.save_pretrained("runs/flowers")
    tiny.processor().save_pretrained("runs/flowers")
    if processor == "shorter edge":
        from transformers import BitImageProcessor

        BitImageProcessor(
            size={"shortest_edge": 37}, crop_size=dict.fromkeys(("height", "width"), 32)
        ).save_pretrained("runs/flowers")
    coarse = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save("photo.jpg")
    assert main(["export", "runs/flowers"]) == 0
    capsys.readouterr()
    (program,) = blocks("python")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    block = "import sys; sys.modules |= dict.fromkeys(('torch', 'transformers', 'hfft', 'onnx'))\n"
    command = [sys.executable, "-c", block + program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    classify = hfft.Classifier.from_pretrained("runs/flowers")
    expected = classify("photo.jpg", top=3).top
    mirrored = classify(np.asarray(Image.open("photo.jpg"))[:, ::-1], top=3).top
    assert max(abs(mirrored[name] - share) for name, share in expected.items()) > 0.02
    assert ast.literal_eval(done.stdout) == {name: pytest.approx(share, abs=2e-3) for name, share in expected.items()}
