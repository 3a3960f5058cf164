import numpy as np
import pytest
import tiny
import torch
import toy

from hfft.data.images.batches import Examples
from hfft.data.images.transforms import evaluation_transform
from hfft.evaluators.features import HEAD_INPUT, collect_features


def collect(model, images=10):
    transform = evaluation_transform(tiny.processor())
    return collect_features(model, Examples(toy.rows(images), transform), transform.floats)


@pytest.mark.parametrize("family", ["vit", "convnext", "cvt", "levit", "poolformer", "resnet", "swin", "timm_wrapper"])
def test_the_features_of_a_block_do_not_depend_on_later_ones_and_do_on_its_own(family):
    model, blocks = tiny.build(family), tiny.anatomy(family).blocks
    middle = len(blocks) // 2
    before = collect(model).by_part
    assert {features.shape[:-1] for features in before.values()} == {(10,)}
    assert np.ptp(before["block 0"], axis=0).max() > 0  # images differ; in some of these they vanish later on
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in blocks[middle].tensors:
                parameter.mul_(1.5).add_(0.01)
    after = collect(model).by_part
    for number, block in enumerate(blocks):
        is_same = np.array_equal(before[block.name], after[block.name])
        assert is_same == (number < middle), block.name
    assert not np.array_equal(before[HEAD_INPUT], after[HEAD_INPUT])


def test_features_are_means_over_tokens_and_over_space():
    pixels = toy.pixels(10)
    vit, convnext = tiny.build("vit"), tiny.build("convnext")
    with torch.no_grad():
        states = vit(pixels, output_hidden_states=True).hidden_states
        maps = convnext(pixels, output_hidden_states=True).hidden_states
        pooled = convnext.convnext(pixels).pooler_output
    found = collect(vit)
    assert found.by_part["block 1"] == pytest.approx(states[2].mean(dim=1).numpy(), abs=1e-6)
    found = collect(convnext)
    assert found.by_part["block 1"] == pytest.approx(maps[2].mean(dim=(2, 3)).numpy(), abs=1e-6)
    assert found.by_part[HEAD_INPUT] == pytest.approx(pooled.numpy(), abs=1e-6)


def test_logits_are_the_models_and_the_model_is_left_as_it_was():
    model = tiny.build("efficientnet").train()
    dissected = [module.training for module in model.modules()]
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    found = collect(model)
    assert [module.training for module in model.modules()] == dissected
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        assert found.logits == pytest.approx(model.eval()(toy.pixels(10)).logits.numpy(), abs=1e-5)
