import numpy as np
import pytest
import torch

from hfft.inference.parity import ParityError, compare

LOGITS = torch.tensor([[0.5, -0.2, 0.1], [-3.0, 2.0, 1.0]])


def reference(pixels):
    """Two kinds of images, told by their only pixel."""
    return LOGITS[pixels.flatten().long()]


def images(count=9):
    return ((f"image {k}", torch.full((1, 1, 1), float(k % 2))) for k in range(count))


def run(change=0.0, at=slice(None)):
    def answer(pixels):
        logits = reference(torch.from_numpy(pixels)).numpy().copy()
        logits[at] += change
        return logits

    return answer


def test_equal_programs_agree_on_batches_of_every_size():
    sizes = []

    def counted(pixels):
        sizes.append(len(pixels))
        return run()(pixels)

    found = compare(counted, reference, images(30), "noise")
    assert sizes == [1, 2, 5, 16, 1, 2, 3]
    assert (found.images, found.same_top1, found.largest_difference, found.what) == (30, 30, 0.0, "noise")
    assert found.batch_sizes == (1, 2, 3, 5, 16)


def test_a_small_difference_is_told():
    found = compare(run(np.float32(5e-5), np.s_[:, 1]), reference, images(), "noise")
    assert found.largest_difference == pytest.approx(5e-5, rel=0.01)


@pytest.mark.parametrize("change", [2e-4, 10.0, np.nan, -np.inf])
@pytest.mark.parametrize("at", [np.s_[-1:, 2], np.s_[:, 0]])
def test_a_large_difference_is_an_error_that_names_the_image(change, at):
    with pytest.raises(ParityError, match=r"image \d, in a batch of \d, has logits that differ"):
        compare(run(change, at), reference, images(), "noise")


def test_large_logits_may_differ_as_much_as_their_size_lets_them():
    large = 1000 * LOGITS
    compare(
        lambda pixels: large[pixels.flatten().astype(int)].numpy() + np.float32(0.04),
        lambda pixels: large[pixels.flatten().long()],
        images(),
        "noise",
    )


def test_a_tie_may_fall_either_way_and_is_counted():
    tied = torch.tensor([[1.0, 1.0 - 2e-5]])
    found = compare(
        lambda pixels: np.repeat([[1.0 - 2e-5, 1.0]], len(pixels), 0).astype(np.float32),
        lambda pixels: tied.expand(len(pixels), 2),
        images(8),
        "noise",
    )
    assert (found.images, found.same_top1) == (8, 0)


def test_a_program_for_one_number_of_images_is_an_error():
    def fixed(pixels):
        if len(pixels) != 2:
            raise RuntimeError("INVALID_ARGUMENT: Got invalid dimensions\nfor input")
        return run()(pixels)

    with pytest.raises(ParityError, match="can't run a batch of 1 images: INVALID_ARGUMENT: Got invalid dimensions"):
        compare(fixed, reference, images(), "noise")


def test_another_number_of_classes_is_an_error():
    with pytest.raises(ParityError, match=r"with \(1, 2\) numbers, torch with \(1, 3\)"):
        compare(lambda pixels: run()(pixels)[:, :2], reference, images(), "noise")
