"""One pass gives the logits of a result and of the pretrained network, and what enters its head."""

import copy

import pytest
import tiny
import torch
import toy

from hfft.data.images.batches import Examples
from hfft.data.images.transforms import evaluation_transform
from hfft.evaluators.pretrained import Reference, vectors
from hfft.metrics.scoring import compute
from hfft.model.anatomy import dissect
from hfft.model.freezing import set_trainable, trainable_names

COUNT = 10


def changed(model, unfreeze):
    """A copy in which all that a phase would train has moved."""
    result = copy.deepcopy(model)
    set_trainable(result, trainable_names(result, dissect(result), unfreeze))
    with torch.no_grad():
        for parameter in result.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    set_trainable(result, set())
    return result


def examples():
    return Examples(toy.rows(COUNT), evaluation_transform(tiny.processor()))


def entering_classifier(model, module):
    found = []
    handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        logits = model(pixel_values=toy.pixels(COUNT)).logits
    handle.remove()
    return logits, found[0]


@pytest.mark.parametrize("unfreeze", ["head", {"blocks": 2}], ids=str)
@pytest.mark.parametrize("family", ["vit", "convnext", "resnet", "dinov2"])
def test_a_shared_pass_computes_what_each_network_does_alone(family, unfreeze):
    pretrained = tiny.build(family)
    result = changed(pretrained, unfreeze)
    reference = Reference(pretrained, toy.pixels(COUNT)[:1])
    network, then = reference.joint(result)
    logits, other, features = compute(network, examples(), torch.Tensor.float, batch_size=4, then=then)
    head = pretrained.classifier[1] if family == "resnet" else pretrained.classifier
    expected, entering = entering_classifier(pretrained, head)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.tensor(logits), result(pixel_values=toy.pixels(COUNT)).logits, atol=1e-5, rtol=1e-5
        )
    torch.testing.assert_close(torch.tensor(other), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(features), entering.flatten(1), atol=1e-5, rtol=1e-5)
    assert abs(logits - other).max() > 1e-3


def test_a_result_may_be_the_reference_itself():
    model = tiny.build("vit")
    network, then = Reference(model, toy.pixels(COUNT)[:1]).joint(model)
    logits, other, _ = compute(network, examples(), torch.Tensor.float, batch_size=4, then=then)
    torch.testing.assert_close(torch.tensor(logits), torch.tensor(other), atol=1e-6, rtol=1e-6)


def test_nothing_in_common_is_said():
    pretrained = tiny.build("vit")
    assert Reference(pretrained, toy.pixels(COUNT)[:1]).joint(changed(pretrained, "all")) is None


def test_a_running_mean_that_moved_is_a_difference():
    pretrained = tiny.build("resnet")
    result = changed(pretrained, "head")
    stem = next(module for module in result.modules() if isinstance(module, torch.nn.BatchNorm2d))
    stem.running_mean.add_(0.5)
    network, then = Reference(pretrained, toy.pixels(COUNT)[:1]).joint(result)
    logits, other, _ = compute(network, examples(), torch.Tensor.float, batch_size=4, then=then)
    with torch.no_grad():
        expected = [model(pixel_values=toy.pixels(COUNT)).logits for model in (result, pretrained)]
    torch.testing.assert_close(torch.tensor(logits), expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(other), expected[1], atol=1e-5, rtol=1e-5)


def test_one_vector_per_image():
    tensors = [torch.ones(2, 3, 5), torch.ones(2, 7, 4, 4), torch.ones(2, 6)]
    assert vectors(tensors).shape == (2, 5 + 7 + 6)
