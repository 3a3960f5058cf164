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
from PIL import Image
from transformers import BitImageProcessor

import hfft
from hfft.cli import main
from hfft.data.images.decoding import decode

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


@pytest.mark.parametrize("processor", ["exact", "shorter edge"])
def test_its_program_answers_as_the_model_does(processor, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "runs/flowers", "vit", 3)
    if processor == "shorter edge":
        half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        crop = {"height": 32, "width": 32}
        BitImageProcessor(size={"shortest_edge": 37}, crop_size=crop, **half).save_pretrained("runs/flowers")
    assert main(["export", "runs/flowers"]) == 0
    capsys.readouterr()
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8))
    classify = hfft.Classifier.from_pretrained("runs/flowers")
    for size in ((50, 70), (71, 48)):
        coarse.resize(size, Image.Resampling.BICUBIC).save("photo.jpg")
        shares = run_program()
        level = 2 / 255  # from -1 to 1
        expected = classify.transform(decode("photo.jpg")).numpy()
        assert np.abs(np.load("batch.npy")[0] - expected).max() < 2.5 * level
        top = classify("photo.jpg", top=3).top
        assert shares == {name: pytest.approx(share, abs=1e-3) for name, share in top.items()}


def run_program():
    """What the page's program prints for photo.jpg, in a process without torch, transformers, hfft and onnx."""
    (program,) = blocks("python")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    block = "import sys; sys.modules |= dict.fromkeys(('torch', 'transformers', 'hfft', 'onnx'))\n"
    command = [sys.executable, "-c", block + program + "\nnp.save('batch.npy', batch)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout)
