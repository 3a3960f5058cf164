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
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (tests/invariants/test_gpu.py)"),
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


TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a GPU (tests/invariants/test_gpu.py)")
FSDP = ("fsdp2.yaml", "--num_processes", 2)


@TWO
@pytest.mark.parametrize("family", ["vit", "convnext", "dinov2"])
@pytest.mark.parametrize("replay", ["auto", "off"])
def test_two_devices_end_with_the_weights_of_one(family, replay, tmp_path, photos):
    photos({"train/ant": 11, "train/bee": 10, "validation/ant": 5, "validation/bee": 4, "test/ant": 4, "test/bee": 5})
    write_recipe(tmp_path, family)
    succeed([*launch("ddp.yaml", "--num_processes", 2), *train(family, "two", replay, 2)], tmp_path, gpus=True)
    succeed([*ALONE, *train(family, "one", replay, 4)], tmp_path, gpus=True)
    assert_same_result(tmp_path, family, "one", "two", tolerance=1e-4)


@TWO
@pytest.mark.parametrize("family", ["vit", "convnext", "dinov2"])
@pytest.mark.parametrize("replay", ["auto", "off"])
def test_two_devices_that_share_the_weights_end_with_those_of_one(family, replay, tmp_path, photos):
    photos({"train/ant": 11, "train/bee": 10, "validation/ant": 5, "validation/bee": 4, "test/ant": 4, "test/bee": 5})
    write_recipe(tmp_path, family)
    succeed([*launch(*FSDP), *train(family, "two", replay, 1, 2)], tmp_path, gpus=True)
    succeed([*ALONE, *train(family, "one", replay, 4)], tmp_path, gpus=True)
    assert_same_result(tmp_path, family, "one", "two", tolerance=1e-4)
    for phase in (tmp_path / "two" / f"of_{family}").glob("*/result.json"):
        other = tmp_path / "one" / phase.relative_to(tmp_path / "two")
        assert json.loads(phase.read_text())["frozen"] == json.loads(other.read_text())["frozen"]


@TWO
def test_two_devices_that_share_the_weights_in_bfloat16(tmp_path, photos):
    photos({"train/ant": 11, "train/bee": 10, "validation/ant": 5, "validation/bee": 4, "test/ant": 4, "test/bee": 5})
    write_recipe(tmp_path, "vit")
    options = ["precision=bfloat16", "training.activation_checkpointing=true", "training.optim=adamw_torch_fused"]
    done = succeed([*launch(*FSDP), *train("vit", "two", "off", 2), *options], tmp_path, gpus=True)
    assert "report: two/of_vit/report.html" in done.stderr
    results = [json.loads(path.read_text()) for path in (tmp_path / "two/of_vit").glob("*/result.json")]
    assert [result["frozen"]["changed"] for result in results] == [0, 0]
