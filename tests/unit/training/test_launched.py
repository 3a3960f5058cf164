"""What `accelerate launch` sets never beats the recipe: the recipe counts, or the launch is refused."""

import pytest
import tiny
import torch
import toy
from safetensors.torch import load_file

from hfft.errors import RunError
from hfft.recipe.spec import PhaseSpec
from hfft.training import launched
from hfft.training.launched import check_launched
from hfft.training.settings import training_arguments

BF16, PLAIN = PhaseSpec(name="a", arguments={"bf16": True}), PhaseSpec(name="b")


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for variable in (*launched._REFUSED, "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(launched._LOG, "warning", lines.append)
    return lines


@pytest.mark.parametrize("asked", ["bf16", "fp16", "no", "BF16"])
def test_the_precision_is_the_recipes(monkeypatch, tmp_path, asked):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    found = [training_arguments(phase, tmp_path, seed=0, validate=True).mixed_precision for phase in (BF16, PLAIN)]
    assert found == ["bf16", "no"]


def test_a_phase_trains_as_without_the_launchs_precision(monkeypatch, tmp_path):
    def weights(folder):
        toy.run(tiny.build("vit"), tmp_path / folder, unfreeze={"blocks": 1}, arguments={"num_train_epochs": 1})
        return load_file(next((tmp_path / folder).glob("checkpoint-*")) / "model.safetensors")

    before = weights("before")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    after = weights("after")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_precision_than_the_launchs_is_told_once(monkeypatch, told):
    check_launched([BF16, PLAIN])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what the launcher sets where nothing is asked
    check_launched([BF16, PLAIN])
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    check_launched([BF16])
    assert told == []
    check_launched([BF16, PLAIN])
    (line,) = told
    assert "asks for bf16" in line
    assert "b trains in float32" in line
    assert "a trains" not in line


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp8"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
        ("ACCELERATE_DYNAMO_MODE", "max-autotune"),
        ("ACCELERATE_DYNAMO_USE_FULLGRAPH", "True"),
        ("ACCELERATE_USE_MEGATRON_LM", "true"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true"),
    ],
)
def test_what_no_recipe_asks_for_is_refused(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(RunError, match=variable):
        check_launched([PLAIN])


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "NO"),
        ("ACCELERATE_DYNAMO_MODE", "default"),
        ("ACCELERATE_DYNAMO_USE_DYNAMIC", "False"),
    ],
)
def test_what_the_launcher_sets_anyway_is_fine(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    check_launched([PLAIN])


def test_a_cpu_that_the_launch_asks_for_where_there_is_an_accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    check_launched([PLAIN])
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(RunError, match="CUDA_VISIBLE_DEVICES"):
        check_launched([PLAIN])
