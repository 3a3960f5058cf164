import numpy as np
import pytest
import tiny
import torch
import toy
from PIL import Image

from hfft.data.images.batches import Collator, EpochOrder, Examples
from hfft.data.images.first_batch import try_first_batch
from hfft.data.images.transforms import training_transform
from hfft.recipe.augment import AugmentSpec

TRANSFORM = training_transform(tiny.processor(), AugmentSpec(crop=(0.5, 1.0), flip=True))


def draw(folder, count=20, transform=TRANSFORM.pixels, classes=toy.CLASSES, **mixing):
    examples = Examples(toy.rows(count), transform, seed=0)
    collate = Collator(classes=2, floats=TRANSFORM.floats, **mixing)
    file = folder / "figures" / "first_batch.png"
    options = {"processor": tiny.processor(), "classes": classes, "seed": 3, "chances": None}
    try_first_batch(file, examples, collate, **options)
    return file, examples, collate


def tile(sheet, number):
    left, top = number % 4 * 152 + 8, number // 4 * 172 + 8
    return sheet.crop((left, top, left + 144, top + 144))


@pytest.mark.parametrize("mixing", [{}, {"mixup": 1.0}, {"cutmix": 1.0}], ids=str)
def test_it_shows_what_the_network_sees(mixing, tmp_path):
    file, examples, collate = draw(tmp_path, **mixing)
    order = list(EpochOrder(examples, seed=3, multiple=8))[:16]
    batch = TRANSFORM.floats(collate([examples[index] for index in order])["pixel_values"])
    seen = TRANSFORM.scale.bytes(batch)
    with Image.open(file) as sheet:
        for number in (0, 5, 15):
            expected = Image.fromarray(seen[number].permute(1, 2, 0).numpy()).resize((144, 144))
            assert np.array_equal(np.asarray(tile(sheet, number)), np.asarray(expected))


def test_random_numbers_stay_and_so_does_a_picture_that_is_there(tmp_path):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    file, *_ = draw(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    file.write_bytes(b"mine")
    draw(tmp_path)
    assert file.read_bytes() == b"mine"


def test_few_images_and_names_of_any_letters(tmp_path):
    file, *_ = draw(tmp_path, count=3, classes=("猫", "very " * 30))
    with Image.open(file) as sheet:
        assert sheet.size == (3 * 152 + 8, 172 + 8)


def test_a_run_goes_on_without_it(tmp_path, log):
    def fail(image):
        raise OSError("the disk is gone")

    file, *_ = draw(tmp_path, transform=fail)
    assert not file.exists()
    (message,) = log()
    assert "first_batch.png was not written: OSError: the disk is gone" in message
