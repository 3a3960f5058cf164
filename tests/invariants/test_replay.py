"""Replay changes the time, not the result."""

import dataclasses
import json
import logging
from functools import partial

import numpy as np
import pytest
import tiny
import torch
import toy
from transformers import TrainerCallback, TrainingArguments

from hfft.recipe.augment import AugmentSpec
from hfft.recipe.spec import AdapterSpec, PhaseSpec, ReplaySpec
from hfft.replay import cache
from hfft.training.losses import ImageLoss
from hfft.training.phase_data import PhaseRun
from hfft.training.phases import run_phase

EXACT = ReplaySpec(mode="force", engine="torch", views=3)  # as many as epochs
FLIPS = AugmentSpec(flip="both")


def train(family, folder, *, replay, phases, augment=None, data=None, **changes):
    """Weights after some phases, one from the other."""
    model = tiny.build(family, **changes)
    specs = [PhaseSpec(name=f"p{number}", **phase) for number, phase in enumerate(phases)]
    feeding = None if replay is None else toy.replay_of(replay, folder / "recordings", specs, augment)
    data = data or toy.phase_data(train=32, validation=16, augment=augment)
    for number, spec in enumerate(specs):
        phase = PhaseRun(number=number, spec=spec, folder=folder / str(number), title=spec.name, seed=0)
        model, _ = run_phase(model, phase, data, replay=feeding)
    return model.state_dict()


def arguments(**more):
    return {"num_train_epochs": 3, "learning_rate": 1e-2, "dataloader_num_workers": 0, **more}


CHECKPOINTS = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__annotations__
)
TWO = (
    {"unfreeze": "head", "arguments": arguments()},
    {"unfreeze": {"blocks": 2}, "arguments": arguments(learning_rate=1e-3)},
)


@pytest.mark.parametrize(
    "family", ["vit", "convnext", "resnet", "swin", "efficientnet", "mobilenet_v2", "timm_wrapper"]
)
@pytest.mark.parametrize("augment", [None, FLIPS], ids=["still", "flipped"])
def test_the_weights_are_those_of_the_plain_run(family, augment, tmp_path):
    """Two phases; as many views as epochs; dropout in what trains."""
    plain = train(family, tmp_path / "plain", replay=None, phases=TWO, augment=augment)
    replayed = train(family, tmp_path / "replayed", replay=EXACT, phases=TWO, augment=augment)
    before = tiny.build(family).state_dict()
    assert sum(not torch.equal(plain[name], before[name]) for name in before) > 4
    for name in plain:
        assert torch.equal(replayed[name], plain[name]), name


@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_with_an_adapter(family, tmp_path):
    phases = [{"adapter": AdapterSpec(on="all", blocks=2, lora_dropout=0.1, r=2), "arguments": arguments()}]
    plain = train(family, tmp_path / "plain", replay=None, phases=phases)
    replayed = train(family, tmp_path / "replayed", replay=EXACT, phases=phases)
    assert all(torch.equal(replayed[name], plain[name]) for name in plain)


def test_with_checkpointed_activations(tmp_path):
    """A later phase is replayed, too, though a whole stage is computed again in its backward pass."""
    checkpointed = tuple({**phase, "arguments": {**phase["arguments"], CHECKPOINTS: True}} for phase in TWO)
    plain = train("swin", tmp_path / "plain", replay=None, phases=TWO)
    replayed = train("swin", tmp_path / "replayed", replay=EXACT, phases=checkpointed)
    assert [json.loads((tmp_path / f"replayed/{k}/replay.json").read_text())["engine"] for k in (0, 1)] == [
        "torch"
    ] * 2
    assert all(torch.equal(replayed[name], plain[name]) for name in plain)


@pytest.mark.parametrize("average", [{"ema": 0.9}, {"last": 2}, {"soup": 3}], ids=str)
def test_with_averaged_weights(average, tmp_path):
    phases = [{**phase, "average": average} for phase in TWO]
    plain = train("vit", tmp_path / "plain", replay=None, phases=phases)
    replayed = train("vit", tmp_path / "replayed", replay=EXACT, phases=phases)
    assert all(torch.equal(replayed[name], plain[name]) for name in plain)


def test_with_weighted_shares_and_a_sampler(tmp_path):
    """Focal loss on shares of classes with weights, images drawn by chance."""
    rng = np.random.default_rng(0)
    shares = rng.dirichlet((1, 1), 30) * rng.uniform(0.5, 2, (30, 1))
    data = dataclasses.replace(
        toy.phase_data(train=30, validation=16, augment=FLIPS, targets=shares.astype(np.float32)),
        loss=partial(ImageLoss, gamma=2.0),
        chances=torch.from_numpy(rng.uniform(0.1, 1, 30)),
    )
    plain = train("vit", tmp_path / "plain", replay=None, phases=TWO, augment=FLIPS, data=data)
    replayed = train("vit", tmp_path / "replayed", replay=EXACT, phases=TWO, augment=FLIPS, data=data)
    assert all(torch.equal(replayed[name], plain[name]) for name in plain)
    usual = train("vit", tmp_path / "usual", replay=EXACT, phases=TWO, augment=FLIPS)
    assert not torch.equal(replayed["classifier.weight"], usual["classifier.weight"])


def counted(monkeypatch):
    """Images that are computed for recordings from now on."""
    computed = []
    record = cache.record_activations

    def count(*arguments, **options):
        computed.append(record(*arguments, **options))
        return computed[-1]

    monkeypatch.setattr(cache, "record_activations", count)
    return computed


def test_one_pass_serves_the_whole_recipe_and_later_runs(tmp_path, monkeypatch):
    computed = counted(monkeypatch)
    first = train("vit", tmp_path / "run", replay=EXACT, phases=TWO)
    assert sum(computed) == 32 + 16  # training and validation images, once, for both phases
    for number in range(2):
        (tmp_path / "run" / str(number)).rename(tmp_path / f"before {number}")
    again = train("vit", tmp_path / "run", replay=EXACT, phases=TWO)
    assert sum(computed) == 32 + 16
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_as_many_passes_as_views(tmp_path, monkeypatch):
    computed = counted(monkeypatch)
    two_views = ReplaySpec(mode="force", engine="torch", views=2)
    train("vit", tmp_path / "run", replay=two_views, phases=TWO, augment=FLIPS)
    assert sum(computed) == 2 * 32 + 16  # three epochs take turns with two views


def test_what_changed_weights_compute_comes_from_the_nearest_recording(tmp_path, monkeypatch, caplog):
    """The first phase trains two blocks in front of the second phase's head; what enters them stayed."""
    caplog.set_level(logging.INFO)
    phases = (
        {"unfreeze": {"blocks": 2}, "arguments": arguments()},
        {"unfreeze": "head", "arguments": arguments()},
    )
    computed = counted(monkeypatch)
    plain = train("vit", tmp_path / "plain", replay=None, phases=phases)
    replayed = train("vit", tmp_path / "run", replay=EXACT, phases=phases)
    assert sum(computed) == 2 * (32 + 16)
    assert "replays what enters classifier, computed from what enters vit.layers.2" in caplog.text
    assert all(torch.equal(replayed[name], plain[name]) for name in plain)


def test_a_recording_with_a_file_cut_short_is_made_anew(tmp_path, monkeypatch, caplog):
    computed = counted(monkeypatch)
    first = train("vit", tmp_path / "run", replay=EXACT, phases=TWO)
    files = (tmp_path / "run/recordings").rglob("*.safetensors")
    damaged = max(files, key=lambda path: path.stat().st_size)
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    for number in range(2):
        (tmp_path / "run" / str(number)).rename(tmp_path / f"before {number}")
    again = train("vit", tmp_path / "run", replay=EXACT, phases=TWO)
    assert sum(computed) == 48 + 32  # the training images, at one of two split points
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert "damaged (" in caplog.text
    assert "recorded anew" in caplog.text


def test_a_full_disk_ends_in_the_plain_run(tmp_path, monkeypatch, caplog):
    plain = train("vit", tmp_path / "plain", replay=None, phases=TWO)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hfft.replay.store.write_file", full)
    replayed = train("vit", tmp_path / "run", replay=EXACT, phases=TWO)
    assert all(torch.equal(replayed[name], plain[name]) for name in plain)
    assert "recording its activations failed: [Errno 28] No space left on device" in caplog.text


def test_too_small_a_budget_ends_in_the_plain_run(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    plain = train("vit", tmp_path / "plain", replay=None, phases=TWO)
    small = ReplaySpec(mode="force", engine="torch", budget="1kB")
    replayed = train("vit", tmp_path / "run", replay=small, phases=TWO)
    assert all(torch.equal(replayed[name], plain[name]) for name in plain)
    assert "don't fit into replay.budget 1kB" in caplog.text


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise KeyboardInterrupt


def test_a_stopped_phase_goes_on_from_its_recordings(tmp_path):
    options = {"data": toy.phase_data(train=32, validation=16), "replay": EXACT, "arguments": arguments()}
    whole, _ = toy.run(tiny.build("vit"), tmp_path / "whole/0", **options)
    with pytest.raises(KeyboardInterrupt):
        toy.run(tiny.build("vit"), tmp_path / "parts/0", callbacks=[Stop()], **options)
    parts, _ = toy.run(tiny.build("vit"), tmp_path / "parts/0", **options)
    whole, parts = whole.state_dict(), parts.state_dict()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_activations_that_are_kept_in_half_train_in_float32(tmp_path, dtype):
    plain = train("vit", tmp_path / "plain", replay=None, phases=TWO)
    kept = dataclasses.replace(EXACT, dtype=dtype)
    replayed = train("vit", tmp_path / "replayed", replay=kept, phases=TWO)
    assert json.loads((tmp_path / "replayed/1/replay.json").read_text())["engine"] == "torch"
    for name, value in plain.items():
        torch.testing.assert_close(replayed[name], value, rtol=0, atol=0.02, msg=name)
    assert not torch.equal(replayed["classifier.weight"], plain["classifier.weight"])


@pytest.mark.parametrize(
    ("mixing", "words"), [({"mixup": 0.4}, "mixup"), ({"mixup": 0.4, "cutmix": 1.0}, "mixup, cutmix")]
)
def test_mixed_images_are_not_replayed(mixing, words, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    train("vit", tmp_path, replay=EXACT, phases=TWO[:1], augment=AugmentSpec(**mixing))
    assert f"every step computes the whole network: pixels of several images are mixed ({words})" in caplog.text


def test_looking_for_overflow_sees_the_whole_network_and_stops_with_the_phase(tmp_path, caplog):
    """transformers' hooks stay in a model for good, and take what stands for skipped modules for an overflow."""
    caplog.set_level(logging.INFO)
    phases = ({**TWO[0], "arguments": arguments(debug="underflow_overflow")}, TWO[1])
    plain = train("vit", tmp_path / "plain", replay=None, phases=TWO)
    looked = train("vit", tmp_path / "looked", replay=EXACT, phases=phases)
    assert all(torch.equal(looked[name], plain[name]) for name in plain)
    assert "p0: every step computes the whole network: debug looks at" in caplog.text
    assert "p1: replays what enters" in caplog.text


def test_auto_leaves_cheap_parts_alone(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    toy.run(tiny.build("vit"), tmp_path / "0", replay=ReplaySpec(engine="torch"), unfreeze={"blocks": 4})
    assert "what is frozen takes" in caplog.text
