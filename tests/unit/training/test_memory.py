import pytest
import tiny
import torch
from families import ALL_AT_NIGHT
from torch import nn

from hfft.recipe.spec import AdapterSpec, PhaseSpec
from hfft.training.plan import activation_bytes, prepare_phase

NEED_VALUES = ("perceiver", "perceiver+conv", "perceiver+fourier")
SHAPE = (4, 3, tiny.SIDE, tiny.SIDE)


class TwoLayers(nn.Module):
    """Two linear layers with a ReLU in between."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(10, 20)
        self.second = nn.Linear(20, 5)

    def forward(self, pixel_values):
        return self.second(torch.relu(self.first(pixel_values)))


@pytest.mark.parametrize(
    ("frozen", "numbers"),
    [
        ((), 8 * 10 + 8 * 20),  # the input of each layer; the second's is also the output that ReLU keeps
        (("first",), 8 * 20),
        (("first", "second"), 0),
    ],
)
def test_it_counts_what_autograd_keeps(frozen, numbers):
    model = TwoLayers()
    for name in frozen:
        getattr(model, name).requires_grad_(False)
    assert activation_bytes(model, (8, 10)) == 4 * numbers


@pytest.mark.parametrize("family", ALL_AT_NIGHT)
def test_the_meta_device_tells_what_the_real_one_keeps(family):
    spec = PhaseSpec(name="p", unfreeze="all")
    real = prepare_phase(tiny.build(family), spec)
    expected = activation_bytes(real, SHAPE)
    with torch.device("meta"):
        shapes = type(real)(real.config)
    estimate = activation_bytes(prepare_phase(shapes, spec), SHAPE)
    if family in NEED_VALUES:
        assert estimate is None
    else:
        assert estimate == pytest.approx(expected, rel=0.2)


def test_a_deeper_phase_keeps_more_and_twice_the_images_twice():
    def kept(batch=4, **phase):
        model = prepare_phase(tiny.build("vit"), PhaseSpec(name="p", **phase))
        return activation_bytes(model, (batch, *SHAPE[1:]))

    head, one, two, everything = (kept(unfreeze=word) for word in ("head", {"blocks": 1}, {"blocks": 2}, "all"))
    assert head < one < two < everything
    assert kept(adapter=AdapterSpec(blocks=1)) > head
    assert kept(8, unfreeze="all") == 2 * everything


def test_the_model_is_left_as_it_was():
    model = tiny.build("resnet")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    activation_bytes(model, SHAPE)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
