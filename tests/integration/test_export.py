"""`hfft export` on a finished run, and what others do with the folder that it leaves."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import tiny
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, BeitImageProcessor, ViTImageProcessor

import hfft
from hfft.cli import main
from hfft.commands.export import export_onnx
from hfft.data.images.decoding import decode
from hfft.data.images.resize_mode import fit_processor
from hfft.errors import ModelError
from hfft.model.adapters import attach, save_adapter
from hfft.model.checkpoint import reopen, save_model
from hfft.recipe.spec import AdapterSpec, DataSpec

CLASSES = ("ant", "bee", "cat")
RECIPE = """
name: bugs
model: {checkpoint: vit}
data: {source: photos}
training: {per_device_train_batch_size: 8, dataloader_num_workers: 0, disable_tqdm: true}
precision: float32
report: false
phases:
  - {name: all, unfreeze: all, learning_rate: 3.0e-3, num_train_epochs: 6}
"""
EXPORTED = {"onnx", "config.json", "preprocessor_config.json", "parity.json", "predict.py", "README.md"}


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A folder with photos of three classes, a checkpoint, and a run with its export."""
    home = tmp_path_factory.mktemp("export")
    for number, name in enumerate(CLASSES):
        for split in ("train", "validation", "test"):
            folder = home / "photos" / split / name
            folder.mkdir(parents=True)
            rng = np.random.default_rng([number, len(split)])
            for k in range(6):
                pixels = rng.integers(-40, 41, (44, 40, 3)) + np.roll((180, 80, 80), number)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k:03d}.png")
    tiny.save(home / "vit", "vit", 3)
    (home / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:  # contextlib.chdir is of Python 3.11
        patch.chdir(home)
        hfft.finetune(hfft.load_recipe("recipe.yaml"))
        assert main(["export", "runs/bugs", "--to", "onnx"]) == 0
    return home


@pytest.fixture
def home(origin, tmp_path, monkeypatch):
    shutil.copytree(origin, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(home):
    return home / "runs/bugs"


def reported(run):
    """Path and class probabilities of the test images, as the run measured them."""
    table = pd.read_parquet(run / "predictions.parquet")
    table = table[table["split"] == "test"]
    shares = table[[f"probability {name}" for name in CLASSES]].to_numpy()
    assert np.ptp(shares, axis=0).min() > 0.05  # else any image would stand for any other
    return [f"photos/{file}" for file in table["file"]], shares


def decoded(file):
    return decode(Path(file))


def softmax(logits):
    return torch.from_numpy(logits).softmax(dim=1).numpy()


def test_a_run_is_exported_and_answers_as_it_reported(run, capsys):
    shutil.rmtree(run / "onnx")
    assert main(["export", "runs/bugs", "--to", "onnx"]) == 0
    shown = capsys.readouterr().out
    assert "compared with torch on 18 test images of the run, in batches of 1, 2, 5, 10" in shown
    assert "the same class on top for 18 of 18" in shown
    assert {path.name for path in (run / "onnx").iterdir()} == EXPORTED
    parity = json.loads((run / "onnx/parity.json").read_text())
    assert parity["images"] == parity["same_top1"] == 18
    assert 0 < parity["largest_difference"] < 1e-4
    files, shares = reported(run)
    session = onnxruntime.InferenceSession(run / "onnx/onnx/model.onnx")
    processor = AutoImageProcessor.from_pretrained(run / "onnx")
    classify = hfft.Classifier.from_pretrained(run)
    pixels = np.stack([classify.transform(decoded(file)).numpy() for file in files])
    assert np.allclose(softmax(session.run(None, {"pixel_values": pixels})[0]), shares, atol=1e-5)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["labels"]) == list(CLASSES)
    assert json.loads(facts["processor"])["size"] == {"height": 32, "width": 32} == dict(processor.size)
    assert (facts["name"], facts["hfft_version"]) == ("bugs", hfft.__version__)
    assert AutoConfig.from_pretrained(run / "onnx").id2label == dict(enumerate(CLASSES))


def test_the_program_beside_it_needs_neither_torch_nor_hfft(run):
    files, shares = reported(run)
    block = "import sys; sys.modules |= dict.fromkeys(('torch', 'transformers', 'hfft', 'onnx')); "
    start = "import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", block + start, "runs/bugs/onnx/predict.py", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == files
    assert [row[1] for row in rows] == [CLASSES[k] for k in shares.argmax(axis=1)]
    assert np.allclose([float(row[2]) for row in rows], shares.max(axis=1), atol=2e-3)  # Pillow rounds otherwise


def test_an_earlier_export_is_replaced_when_asked_and_nothing_else_is_ever_lost(run, capsys):
    before = (run / "onnx/onnx/model.onnx").stat().st_ino
    (run / "onnx/__pycache__").mkdir()  # of predict.py
    assert main(["export", "runs/bugs"]) == 2
    assert "onnx: is there already; --overwrite replaces it" in capsys.readouterr().err
    assert main(["export", "runs/bugs", "--overwrite", "--most", "3"]) == 0
    assert (run / "onnx/onnx/model.onnx").stat().st_ino != before
    assert "on 3 test images of the run" in capsys.readouterr().out
    (run / "onnx/thesis.txt").write_text("years of work")
    (run / "onnx/onnx/model_quantized.onnx").write_text("of optimum")
    assert main(["export", "runs/bugs", "--overwrite"]) == 2
    assert "holds onnx/model_quantized.onnx, thesis.txt, which would be lost" in capsys.readouterr().err
    assert main(["export", "runs/bugs", "--overwrite", "--output", "runs/bugs/metrics.json"]) == 2
    assert "is a file" in capsys.readouterr().err
    assert {path.name for path in (run / "onnx").iterdir()} == EXPORTED | {"thesis.txt"}


def test_an_export_goes_where_a_link_leads_and_never_replaces_the_folder_one_is_in(run, home, monkeypatch, capsys):
    (home / "disk").mkdir()
    (home / "linked").symlink_to("disk")
    assert main(["export", "runs/bugs", "--output", "linked", "--most", "1"]) == 0
    assert {path.name for path in (home / "disk").iterdir()} == EXPORTED
    assert [path.name for path in home.iterdir() if path.is_symlink()] == ["linked"]
    (home / "here").mkdir()
    monkeypatch.chdir(home / "here")
    assert main(["export", str(run), "--output", "."]) == 2
    assert "--output .: is the folder that you are in" in capsys.readouterr().err


def test_a_run_whose_images_are_gone_asks_for_others(run, home, capsys):
    shutil.rmtree(run / "onnx")
    (home / "photos").rename(home / "moved")
    assert main(["export", "runs/bugs"]) == 2
    assert "give other images to check the export on with --images FOLDER" in capsys.readouterr().err
    assert not (run / "onnx").exists()
    assert main(["export", "runs/bugs", "--images", "moved/train/ant"]) == 0
    assert "on 6 images of ant" in capsys.readouterr().out


def test_a_broken_image_is_named(run, home, capsys):
    shutil.rmtree(run / "onnx")
    (home / "photos/test/ant/000.png").write_bytes(b"no image")
    assert main(["export", "runs/bugs", "--images", "photos/test"]) == 2
    assert "photos/test/ant/000.png: not an image" in capsys.readouterr().err
    assert [path.name for path in run.iterdir() if "onnx" in path.name] == []


def test_a_model_folder_is_compared_on_generated_images_and_it_says_so(home, capsys):
    assert main(["export", "vit", "--output", "somewhere/new"]) == 0
    assert "on 32 generated images" in capsys.readouterr().out
    assert {path.name for path in (home / "somewhere/new").iterdir()} == EXPORTED
    assert "# vit\n" in (home / "somewhere/new/README.md").read_text()


def test_an_adapter_is_exported_merged(home, capsys):
    model, processor = reopen("vit")
    torch.manual_seed(1)
    network = attach(model, AdapterSpec(method="lora", on="attention"))
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    save_adapter(network, processor, home / "adapter", base=str(home / "vit"), revision=None)
    assert main(["export", "adapter"]) == 0
    logits = {}
    for name, folder in (("plain", "vit"), ("adapter", "adapter")):
        classify = hfft.Classifier.from_pretrained(folder)
        pixels = classify.transform(decoded("photos/test/bee/001.png"))[None]
        logits[name] = classify.model(pixel_values=pixels).logits.detach().numpy()
    (exported,) = onnxruntime.InferenceSession("adapter/onnx/onnx/model.onnx").run(
        None, {"pixel_values": pixels.numpy()}
    )
    assert np.allclose(exported, logits["adapter"], atol=1e-5)
    assert np.abs(exported - logits["plain"]).max() > 1e-2


def test_a_network_that_onnxruntime_computes_otherwise_is_an_error_and_nothing_is_written(home, capsys):
    model = tiny.build("resnet", 3)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        norms[0].bias.fill_(1e6)  # of which float32 can't keep what the next layers amplify, in no two orders alike
        for norm in norms:
            norm.momentum = None
            norm.reset_running_stats()
        model.train()(pixel_values=torch.randn(16, 3, tiny.SIDE, tiny.SIDE))
    model.save_pretrained("shaky")
    tiny.processor().save_pretrained("shaky")
    before = sorted(os.listdir("shaky"))
    assert main(["export", "shaky", "--images", "photos"]) == 1
    error = capsys.readouterr().err
    assert "model.onnx has logits of photos/" in error
    assert "Nothing was written" in error
    assert "Traceback" not in error
    assert sorted(os.listdir("shaky")) == before


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(home, package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)  # as Python has it: an import of it fails
    assert main(["export", "vit"]) == 2
    assert capsys.readouterr().err == f'error: not installed: {package}; pip install "hfft[onnx]"\n'


def test_a_hub_id_needs_a_place(home, capsys):
    assert main(["export", "somebody/bugs"]) == 2
    assert "--output FOLDER" in capsys.readouterr().err


def test_the_program_names_what_it_cannot_read_and_goes_on(run):
    files, _ = reported(run)
    Path("bad\tname.png").write_bytes(b"no image")
    command = [sys.executable, "runs/bugs/onnx/predict.py", files[0], "bad\tname.png", "none.png", files[1]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == files[:2]
    first, second = done.stderr.splitlines()
    assert first == r"bad\x09name.png: not an image in any format that hfft reads"
    assert second.startswith("none.png: can't be read: ")
    for arguments, status in (([], 2), (["--help"], 0)):
        done = subprocess.run([*command[:2], *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == status
        assert "python predict.py IMAGE" in (done.stderr if status else done.stdout)


def test_the_program_ends_quietly_where_nobody_reads_on_and_names_a_model_that_is_gone(run, tmp_path):
    files, _ = reported(run)
    command = f"{sys.executable} runs/bugs/onnx/predict.py {files[0]} | true"
    assert subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stderr == ""
    alone = shutil.copy("runs/bugs/onnx/predict.py", tmp_path)
    done = subprocess.run([sys.executable, alone, files[0]], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"onnx/model\.onnx can't be opened: .*model\.onnx.*\n", done.stderr)


def test_the_folder_is_as_transformers_js_opens_it(run):
    """Read in the source of its version 4.3: where it looks for files, and that a browser wants quantized weights."""
    assert [path.name for path in (run / "onnx/onnx").iterdir()] == ["model.onnx"]
    config = json.loads((run / "onnx/config.json").read_text())
    assert (config["model_type"], config["transformers.js_config"]) == ("vit", {"dtype": "fp32"})
    settings = json.loads((run / "onnx/preprocessor_config.json").read_text())
    assert settings["image_processor_type"] == "ViTImageProcessor"
    assert "import { pipeline } from '@huggingface/transformers'" in (run / "onnx/README.md").read_text()


def test_a_processor_that_browsers_do_not_know_is_saved_as_one_that_they_do(home):
    tiny.save(home / "beit", "beit", 3)
    square = {"height": 32, "width": 32}
    BeitImageProcessor(size=square, do_center_crop=False, resample=3).save_pretrained("beit")
    assert export_onnx("beit", output=home / "out", most=2).missing == ()
    pixels = [
        AutoImageProcessor.from_pretrained(folder)(Image.open("photos/test/bee/001.png"), return_tensors="pt")
        for folder in ("beit", "out")
    ]
    assert (
        json.loads((home / "out/preprocessor_config.json").read_text())["image_processor_type"] == "ViTImageProcessor"
    )
    assert torch.allclose(pixels[0]["pixel_values"], pixels[1]["pixel_values"], atol=1e-4)


def test_what_the_folder_lacks_is_said(home):
    model, processor = reopen(tiny.save(home / "net", "vit", 3))
    save_model(model, fit_processor(processor, model.config, DataSpec(source="photos", fit="letterbox")), home / "net")
    export = export_onnx("net", output=home / "out", most=2)
    assert len(export.missing) == 2
    assert all("letterbox" in line for line in export.missing)
    assert all(line in (home / "out/README.md").read_text() for line in export.missing)
    assert not (home / "out/predict.py").exists()


def test_a_processor_that_keeps_an_images_shape_is_not_fixed_to_one(home):
    tiny.save(home / "net", "convnext", 3)
    ViTImageProcessor(size={"shortest_edge": 32}).save_pretrained("net")
    with pytest.raises(ModelError, match="a batch needs images of one size"):
        export_onnx("net", output=home / "out", images=home / "photos/test")  # which all have one shape
    assert not (home / "out").exists()


def test_names_are_text_in_what_an_export_says(home):
    name = "<b>x [y](z)"
    shutil.copytree("vit", name)
    model = tiny.build("vit", 3, id2label={0: "a\x1b[31m\té", 1: "b", 2: "c"}, label2id={"b": 1})
    with torch.no_grad():
        model.classifier.bias[:] = torch.tensor([50.0, 0, 0])
    model.save_pretrained(name)
    assert main(["export", name, "--output", "out"]) == 0
    assert (home / "out/README.md").read_text().startswith(r"# &lt;b&gt;x \[y\](z)")
    command = [sys.executable, "out/predict.py", "photos/test/bee/001.png"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout == "photos/test/bee/001.png\ta\\x1b[31m\\x09\\xe9\t1.0000\n", done.stderr
