from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

from hfft.errors import ModelError
from hfft.model import restoring
from hfft.model.restoring import synchronised


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(restoring, "PartialState", lambda: SimpleNamespace(num_processes=2, device="cuda:0"))


def kinds(model):
    return {name: type(layer) for name, layer in model.named_modules()}


@pytest.mark.parametrize("family", ["resnet", "levit", "timm_wrapper"])
def test_layers_are_synchronised_for_a_phase_and_themselves_again(family, two_gpus):
    changes = {"architecture": "efficientnet_lite0"} if family == "timm_wrapper" else {}
    model = tiny.build(family, **changes).eval()
    pixels = torch.rand(2, 3, 32, 32)
    before, expected = kinds(model), model(pixel_values=pixels).logits
    activations = {name for name, layer in model.named_modules() if hasattr(layer, "act")}
    assert bool(activations) == (family == "timm_wrapper")
    with synchronised(model, "phase"):
        layers = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        assert layers
        assert all(isinstance(layer, nn.SyncBatchNorm) for layer in layers)
        assert {name for name, layer in model.named_modules() if hasattr(layer, "act")} == activations
        assert torch.equal(model(pixel_values=pixels).logits, expected)
        layers[-1].running_mean.add_(1)
        model.double().float()  # new tensors, as a move to a device makes them
        name, weights = next((name, value) for name, value in model.named_parameters())
        changed = model(pixel_values=pixels).logits
    assert kinds(model) == before
    assert dict(model.named_parameters())[name] is weights
    assert torch.equal(model(pixel_values=pixels).logits, changed)
    assert not torch.equal(changed, expected)


def test_a_layer_that_does_more_is_refused_and_all_are_themselves_again(two_gpus):
    class Scaled(nn.BatchNorm2d):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.Sequential(nn.BatchNorm2d(3), Scaled(3))
    with pytest.raises(ModelError, match="1 is a Scaled"), synchronised(model, "phase"):
        pass
    assert [type(layer) for layer in model] == [nn.BatchNorm2d, Scaled]
