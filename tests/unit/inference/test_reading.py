import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from hfft.errors import DataError
from hfft.inference.reading import Ready, Skipped, decode_array, read_ahead

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def as_tensor(image):
    """What stands for the preparation: the decoded pixels themselves."""
    if isinstance(image, torch.Tensor):
        return image.expand(3, -1, -1)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def read(*images, ahead=4):
    return list(read_ahead(images, as_tensor, ahead=ahead))


def pixels_of(image):
    (entry,) = read(image)
    assert isinstance(entry, Ready), entry
    return entry.pixels.permute(1, 2, 0).numpy()


def reason_of(image):
    (entry,) = read(image)
    assert isinstance(entry, Skipped)
    return entry.reason


def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_every_form_gives_the_same_pixels(tmp_path):
    content = png(Image.fromarray(PIXELS))
    (tmp_path / "a.png").write_bytes(content)
    forms = [
        *(str(tmp_path / "a.png"), tmp_path / "a.png", content, bytearray(content), memoryview(content)),
        *(Image.fromarray(PIXELS), PIXELS, torch.from_numpy(PIXELS), PIXELS / 255, PIXELS.astype(np.uint16) * 257),
        *((PIXELS / 255).astype(np.float32), torch.from_numpy(PIXELS).float() / 255, np.asfortranarray(PIXELS)),
        np.concatenate([PIXELS, np.zeros_like(PIXELS[..., :1])], axis=2),  # transparent everywhere
    ]
    for form in forms:
        assert np.array_equal(pixels_of(form), PIXELS), type(form)


def test_gray_arrays():
    gray = PIXELS[..., 0]
    for form in (gray, gray[..., None], torch.from_numpy(gray.copy())):
        assert np.array_equal(pixels_of(form), np.stack([gray] * 3, axis=2))


@pytest.mark.parametrize(
    ("value", "level"),
    [
        (np.uint16(65535), 255),
        (np.uint16(128 * 257 + 100), 128),
        (np.float16(0.5), 128),
        (np.float64(0.25), 64),
        (torch.tensor(0.5, dtype=torch.bfloat16), 128),
    ],
)
def test_levels(value, level):
    kind = torch.full if isinstance(value, torch.Tensor) else np.full
    assert decode_array(kind((2, 2, 3), value.item(), dtype=value.dtype)).unique().tolist() == [level]


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (PIXELS.transpose(2, 0, 1), r"shape \(3, 5, 7\); allowed: .*move the channels to the end"),
        (torch.zeros(1, 8, 8), "move the channels to the end"),
        (np.zeros((2, 5, 7, 3), np.uint8), r"shape \(2, 5, 7, 3\); allowed: .* with C 1, 3 or 4$"),
        (np.zeros((5, 7, 2), np.uint8), r"shape \(5, 7, 2\)"),
        (np.zeros(7, np.uint8), r"shape \(7,\)"),
        (np.zeros((0, 7, 3), np.uint8), "holds no pixels"),
        (PIXELS.astype(np.int64), "pixels of type int64; allowed: uint8 from 0 to 255, uint16 "),
        (PIXELS > 3, "pixels of type bool"),
        (PIXELS.astype(np.float32), r"floating-point pixels from \d+ to 2\d\d; allowed: .* from 0 to 1"),
        (PIXELS / 255 - 0.5, "floating-point pixels from -0"),
        (np.full((2, 2, 3), np.nan), "floating-point pixels from nan to nan"),
        (np.array([["a.png", "b.png"]]), "pixels of type <U5"),
    ],
)
def test_arrays_that_could_mean_several_things(array, reason):
    with pytest.raises(DataError, match=reason):
        decode_array(array)


def test_what_cannot_be_read_is_told_apart(tmp_path):
    (tmp_path / "words.png").write_text("words")
    assert reason_of(tmp_path / "words.png") == "not an image in any format that hfft reads"
    assert reason_of(tmp_path / "none.png") == "no such file"
    assert reason_of(tmp_path) == "is a folder; give the image files in it"
    assert reason_of(b"") == "the file is empty"
    assert reason_of("a\0.png").startswith("can't be read: ")
    assert reason_of(7).startswith("found int; allowed: a path, encoded bytes, a Pillow image, ")
    assert reason_of(None).startswith("found NoneType; allowed: ")


def test_what_the_processor_refuses_is_skipped():
    def refuse(image):
        raise ValueError("too thin\nreally")

    (entry,) = read_ahead([PIXELS], refuse, ahead=1)
    assert entry == Skipped("0", "the image processor can't take it: too thin")


def test_names_are_paths_or_numbers(tmp_path):
    odd = b"caf\xe9.png"
    entries = read(PIXELS, tmp_path / "a.png", "b.png", PIXELS, odd.decode(errors="surrogateescape"))
    assert [entry.file for entry in entries] == ["0", str(tmp_path / "a.png"), "b.png", "3", r"caf\xe9.png"]
    "".join(entry.file for entry in entries).encode()  # fits into any output


def test_the_order_is_that_of_the_images_however_long_each_takes():
    turn = threading.Event()

    def prepare(image):
        if image[0, 0, 0] == 0:
            assert turn.wait(20)
        else:
            turn.set()
        return image

    images = [np.full((2, 2), level, np.uint8) for level in range(2)]
    entries = list(read_ahead(images, prepare, ahead=2))
    assert [int(entry.pixels[0, 0, 0]) for entry in entries] == [0, 1]


def test_images_are_taken_only_a_little_ahead():
    taken = 0

    def images():
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield PIXELS

    entries = read_ahead(images(), as_tensor, ahead=10)
    assert taken == 0
    for number in range(1, 21):
        next(entries)
        assert taken == number + 10
    entries.close()
    assert taken == 30


def test_an_owner_may_close_and_change_what_was_taken(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.png")

    def images():
        with Image.open(tmp_path / "a.png") as image:
            yield image
        image.close()
        buffer = PIXELS.copy()
        yield buffer
        buffer[:] = 0
        content = bytearray(png(Image.fromarray(PIXELS)))
        yield content
        content[:] = bytes(len(content))
        drawn = Image.fromarray(PIXELS)
        yield drawn
        drawn.paste(0, (0, 0, 7, 5))

    entries = list(read_ahead(images(), as_tensor, ahead=10))
    assert len(entries) == 4
    for entry in entries:
        assert np.array_equal(entry.pixels.permute(1, 2, 0), PIXELS)


def test_no_thread_is_left_behind():
    before = threading.active_count()
    entries = read_ahead([PIXELS] * 100, as_tensor, ahead=4)
    next(entries)
    assert threading.active_count() > before
    entries.close()
    assert threading.active_count() == before
