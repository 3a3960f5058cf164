import pytest
import tiny
import torch
from families import ALL_AT_NIGHT
from torch.nn import functional

from hfft.errors import ModelError
from hfft.evaluators.grad_cam import attribute
from hfft.model.anatomy import dissect
from hfft.model.freezing import hash_tensors

# Tokens in an order of their own, latents, maps of too few places, and late blocks that no class depends on.
WITHOUT_MAPS = {
    *("efficientnet", "hiera", "levit", "levit+teacher", "mobilevit"),
    *("perceiver", "perceiver+conv", "perceiver+fourier"),
}


def spots(count, seed, height=32, width=32):
    """Noise with a coloured square in one quarter: its colour is the class; (N, 3, H, W), classes, quarters."""
    generator = torch.Generator().manual_seed(seed)
    pixels = 0.3 * torch.randn(count, 3, height, width, generator=generator)
    labels = torch.randint(0, 2, (count,), generator=generator)
    quarters = torch.randint(0, 4, (count,), generator=generator)
    for image, label, quarter in zip(pixels, labels.tolist(), quarters.tolist(), strict=True):
        top, left = 3 + height // 2 * (quarter // 2), 3 + width // 2 * (quarter % 2)
        image[2 * label, top : top + 10, left : left + 10] += 3
    return pixels, labels, quarters


def trained(family, steps=60):
    """A network that has learned which colour the square has."""
    model = tiny.build(family).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        pixels, labels, _ = spots(32, seed=step)
        functional.cross_entropy(model(pixel_values=pixels).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def strongest_quarters(maps):
    half, middle = maps.shape[1] // 2, maps.shape[2] // 2
    sums = [
        maps[:, rows, columns].mean(dim=(1, 2))
        for rows in (slice(None, half), slice(-half, None))
        for columns in (slice(None, middle), slice(-middle, None))
    ]
    return torch.stack(sums).argmax(dim=0)


@pytest.mark.parametrize("family", ["resnet", "convnext", "vit", "swin", "dinov2_with_registers"])
def test_it_points_at_what_the_class_is_told_by(family):
    model = trained(family)
    pixels, labels, quarters = spots(24, seed=1000)
    with torch.no_grad():
        assert (model(pixel_values=pixels).logits.argmax(dim=1) == labels).float().mean() > 0.9
    found = attribute(model, pixels, labels)
    assert found.maps.shape[0] == 24
    assert found.maps.min() >= 0
    assert found.maps.max() == 1
    assert (strongest_quarters(found.maps) == quarters).float().mean() > 0.6  # by chance: 0.25


def test_another_class_is_spoken_for_by_other_places():
    model, (pixels, labels, _) = trained("resnet"), spots(8, seed=1000)
    assert not torch.equal(attribute(model, pixels, labels).maps, attribute(model, pixels, 1 - labels).maps)


@pytest.mark.parametrize("family", ALL_AT_NIGHT)
def test_every_family_gives_maps_or_says_why_not(family):
    model, (pixels, labels, _) = tiny.build(family), spots(3, seed=0)
    if family in WITHOUT_MAPS:
        with pytest.raises(ModelError, match=r"(of|in) the image"):
            attribute(model, pixels, labels)
        return
    found = attribute(model, pixels, labels)
    assert found.block in [part.name for part in dissect(model).parts]
    assert found.maps.shape[0] == 3
    assert min(found.maps.shape[1:]) >= 4


def test_the_model_and_the_random_numbers_are_left_as_they_were():
    model, (pixels, labels, _) = tiny.build("vit").train(), spots(3, seed=0)
    next(iter(model.parameters())).requires_grad_(False)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    before, state = hash_tensors(dict(model.state_dict())), torch.get_rng_state()
    attribute(model, pixels, labels)
    assert hash_tensors(dict(model.state_dict())) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_images_need_not_be_square():
    model = tiny.build("convnext")
    pixels, labels, _ = spots(2, seed=0, height=32, width=64)
    height, width = attribute(model, pixels, labels).maps.shape[1:]
    assert width == 2 * height
