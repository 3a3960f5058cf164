"""A recording's name: whatever changes a row, changes it."""

import dataclasses

import pytest
import tiny
import torch
import toy
from transformers import TrainingArguments

from hfft.recipe.augment import AugmentSpec
from hfft.recipe.spec import ReplaySpec
from hfft.replay.cache import ActivationCache, Origin, View
from hfft.replay.split_point import split_point_at

ONE = torch.zeros(1, 3, tiny.SIDE, tiny.SIDE)
ORIGIN = Origin({"train": "images"}, "processor", AugmentSpec(flip="both"), 0, {"torch": "1"})
DATA = toy.phase_data()


def name(tmp_path, origin=ORIGIN, *, engine="torch", path="classifier", view=0, model=None, **arguments):
    model = model or tiny.build("vit")
    options = {"output_dir": str(tmp_path), "use_cpu": True, "per_device_train_batch_size": 8, **arguments}
    frozen = DATA.frozen_pass(model, TrainingArguments(**options), "test")
    cache = ActivationCache(ReplaySpec(engine=engine), tmp_path, origin)
    return cache.key(frozen, split_point_at(model, path, ONE), View("train", view), "torch")


def other_weights():
    model = tiny.build("vit")
    with torch.no_grad():
        model.vit.embeddings.cls_token.add_(1)
    return model


class Inverted(type(tiny.build("vit"))):
    """Another network with the same config and weights."""


CHANGES = {
    "weights": lambda: {"model": other_weights()},
    "class": lambda: {"model": Inverted(tiny.build("vit").config).eval()},
    "attention": lambda: {"model": tiny.build("vit", attn_implementation="eager")},
    "split point": lambda: {"path": "vit.layers.2"},
    "view": lambda: {"view": 1},
    "images": lambda: {"origin": dataclasses.replace(ORIGIN, fingerprints={"train": "others"})},
    "processor": lambda: {"origin": dataclasses.replace(ORIGIN, processor="another")},
    "augmentation": lambda: {"origin": dataclasses.replace(ORIGIN, augment=AugmentSpec(flip="both", crop=(0.5, 1.0)))},
    "seed": lambda: {"origin": dataclasses.replace(ORIGIN, seed=1)},
    "versions": lambda: {"origin": dataclasses.replace(ORIGIN, versions={"torch": "2"})},
    "batch": lambda: {"per_device_train_batch_size": 16},
    "precision": lambda: {"bf16": True},
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_gives_another_name(what, tmp_path):
    assert name(tmp_path) == name(tmp_path)
    assert name(tmp_path, **CHANGES[what]()) != name(tmp_path)


@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_reduced_precision_gives_another_name(engine, tmp_path):
    before, products = name(tmp_path, engine=engine), torch.backends.mkldnn.matmul
    try:
        products.fp32_precision = "bf16"
        assert name(tmp_path, engine=engine) != before
    finally:
        products.fp32_precision = "none"
    assert name(tmp_path, engine=engine) == before


def test_the_last_bits_count_where_they_were_asked_for(tmp_path, monkeypatch):
    before = {engine: name(tmp_path, engine=engine) for engine in ("torch", "auto")}
    monkeypatch.setattr("hfft.system.machine.torch.get_num_threads", lambda: 64)
    assert name(tmp_path, engine="torch") != before["torch"]
    assert name(tmp_path, engine="auto", per_device_train_batch_size=16) == before["auto"]


def test_labels_and_the_head_give_the_same_name(tmp_path):
    other = tiny.build("vit", classes=5)
    other.vit.load_state_dict(tiny.build("vit").vit.state_dict())
    assert name(tmp_path, model=other) == name(tmp_path)
