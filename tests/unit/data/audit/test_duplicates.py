import hostile
import numpy as np
import pytest
from PIL import Image, ImageDraw

from hfft.data.audit import duplicates
from hfft.data.audit.duplicates import CORRELATION, group, is_same_picture, same_pictures, similar_pairs


def thumbnails(count, seed=0):
    """Smooth blotches, (N, 32, 32)."""
    rng = np.random.default_rng(seed)
    return np.stack([smooth(rng) for _ in range(count)])


def smooth(rng):
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5), dtype=np.uint8))
    return np.asarray(coarse.resize((32, 32), Image.Resampling.BICUBIC))


def all_pairs(stack):
    """By comparing each with each."""
    flat = stack.reshape(len(stack), -1).astype(np.float64)
    flat -= flat.mean(axis=1, keepdims=True)
    usable = flat.std(axis=1) >= 3
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-9)
    close = (flat @ flat.T > CORRELATION) & usable & usable[:, None]
    return np.argwhere(np.triu(close, 1)).tolist()


def noisy_copies(stack, rng, most=1):
    return np.clip(stack.astype(int) + rng.integers(-most, most + 1, stack.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("seed", range(5))
def test_the_grid_leaves_out_no_pair(seed):
    rng = np.random.default_rng(seed)
    stack = thumbnails(300, seed)
    mixed = np.concatenate([stack, noisy_copies(stack[:100], rng), noisy_copies(stack[50:150], rng, 2)])
    mixed = mixed[rng.permutation(len(mixed))]
    expected = all_pairs(mixed)
    assert len(expected) > 100
    assert similar_pairs(mixed, np.arange(len(mixed))).tolist() == expected


def test_pairs_are_places_among_the_rows_that_were_asked_for():
    stack = thumbnails(40)
    stack[30] = stack[7]
    assert similar_pairs(stack, np.array([30, 2, 7])).tolist() == [[0, 2]]
    assert similar_pairs(stack, np.array([30, 2])).tolist() == []


def test_many_pieces_give_the_same(monkeypatch):
    rng = np.random.default_rng(3)
    stack = thumbnails(200)
    stack = np.concatenate([stack, noisy_copies(stack, rng)])
    expected = similar_pairs(stack, np.arange(400)).tolist()
    monkeypatch.setattr(duplicates, "_PAIRS", 7)
    monkeypatch.setattr(duplicates, "_CHUNK", 9)
    assert similar_pairs(stack, np.arange(400)).tolist() == expected != []


def test_plain_thumbnails_are_like_nothing():
    stack = np.full((5, 32, 32), 100, np.uint8)
    stack[3, 0, 0] = 110
    assert similar_pairs(stack, np.arange(5)).tolist() == []
    assert similar_pairs(stack[:0], np.arange(0)).tolist() == []


def test_a_crowd_is_found_through_one_of_it():
    rng = np.random.default_rng(0)
    stack = np.concatenate([noisy_copies(np.repeat(smooth(rng)[None], 900, axis=0), rng, 1), thumbnails(50, 9)])
    pairs = similar_pairs(stack, np.arange(len(stack))).tolist()
    assert len(pairs) < 900 * 80  # of 404,550
    assert [len(members) for members in group(pairs)] == [900]


def test_groups():
    assert group([]) == []
    assert group([(4, 7), (1, 2), (7, 9), (9, 4)]) == [[1, 2], [4, 7, 9]]


def cell(size=300):
    return hostile.picture(5, size=(size, size)).convert("L")


def scratched(image):
    image = image.copy()
    ImageDraw.Draw(image).line((140, 140, 162, 147), fill=20, width=3)
    return image


def resaved(image, **options):
    import io

    return Image.open(io.BytesIO(hostile.encoded(image, **options))).convert("L")


SAME = {
    "itself": lambda image: image,
    "JPEG": lambda image: resaved(image, quality=50),
    "half": lambda image: image.resize((150, 150)),
    "half as JPEG": lambda image: resaved(image.resize((150, 150)), quality=70),
    "brighter": lambda image: image.point(lambda value: min(value * 0.9 + 20, 255)),
}
OTHER = {
    "scratched": scratched,
    "negative": lambda image: image.point(lambda value: 255 - value),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "cropped": lambda image: image.crop((30, 30, 270, 270)),
    "another": lambda image: hostile.picture(6, size=(300, 300)).convert("L"),
    "plain": lambda image: Image.new("L", image.size, 90),
}


@pytest.mark.parametrize("change", SAME)
def test_the_same_picture(change):
    assert is_same_picture(cell(), SAME[change](cell()))
    assert is_same_picture(SAME[change](cell()), cell())


@pytest.mark.parametrize("change", OTHER)
def test_another_picture(change):
    assert not is_same_picture(cell(), OTHER[change](cell()))
    assert not is_same_picture(OTHER[change](cell()), cell())


def test_like_thumbnails_are_not_enough():
    images = [cell(), scratched(cell()), resaved(cell(), quality=60)]
    stack = np.stack([np.asarray(image.resize((32, 32), Image.Resampling.BOX)) for image in images])
    assert len(similar_pairs(stack, np.arange(3))) == 3
    assert same_pictures(stack, np.arange(3), images.__getitem__) == [(0, 2)]
