"""The quick start's real input: 2,624 cells and ImageNet weights from packages."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

import hfft
from hfft.data.images.decoding import decode_row
from hfft.data.images.transforms import evaluation_transform
from hfft.data.sources.reading import load_data
from hfft.recipe.spec import DataSpec

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/prepare_quickstart.py"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    spec = importlib.util.spec_from_file_location("prepare_quickstart", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    sys.modules["prepare_quickstart"] = script
    spec.loader.exec_module(script)
    script.prepare_data(folder / "data")
    script.prepare_checkpoint(folder / "checkpoint")
    return folder


@pytest.fixture(scope="module")
def images(prepared):
    return load_data(DataSpec(source=str(prepared / "data")), 0)


def test_the_split_is_60_15_25_and_complete(images):
    sizes = {split: len(rows) for split, rows in images.splits.items()}
    assert sum(sizes.values()) == 2624
    for split, share in (("train", 0.60), ("validation", 0.15), ("test", 0.25)):
        assert sizes[split] == pytest.approx(2624 * share, abs=2)
        # 821 of 2,624 cells have a defect probability of 2/3 or 1 (the data set's own labels.csv)
        assert images.counts(split)["defective"] == pytest.approx(821 * share, abs=4)
    names = [Path(file).name for rows in images.splits.values() for file in rows["file"]]
    assert len(set(names)) == 2624


def test_classes_follow_the_probability_in_the_package(images):
    import elpv_dataset

    labels = Path(elpv_dataset.__file__).parent / "data" / "labels.csv"
    defective = {
        Path(line.split()[0]).name for line in labels.read_text().splitlines() if float(line.split()[1]) >= 0.5
    }
    for rows in images.splits.values():
        for file in rows["file"]:
            assert ("/defective/" in file) == (Path(file).name in defective)


def test_the_checkpoint_is_a_transformers_classifier_of_1000_classes(prepared):
    model = AutoModelForImageClassification.from_pretrained(prepared / "checkpoint")
    assert len(model.state_dict()) == 296
    assert model.config.num_labels == 1000
    assert model.config.architecture == "tf_efficientnet_lite0"
    processor = AutoImageProcessor.from_pretrained(prepared / "checkpoint")
    config = processor.data_config
    assert (config["mean"], config["std"], config["interpolation"]) == ((0.5,) * 3, (0.5,) * 3, "bicubic")
    assert config["input_size"] == (3, 224, 224)
    assert not list((prepared / "checkpoint").glob("*.pth"))


def test_a_second_preparation_changes_nothing(prepared):
    def stamps():
        return {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}

    before = stamps()
    command = [sys.executable, SCRIPT, "--data-dir", prepared / "data", "--checkpoint-dir", prepared / "checkpoint"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    assert stamps() == before
    assert "CC BY-NC-SA" in done.stdout


@pytest.mark.slow
def test_the_weights_are_in_the_right_places(prepared, images):
    """A linear probe on the features of small cells tells them apart; on random weights it does so less.

    With two layers of one shape exchanged, the area under the curve was seen to fall from 0.88 to 0.79.
    """
    transform = evaluation_transform(AutoImageProcessor.from_pretrained(prepared / "checkpoint"))
    splits = {}
    for split, step in (("train", 4), ("test", 2)):
        rows = images.splits[split].select(range(0, len(images.splits[split]), step))
        pixels = torch.stack([transform(decode_row(row)) for row in rows])
        small = torch.nn.functional.interpolate(pixels, size=(96, 96), mode="bilinear", antialias=True)
        splits[split] = small, np.asarray(rows["label"])

    @torch.inference_mode()
    def probe(model):
        model = model.eval().to(memory_format=torch.channels_last)
        features = {
            split: torch.cat(
                [
                    model.timm_model.forward_head(model.timm_model.forward_features(batch), pre_logits=True)
                    for batch in pixels.split(16)
                ]
            ).numpy()
            for split, (pixels, _) in splits.items()
        }
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.001, max_iter=2000))
        classifier.fit(features["train"], splits["train"][1])
        return roc_auc_score(splits["test"][1], classifier.decision_function(features["test"]))

    pretrained = AutoModelForImageClassification.from_pretrained(prepared / "checkpoint")
    torch.manual_seed(0)
    untrained = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(prepared / "checkpoint"))
    assert probe(pretrained) > 0.85
    assert probe(untrained) < 0.80


@pytest.mark.slow
def test_the_recipe_runs_on_the_real_network(prepared, tmp_path):
    """Both phases, on a few images: every frozen byte of a network full of BatchNorm stays."""
    few = tmp_path / "few"
    for split in ("train", "validation", "test"):
        for label in ("functional", "defective"):
            (few / split / label).mkdir(parents=True)
            for path in sorted((prepared / "data" / split / label).iterdir())[:8]:
                (few / split / label / path.name).symlink_to(path)
    overrides = [f"model.checkpoint={prepared / 'checkpoint'}", f"data.source={few}", f"output_dir={tmp_path}"]
    run = hfft.finetune(hfft.load_recipe(ROOT / "recipes/quickstart.yaml", overrides))
    results = [json.loads((run.phase_dir(number) / "result.json").read_text()) for number in (0, 1)]
    # 49 BatchNorms with 3 buffers each, 98 + 50 = 149 parameters; the head phase trains 2 of them
    assert results[0]["frozen"]["tensors"] == 296 - 2
    assert 147 < results[1]["frozen"]["tensors"] < 294
    assert [result["frozen"]["changed"] for result in results] == [0, 0]
    assert hfft.Classifier.from_pretrained(run.model_dir).classes == ("defective", "functional")
    assert run.predictions["split"].value_counts().to_dict() == {"validation": 16, "test": 16}
