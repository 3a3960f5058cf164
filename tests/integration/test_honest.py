"""What a run ships and what it reports beside: the phase that is best on validation images, and simple baselines."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import hfft
from hfft.cli import main

RECIPE = """
name: bugs
model: {checkpoint: vit}
data: {source: photos}
training: {per_device_train_batch_size: 8, dataloader_num_workers: 0, disable_tqdm: true, num_train_epochs: 4}
precision: float32
phases:
  - {name: head, unfreeze: head, learning_rate: 3.0e-2}
  - {name: all, unfreeze: all, learning_rate: 1.0e-3, num_train_epochs: 2}
"""
LORA = "  - {name: lora, adapter: {on: attention}, learning_rate: 1.0e-3}\n"
BAD = "phases.all.learning_rate=0.1"  # 100 times too high
SPLITS = {
    f"{split}/{name}": count
    for split, count in (("train", 10), ("validation", 4), ("test", 5))
    for name in ("ant", "bee", "cat")
}


@pytest.fixture
def workplace(tmp_path, photos, monkeypatch):
    photos(SPLITS)
    tiny.save(tmp_path / "vit", "vit", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(folder, pattern):
    return load_file(next(Path(folder).glob(pattern)))


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if "1-all" in args.output_dir and state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_phase_that_does_harm_is_not_shipped(workplace, capsys):
    assert main(["train", "recipe.yaml", BAD]) == 0
    shown = capsys.readouterr().err
    run = hfft.Run("runs/bugs")
    kept = run.metrics["kept"]
    assert (kept["number"], kept["phase"]) == (0, "head")
    assert kept["reason"].startswith("all did not improve validation accuracy (")
    assert kept["reason"].endswith(" after all): model/ is that of head")
    assert kept["reason"] in shown
    results = [json.loads((run.phase_dir(number) / "result.json").read_text()) for number in (0, 1)]
    head, harmed = (result["metrics"]["accuracy"] for result in results)
    assert head > harmed
    assert kept["values"] == {"head": {"accuracy": head}, "all": {"accuracy": harmed}}
    assert run.metrics["validation"]["accuracy"]["value"] == pytest.approx(head)
    shipped = weights("runs/bugs", "model/*.safetensors")
    assert equal(shipped, weights("runs/bugs", "0-head/checkpoint-*/*.safetensors"))
    assert not equal(shipped, weights("runs/bugs", "1-all/checkpoint-*/*.safetensors"))

    assert main(["train", "recipe.yaml", BAD, "name=last", "keep=last"]) == 0
    last = hfft.Run("runs/last").metrics
    assert last["kept"]["reason"] == "the recipe says keep: last: model/ is that of all"
    assert last["validation"]["accuracy"]["value"] == pytest.approx(harmed)


def test_a_stopped_run_keeps_the_same(workplace):
    whole = hfft.finetune(hfft.load_recipe("recipe.yaml", [BAD, "name=whole"]))
    recipe = hfft.load_recipe("recipe.yaml", [BAD, "name=parts"])
    for step in (3, 6):
        with pytest.raises(KeyboardInterrupt):
            hfft.finetune(recipe, callbacks=[Stop(step)])
    parts = hfft.finetune(recipe)
    assert equal(*(weights(run.folder, "model/*.safetensors") for run in (whole, parts)))
    assert whole.predictions.equals(parts.predictions)
    for key in ("kept", "validation", "test"):
        assert parts.metrics[key] == whole.metrics[key]
    (parts.folder / "metrics.json").unlink()  # as if it had been killed just before the end
    again = hfft.finetune(recipe)
    assert {**again.metrics, "seconds": None} == {**whole.metrics, "seconds": None}
    assert equal(*(weights(run.folder, "model/*.safetensors") for run in (whole, again)))


@pytest.mark.parametrize("stop", [False, True], ids=["at once", "stopped"])
def test_an_adapter_in_the_middle_is_shipped_as_if_it_were_the_last(stop, workplace):
    """Merged in model/ and apart in adapter/, though a phase that was not better has changed the network since."""
    content = RECIPE.partition("  - {name: all")[0].replace("3.0e-2", "1.0e-6") + LORA.replace("1.0e-3", "3.0e-2")
    Path("short.yaml").write_text(content)
    Path("long.yaml").write_text(content + RECIPE[RECIPE.index("  - {name: all") :].replace("1.0e-3", "0.1"))
    short = hfft.finetune(hfft.load_recipe("short.yaml", ["name=short"]))
    recipe = hfft.load_recipe("long.yaml", ["name=long"])
    if stop:

        class StopAll(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if "2-all" in args.output_dir:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            hfft.finetune(recipe, callbacks=[StopAll()])
    long = hfft.finetune(recipe)
    assert (short.metrics["kept"]["phase"], long.metrics["kept"]["phase"]) == ("lora", "lora")
    for name in ("model", "adapter"):
        assert equal(*(weights(run.folder, f"{name}/*.safetensors") for run in (short, long))), name
    assert short.predictions.equals(long.predictions)
    test = [str(path) for path in sorted(Path("photos/test").rglob("*.png"))]
    adapted, merged = (
        hfft.Classifier.from_pretrained(long.folder / name)(test, top=3) for name in ("adapter", "model")
    )
    for one, other in zip(adapted, merged, strict=True):
        assert one.top == pytest.approx(other.top, abs=1e-5)


def test_an_adapter_that_did_not_help_leaves_no_folder(workplace):
    content = RECIPE.partition("  - {name: all")[0] + LORA.replace("1.0e-3", "1.0")
    Path("harm.yaml").write_text(content)
    run = hfft.finetune(hfft.load_recipe("harm.yaml"))
    assert run.metrics["kept"]["phase"] == "head"
    assert not (run.folder / "adapter").exists()
    assert equal(weights(run.folder, "model/*.safetensors"), weights(run.folder, "0-head/checkpoint-*/*.safetensors"))
    apart = hfft.finetune(hfft.load_recipe("harm.yaml", ["name=apart", "phases.lora.adapter.merge=false"]))
    assert apart.model_dir == Path("runs/apart/adapter")
    assert apart.metrics["kept"]["reason"].endswith(
        "but adapter.merge: false asks for the adapter: adapter/ is that of lora"
    )


def test_without_validation_images_the_last_phase_is_kept(workplace):
    run = hfft.finetune(hfft.load_recipe("recipe.yaml", [BAD, "data.splits.validation=null"]))
    assert run.metrics["kept"]["reason"] == "no phase was measured on validation images: model/ is that of all"
    assert equal(weights(run.folder, "model/*.safetensors"), weights(run.folder, "1-all/checkpoint-*/*.safetensors"))
