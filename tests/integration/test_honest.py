"""What a run ships and what it reports beside: the phase that is best on validation images, and simple baselines."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, TrainerCallback

import hfft
from hfft.cli import main
from hfft.data.images.decoding import decode
from hfft.data.images.transforms import evaluation_transform
from hfft.replay.replay import Replay

RECIPE = """
name: bugs
model: {checkpoint: vit}
data: {source: photos}
training: {per_device_train_batch_size: 8, dataloader_num_workers: 0, disable_tqdm: true, num_train_epochs: 4}
precision: float32
report: false
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
def workplace(work_with):
    return work_with(RECIPE, SPLITS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


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
    for key in ("kept", "baselines", "validation", "test"):
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


def accuracy(run, name, split="test"):
    return run.metrics["baselines"][name][split]["accuracy"]["value"]


def model_of(folder):
    """A checkpoint with its predictions of an image folder's images, by transformers alone."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    transform = evaluation_transform(tiny.processor())
    files = [path for name in ("ant", "bee", "cat") for path in sorted(Path("photos/test", name).glob("*.png"))]
    pixels = torch.stack([transform(decode(str(path))) for path in files])
    labels = torch.tensor([model.config.label2id[path.parent.name] for path in files])
    with torch.no_grad():
        return model(pixel_values=pixels).logits, labels


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_baselines_are_beside_the_result(mode, workplace, capsys):
    more = ["replay.mode=" + mode, "phases.all.unfreeze={blocks: 2}", "keep=last", "training.num_train_epochs=8"]
    assert main(["train", "recipe.yaml", *more]) == 0
    run = hfft.Run("runs/bugs")
    baselines = run.metrics["baselines"]
    assert list(baselines) == ["majority", "knn", "head"]
    for row in baselines.values():
        assert set(row) == {"about", "validation", "test"}
        assert row["test"].keys() == run.metrics["test"].keys()
    assert baselines["majority"]["about"].startswith("always ant, the most frequent class")
    assert accuracy(run, "majority") == pytest.approx(1 / 3)
    assert "of 30 training images, by cosine similarity" in baselines["knn"]["about"]
    assert accuracy(run, "knn") > 2 / 3  # the classes differ in colour
    logits, labels = model_of(next(run.phase_dir(0).glob("checkpoint-*")))
    head = baselines["head"]["test"]
    assert head["accuracy"]["value"] == pytest.approx((logits.argmax(dim=1) == labels).float().mean().item())
    assert head["log_loss"]["value"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-4
    )
    assert head != run.metrics["test"]
    result = json.loads((run.phase_dir(0) / "result.json").read_text())
    assert accuracy(run, "head", "validation") == pytest.approx(result["metrics"]["accuracy"])
    told = capsys.readouterr().err
    assert f"{accuracy(run, 'knn'):.4f} nearest neighbours, {accuracy(run, 'head'):.4f} head phase" in told


def test_a_head_phase_alone_is_its_own_baseline(workplace):
    run = hfft.finetune(hfft.load_recipe("recipe.yaml", ["phases=[{name: head, num_train_epochs: 3}]"]))
    head = run.metrics["baselines"]["head"]
    assert head.pop("about") == "the model after head, which is the result"
    assert head == {split: run.metrics[split] for split in ("validation", "test")}


def test_recordings_of_any_first_phase_serve_the_neighbours(workplace):
    """The same neighbours whether features come from what entered the head, earlier blocks, or the images."""
    found = []
    for name, phase in (
        ("head", "{name: p, unfreeze: head}"),
        ("blocks", "{name: p, unfreeze: {blocks: 2}}"),
        ("images", "{name: p, unfreeze: all}"),
    ):
        more = [f"phases=[{phase}]", f"name={name}", "training.num_train_epochs=6"]
        run = hfft.finetune(hfft.load_recipe("recipe.yaml", more))
        found.append(run.metrics["baselines"]["knn"]["test"])
        assert ("head" in run.metrics["baselines"]) == (name == "head")
    assert found[0] == found[1] == found[2]


def test_recordings_are_found_again_where_they_are(workplace, monkeypatch):
    seen = []
    recorded = Replay.recorded
    monkeypatch.setattr(Replay, "recorded", lambda *a: seen.append(recorded(*a)) or seen[-1])
    hfft.finetune(hfft.load_recipe("recipe.yaml", ["data.augment={flip: true}", "label_hints=false"]))
    assert [len(found.rows) for found in seen] == [30]
    about = hfft.Run("runs/bugs").metrics["baselines"]["knn"]["about"]
    assert "30 training images as augmented in the first epoch" in about


@pytest.mark.slow
def test_a_short_run_is_not_made_long_by_its_baselines(workplace):
    short = ["phases=[{name: all, unfreeze: all, max_steps: 1}]", "training.per_device_train_batch_size=2"]
    run = hfft.finetune(hfft.load_recipe("recipe.yaml", short))
    knn = run.metrics["baselines"]["knn"]
    assert knn == {
        "about": "left out: a pass over the training images would have taken more than a quarter of this run"
    }
    off = ["replay.mode=off", "phases.all.max_steps=1", "phases.head.max_steps=1", "name=off", "keep=last"]
    run = hfft.finetune(hfft.load_recipe("recipe.yaml", off))
    head = run.metrics["baselines"]["head"]
    assert set(head) == {"about", "validation"}
    assert head["about"].startswith("the model after head; without another pass over the test images")
