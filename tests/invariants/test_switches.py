"""Switches that change memory or speed alone end in the weights of the run without them."""

import pushable
import pytest
import tiny
import torch
from safetensors.torch import load_file

import hfft

LORA = {"name": "lora", "adapter": {"method": "lora", "on": "attention", "r": 2}}
LAST = {"name": "last", "unfreeze": {"blocks": 2}}
RECOMPUTED = {"activation_checkpointing": True}
SWITCHES = {
    "recomputed": RECOMPUTED,
    "reentrant": {**RECOMPUTED, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    "other dropout": {**RECOMPUTED, "activation_checkpointing_kwargs": {"preserve_rng_state": False}},
    "every second layer": {**RECOMPUTED, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
    "workers": {"dataloader_num_workers": 2},
    "accumulated evaluation": {"eval_accumulation_steps": 1},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("switches")
    pushable.make_photos(place / "photos")
    tiny.save(place / "vit", "vit", classes=10)  # with dropout
    tiny.save(place / "swin", "swin", classes=10)
    return place


@pytest.fixture(scope="module")
def weights(place):
    known = {}

    def find(family, phases, replay, **switches):
        key = repr((family, phases, replay, switches))
        if key not in known:
            content = pushable.recipe(
                place,
                name=f"run{len(known)}",
                checkpoint=str(place / family),
                phases=phases,
                replay={"mode": replay},
                report=False,
                label_hints=False,
                retain={"measure": False},
            )
            content["training"] |= {"max_steps": 4, "learning_rate": 1e-2, **switches}
            run = hfft.finetune(hfft.load_recipe(content))
            known[key] = load_file(run.model_dir / "model.safetensors")
        return known[key]

    return find


def check(weights, family, phases, replay, switch):
    plain, switched = weights(family, phases, replay), weights(family, phases, replay, **SWITCHES[switch])
    assert all(torch.equal(value, switched[name]) for name, value in plain.items())


@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_end_in_the_same_weights(weights, switch):
    check(weights, "vit", [LAST], "off", switch)


@pytest.mark.parametrize(
    ("family", "phase", "replay"), [("vit", LORA, "off"), ("swin", LAST, "off"), ("vit", LAST, "auto")]
)
def test_recomputed_activations_give_released_blocks_and_adapters_their_gradient(weights, family, phase, replay):
    check(weights, family, [phase], replay, "reentrant")
