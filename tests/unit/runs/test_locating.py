"""What hfft wrote, named as a checkpoint: run folders, phases' folders and weights, adapters; here and moved."""

import json
import shutil

import pytest
import tiny
import torch

from hfft.commands.plan import with_weights_found
from hfft.errors import ModelError
from hfft.model.adapters import attach, open_adapter, save_adapter
from hfft.model.checkpoint import load_checkpoint, load_original, reopen
from hfft.recipe.loading import load_recipe
from hfft.recipe.spec import AdapterSpec, ModelSpec
from hfft.runs.locating import files_fingerprint, processor_place, weights_place

LABELS = ("ant", "bee", "cow")
RECIPE = """
name: r
model: {checkpoint: base}
data: {source: photos}
phases:
  - {name: last, unfreeze: {blocks: 1}}
  - {name: lora, adapter: {on: attention, merge: false}}
"""


def changed(model, seed):
    """The model with all of its weights a little different."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def adapt(folder, base):
    """An adapter folder that sits on a folder."""
    plain, processor = reopen(base)
    adapted = attach(plain, AdapterSpec())
    save_adapter(changed(adapted, 1), processor, folder, base=str(base.resolve()), revision=None)


def opened(run):
    """The network of a run's adapter, merged."""
    return open_adapter(run / "adapter")[0]


def first_phase(run):
    return load_checkpoint(ModelSpec(checkpoint=str(run / "0-last/checkpoint-6")), LABELS)[0]


def same(one, other, without="none"):
    """Whether all tensors of two networks are equal."""
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    return all(one[name].equal(other[name]) for name in one if without not in name)


@pytest.fixture
def run(tmp_path):
    """A finished run whose adapter sits on what its first phase trained."""
    folder = tmp_path / "runs/r"
    first = tiny.save(folder / "0-last/checkpoint-6", "vit", classes=2)
    changed(reopen(first)[0], 0).save_pretrained(first)
    adapt(folder / "adapter", first)
    (first / "preprocessor_config.json").unlink()  # as the Trainer leaves it
    for phase, best in (("0-last", "checkpoint-6"), ("1-lora", "checkpoint-9")):
        (folder / phase).mkdir(exist_ok=True)
        (folder / phase / "plan.json").write_text("{}")
        (folder / phase / "result.json").write_text(json.dumps({"checkpoint": best}))
    (folder / "1-lora/checkpoint-9").mkdir()
    shutil.copy(folder / "adapter/adapter_config.json", folder / "1-lora/checkpoint-9")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "metrics.json").write_text("{}")
    return folder


def test_a_run_stands_for_its_result_and_a_phase_for_its_best_weights(run):
    assert weights_place(str(run)) == str(run / "adapter")
    assert weights_place(str(run / "0-last")) == str(run / "0-last/checkpoint-6")
    for itself in ("owner/model", str(run / "adapter"), str(run / "0-last/checkpoint-6")):
        assert weights_place(itself) == itself
    tiny.save(run / "1-lora/merged", "vit", classes=2)
    assert weights_place(str(run / "1-lora")) == str(run / "1-lora/merged")
    content = {"name": "next", "data": {"source": "photos"}, "phases": [{"name": "head"}]}
    recipe = with_weights_found(load_recipe({**content, "model": {"checkpoint": str(run)}}))
    assert recipe.model.checkpoint == str(run / "adapter")


def test_what_has_no_weights_of_its_own_is_refused(run):
    for name in ("1-lora", "1-lora/checkpoint-9"):
        with pytest.raises(ModelError, match="checkpoint-9 holds the adapter of a phase"):
            weights_place(str(run / name))
    (run / "0-last/result.json").unlink()
    (run / "metrics.json").unlink()
    for name, what in (("0-last", "phase"), (".", "run")):
        with pytest.raises(ModelError, match=f"this {what} is not finished"):
            weights_place(str(run / name))


def test_a_phases_weights_take_the_processor_of_their_run(run):
    first = str(run / "0-last/checkpoint-6")
    assert processor_place(first) == str(run / "adapter")
    assert processor_place(str(run / "adapter")) == str(run / "adapter")
    assert processor_place("owner/model") == "owner/model"
    model, processor = load_checkpoint(ModelSpec(checkpoint=first), LABELS)
    assert processor.to_dict() == open_adapter(run / "adapter")[1].to_dict()
    assert model.config.num_labels == 3


def test_an_adapter_folder_is_a_checkpoint_with_a_new_head(run):
    merged = opened(run)
    spec = ModelSpec(checkpoint=str(run / "adapter"))
    model, processor = load_checkpoint(spec, LABELS)
    assert same(model, merged, without="classifier")
    assert model.classifier.weight.shape[0] == 3
    assert not model.classifier.weight.any()
    assert processor.size == tiny.processor().size
    original = load_original(spec)
    assert original is not None
    assert same(original, merged)
    assert not same(model, first_phase(run), without="classifier")


def test_a_moved_run_opens_its_own_adapter(run, tmp_path):
    before = opened(run)
    moved = tmp_path / "elsewhere/s"
    shutil.copytree(run, moved)
    changed(first_phase(run), 3).save_pretrained(run / "0-last/checkpoint-6")  # the old place holds another run now
    assert same(opened(moved), before)
    shutil.rmtree(run)
    assert same(opened(moved), before)


def test_an_adapter_on_another_runs_weights_stays_on_them(run, tmp_path):
    """Though a phase of its own has their name: only head phases came before it."""
    other = tmp_path / "runs/other"
    shutil.copytree(run / "0-last", other / "0-last")
    (other / "recipe.yaml").write_text(RECIPE.replace("{name: last, unfreeze: {blocks: 1}}", "{name: last}"))
    shutil.copytree(run / "adapter", other / "adapter")
    changed(first_phase(other), 3).save_pretrained(other / "0-last/checkpoint-6")
    assert same(opened(run), opened(other))


def test_files_of_a_checkpoint(tmp_path):
    folder = tiny.save(tmp_path / "vit", "vit")
    first = files_fingerprint(str(folder))
    (folder / "notes.md").write_text("mine")
    shutil.copytree(folder, tmp_path / "copy")
    assert files_fingerprint(str(tmp_path / "copy")) == first
    (folder / "preprocessor_config.json").write_text("{}")
    assert files_fingerprint(str(folder)) != first
    assert files_fingerprint("owner/model") is None
