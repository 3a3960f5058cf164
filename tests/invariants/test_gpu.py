"""On a CUDA device: the phases of a recipe, in float32 and bfloat16, end as they do on a CPU."""

import json

import pytest
import tiny
import torch
import toy
from launches import ALONE, assert_same_result, launch, succeed, train, write_recipe

from hfft.recipe.spec import AdapterSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("family", ["vit", "convnext", "resnet"])
@pytest.mark.parametrize(
    "phase", [{"unfreeze": "head"}, {"unfreeze": {"blocks": 2}}, {"adapter": AdapterSpec(on="mlp")}]
)
@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=str)
def test_a_phase_on_the_device(family, phase, precision, tmp_path):
    model, result = toy.run(tiny.build(family), tmp_path, arguments=precision, **phase)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert result.frozen["changed"] == 0
    assert json.loads((tmp_path / "result.json").read_text())["metrics"]["accuracy"] > 0.4


def test_the_weights_are_those_of_a_cpu_within_tolerance(tmp_path):
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    arguments = {"optim": "sgd", "learning_rate": 0.1}
    there, _ = toy.run(tiny.build("vit", **changes), tmp_path / "gpu", unfreeze="all", arguments=arguments)
    arguments = {**arguments, "use_cpu": True}
    here, _ = toy.run(tiny.build("vit", **changes), tmp_path / "cpu", unfreeze="all", arguments=arguments)
    for name, value in here.state_dict().items():
        torch.testing.assert_close(there.state_dict()[name].cpu(), value, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("family", ["vit", "convnext", "dinov2"])
@pytest.mark.parametrize("replay", ["auto", "off"])
def test_two_devices_end_with_the_weights_of_one(family, replay, tmp_path, photos):
    photos({"train/ant": 11, "train/bee": 10, "validation/ant": 5, "validation/bee": 4, "test/ant": 4, "test/bee": 5})
    write_recipe(tmp_path, family)
    succeed([*launch("ddp.yaml", "--num_processes", 2), *train(family, "two", replay, 2)], tmp_path, gpus=True)
    succeed([*ALONE, *train(family, "one", replay, 4)], tmp_path, gpus=True)
    assert_same_result(tmp_path, family, "one", "two", tolerance=1e-4)
