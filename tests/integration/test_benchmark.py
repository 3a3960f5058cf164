"""The benchmark's two sides train the same tensors, its floor is made of the network's own parts, and it runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from hfft.model.anatomy import dissect
from hfft.model.freezing import trainable_names
from hfft.recipe.spec import AdapterSpec, PhaseSpec
from hfft.training.plan import prepare_phase

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import benchmark_jobs  # noqa: E402

VARIANTS = ["floor", "plain-float32", "hfft", "hfft-again"]
FAMILIES = [
    ("vit", {}, {"blocks": 2}),
    ("convnext", {"depths": [1, 1, 1, 3]}, {"blocks": 2}),
    ("timm_wrapper", {"architecture": "tf_efficientnet_lite0"}, {"blocks": 5}),
]


def pixels(images=2):
    return torch.randn(images, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(0))


def trained(model):
    return {name for name, tensor in model.named_parameters() if tensor.requires_grad}


@pytest.mark.parametrize(("family", "changes", "blocks"), FAMILIES)
@pytest.mark.parametrize("depth", ["head", "blocks"])
def test_by_hand_trains_what_hfft_trains(family, changes, blocks, depth):
    model = tiny.build(family, **changes)
    phase = PhaseSpec(name="p", unfreeze="head" if depth == "head" else blocks)
    assert trained(benchmark_jobs.release(model, phase)) == trainable_names(model, dissect(model), phase.unfreeze)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft 0.21.2 asks it
@pytest.mark.parametrize("family", ["vit", "convnext"])
def test_lora_by_hand_trains_as_many_parameters_as_hfft(family):
    phase = PhaseSpec(name="p", adapter=AdapterSpec(on="all", r=8, lora_alpha=16))
    models = (
        benchmark_jobs.release(tiny.build(family), phase),
        prepare_phase(tiny.build(family), phase, pixels(1)),
    )
    one, two = (sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad) for model in models)
    assert one == two > 0


@pytest.mark.parametrize(("family", "changes", "blocks"), FAMILIES)
@pytest.mark.parametrize("depth", ["head", "blocks"])
def test_the_floor_computes_the_logits_of_the_network(family, changes, blocks, depth):
    model = tiny.build(family, **changes)
    steps = benchmark_jobs.tail(model, PhaseSpec(name="p", unfreeze="head" if depth == "head" else blocks))
    with torch.no_grad():
        (values,) = benchmark_jobs.prefix_to(model, steps[0], pixels())(pixels())
        for step in steps:
            values = step(values)
        torch.testing.assert_close(values, model(pixel_values=pixels()).logits)


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_small_benchmark(photos, tmp_path):
    data = photos({f"{split}/{name}": 20 for split in ("train", "validation", "test") for name in ("ant", "bee")})
    checkpoint = tiny.save(tmp_path / "vit", "vit")
    options = f"--workload vit_b16 --images 30 --epochs 2 --seeds 0 --variants {' '.join(VARIANTS)}"
    paths = ["--data", data, "--checkpoint", checkpoint, "--output", tmp_path / "results"]
    command = [sys.executable, SCRIPTS / "benchmark_two_phase.py", *options.split(), *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "results/results.jsonl").read_text().splitlines()
    environment, *results = [json.loads(line) for line in lines]
    assert environment["environment"]["cores"] > 0
    assert [result["variant"] for result in results] == VARIANTS
    for result in results:
        assert result["train_images"] == 30
        (phase,) = result["phases"].values()
        assert phase["images"] == 2 * 30
        assert 0 < phase["seconds"] < result["seconds"]
        assert result["peak_bytes"] > 100 * 2**20
    for result in results[1:]:
        epochs = result["phases"]["last-blocks"]["epochs"]
        assert len(epochs) == 2
        assert all(0 < epoch["steps"] < epoch["all"] for epoch in epochs)
        assert sum(epoch["all"] for epoch in epochs) < result["phases"]["last-blocks"]["seconds"]
        assert 0 <= result["accuracy"] <= 1
    trainable = {result["phases"]["last-blocks"]["trainable"] for result in results[1:]}
    assert len(trainable) == 1
    (header,) = [line for line in done.stdout.splitlines() if VARIANTS[0] in line and line.startswith("|")]
    assert [cell.strip() for cell in header.strip().strip("|").split("|")] == ["", *VARIANTS]
