"""A model object in the place of the checkpoint: what is written, named and reported is what was trained."""

import json

import pushable
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import hfft
from hfft.errors import ModelError, RunError, TrainingError
from hfft.training import model_selection

HEAD = {"name": "head", "unfreeze": "head", "learning_rate": 1e-2}


@pytest.fixture
def place(tmp_path):
    pushable.make_photos(tmp_path / "photos")
    tiny.save(tmp_path / "vit", "vit", classes=10)
    return tmp_path


def given(seed=3, dtype=torch.float32, **changes):
    """A classifier whose body isn't the checkpoint's."""
    model = tiny.build("vit", 2, **changes)
    torch.manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.5 * torch.randn_like(value))
    return model.to(dtype)


def recipe(place, **changes):
    phases = changes.pop("phases", [HEAD])
    content = pushable.recipe(place, phases=phases, report=False, label_hints=False, retain={"measure": False})
    return hfft.load_recipe({**content, **changes})


def finetune(place, model, **changes):
    return hfft.finetune(recipe(place, **changes), model=model)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("head_first", [False, True])
def test_an_adapter_sits_on_the_model_that_was_given(place, merge, head_first):
    lora = {"name": "lora", "adapter": {"on": "attention", "merge": merge}, "learning_rate": 1e-2}
    run = finetune(place, given(), phases=[HEAD, lora] if head_first else [lora], keep="last")
    last = json.loads((run.phase_dir(1 if head_first else 0) / "result.json").read_text())
    assert run.metrics["validation"]["log_loss"]["value"] == pytest.approx(last["metrics"]["log_loss"], abs=1e-4)
    base = load_file(run.folder / "given" / "model.safetensors")
    expected = given().vit.layernorm.weight
    assert torch.equal(base["vit.layernorm.weight"], expected)
    if merge:
        pixels = torch.randn(2, 3, tiny.SIDE, tiny.SIDE)
        apart, merged = (hfft.Classifier.from_pretrained(run.folder / name).model for name in ("adapter", "model"))
        with torch.no_grad():
            torch.testing.assert_close(apart(pixel_values=pixels).logits, merged(pixel_values=pixels).logits)


def test_a_half_precision_model_trains_in_float32(place):
    model = given(dtype=torch.bfloat16)
    before = {name: value.float().clone() for name, value in model.state_dict().items()}
    everything = {"name": "all", "unfreeze": "all", "learning_rate": 1e-5, "num_train_epochs": 3}
    finetune(place, model, phases=[everything])
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert (value != before[name]).float().mean() > 0.99


def test_a_folder_that_answers_otherwise_fails_the_run(place, monkeypatch):
    lora = {"name": "lora", "adapter": {"on": "attention", "merge": False}, "learning_rate": 1e-2}
    monkeypatch.setattr(model_selection, "_base", lambda recipe, number, folder: (str(place / "vit"), None))
    with pytest.raises(TrainingError, match="isn't the one that was trained"):
        finetune(place, given(), phases=[lora])
    assert not (place / "runs" / "cells" / "metrics.json").exists()


class Stop(TrainerCallback):
    """Ends the second phase in its first step, as a killed process does."""

    def on_step_end(self, args, state, control, **kwargs):
        if "1-last" in args.output_dir:
            raise RuntimeError("stopped")


def test_a_run_goes_on_and_stays_with_the_model_that_it_began_with(place):
    asked = recipe(place, phases=[HEAD, {"name": "last", "unfreeze": {"blocks": 1}, "learning_rate": 1e-3}])
    with pytest.raises(RuntimeError, match="stopped"):
        hfft.finetune(asked, model=given(), callbacks=[Stop()])
    for other in (given(seed=4), None):
        with pytest.raises(RunError, match="began with a model object"):
            hfft.finetune(asked, model=other)
    model = given()
    run = hfft.finetune(asked, model=model)
    assert hfft.finetune(asked, model=model).folder == run.folder  # what the run made of it
    assert hfft.finetune(asked, model=given()).folder == run.folder
    with pytest.raises(RunError, match="made from another model"):
        hfft.finetune(asked, model=given(seed=4))


def test_a_model_that_would_not_open_again_is_refused_before_any_work(place):
    model = given()
    model.classifier = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 2))
    with pytest.raises(ModelError, match=r"classifier\.0\.weight"):
        finetune(place, model)
    assert not (place / "runs").exists()
