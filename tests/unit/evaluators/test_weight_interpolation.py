import numpy as np
import pytest
import tiny
import torch
import toy
from accelerate import PartialState

from hfft.data.images.batches import Examples
from hfft.data.images.transforms import evaluation_transform
from hfft.errors import TrainingError
from hfft.evaluators.weight_interpolation import ALPHAS, Trial, find_alpha, interpolate
from hfft.metrics.probabilities import log_loss, softmax
from hfft.model.anatomy import dissect


@pytest.fixture(autouse=True)
def _state():
    PartialState()


def moved(family, parts, amount=0.2):
    """A network, and the weights that it had before the tensors of some parts moved."""
    network = tiny.build(family)
    start = {name: value.clone() for name, value in network.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    anatomy = dissect(network)
    with torch.no_grad():
        for part in parts:
            for name in anatomy.part(part).tensors:
                value = network.state_dict()[name]
                if value.is_floating_point():
                    value += amount * torch.rand(value.shape, generator=generator)
                else:
                    value += 7
    return network, start


def trial(metric="log_loss", images=20, **changes):
    transform = evaluation_transform(tiny.processor())
    content = {
        "examples": Examples(toy.rows(images), transform.pixels),
        "floats": transform.floats,
        "metric": metric,
        "greater_is_better": metric != "log_loss",
        "seed": 0,
        "batch_size": 8,
        "device": torch.device("cpu"),
    }
    return Trial(**{**content, **changes})


def plain(network, alpha, start, images=20):
    """Probabilities of the interpolated network, one plain pass."""
    end = {name: value.clone() for name, value in network.state_dict().items()}
    interpolate(network, start, alpha)
    with torch.no_grad():
        logits = network.eval()(toy.pixels(images)).logits.numpy()
    network.load_state_dict(end)
    return softmax(logits), np.arange(images) % 2


def test_the_ends_are_exact_and_the_middle_lies_between():
    network, start = moved("resnet", ["block 3", "head"])
    end = {name: value.clone() for name, value in network.state_dict().items()}
    interpolate(network, start, 1.0)
    assert all(torch.equal(value, end[name]) for name, value in network.state_dict().items())
    interpolate(network, start, 0.25)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.75 * start[name] + 0.25 * end[name])
        else:
            assert torch.equal(value, end[name])  # a count of batches can't lie between
    network.load_state_dict(end)
    interpolate(network, start, 0.0)
    assert all(
        torch.equal(value, start[name]) for name, value in network.state_dict().items() if value.is_floating_point()
    )


@pytest.mark.parametrize("parts", [["head"], ["block 3", "norm", "head"], ["stem", "block 0", "head"]])
@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_the_curve_is_that_of_plain_passes_and_the_network_is_left_as_it_was(family, parts):
    network, start = moved(family, parts)
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = find_alpha(network, start, trial())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert [point["alpha"] for point in found.curve] == list(ALPHAS)
    for point in found.curve:
        assert point["log_loss"] == pytest.approx(log_loss(*plain(network, point["alpha"], start)), rel=1e-4)
    assert found.alpha == min(found.curve, key=lambda point: point["log_loss"])["alpha"]
    assert (found.metric, found.images) == ("log_loss", 20)
    assert len({point["log_loss"] for point in found.curve}) > 5


def test_of_equal_models_the_one_nearest_to_the_head_phase_is_taken():
    network, start = moved("vit", ["head"], amount=1e-7)
    found = find_alpha(network, start, trial("accuracy"))
    assert len({point["accuracy"] for point in found.curve}) == 1
    assert found.alpha == 0


def test_the_best_may_lie_between(monkeypatch):
    """A head that is right for class 0 alone at one end, for class 1 alone at the other, and for both between."""
    network = tiny.build("vit")
    with torch.no_grad():
        network.classifier.weight.mul_(3)
        network.classifier.bias.copy_(torch.tensor([5.0, -5.0]))
    start = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        network.classifier.bias.copy_(torch.tensor([-5.0, 5.0]))
    found = find_alpha(network, start, trial())
    assert 0.3 <= found.alpha <= 0.7


def test_at_most_a_thousand_images_are_looked_at(monkeypatch):
    monkeypatch.setattr("hfft.evaluators.weight_interpolation._IMAGES", 10)
    network, start = moved("vit", ["head"])
    assert find_alpha(network, start, trial()).images == 10


def test_networks_with_other_tensors_are_refused():
    network, start = moved("vit", ["head"])
    with pytest.raises(TrainingError, match="strange"):
        interpolate(network, {**start, "strange": torch.zeros(1)}, 0.5)


def test_each_alpha_is_tried_on_all_batches():
    network, start = moved("vit", ["block 3", "head"])
    found = find_alpha(network, start, trial())  # 20 images in batches of 8
    for point in found.curve:
        assert point["log_loss"] == pytest.approx(log_loss(*plain(network, point["alpha"], start)), rel=1e-4)


def test_statistics_that_differ_alone_are_not_taken_for_common():
    """A BatchNorm whose running mean moved while its weights did not."""
    network, start = moved("resnet", ["head"])
    buffer = network.state_dict()["resnet.embedder.embedder.normalization.running_mean"]
    buffer += 0.3
    found = find_alpha(network, start, trial())
    for point in found.curve:
        assert point["log_loss"] == pytest.approx(log_loss(*plain(network, point["alpha"], start)), rel=1e-4)
