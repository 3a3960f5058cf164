"""The rule that runs without hfft, too: the same pixels as inside, and the same reasons."""

import io
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from hfft.data.images.decoding import decode
from hfft.data.images.modes import open_picture
from hfft.errors import DataError

PHOTO = Image.fromarray(np.random.default_rng(3).integers(0, 256, (6, 7, 3), dtype=np.uint8)).resize((60, 40))


def saved(image, path, **options):
    image.save(path, **options)
    return path


def with_alpha(image):
    image = image.copy()
    image.putalpha(PHOTO.convert("L").rotate(180))
    return image


IMAGES = {
    "JPEG": lambda path: saved(PHOTO, path / "x.jpg"),
    "CMYK": lambda path: saved(PHOTO.convert("CMYK"), path / "x.jpg"),
    "RGBA": lambda path: saved(with_alpha(PHOTO), path / "x.png"),
    "palette": lambda path: saved(PHOTO.quantize(16), path / "x.png", transparency=3),
    "16 bits": lambda path: saved(
        Image.fromarray(np.asarray(PHOTO.convert("L")).astype(np.uint16) * 257), path / "x.png"
    ),
    "floats": lambda path: saved(Image.fromarray(np.asarray(PHOTO.convert("L")).astype(np.float32)), path / "x.tif"),
}


@pytest.mark.parametrize("background", [None, (10, 200, 90)])
@pytest.mark.parametrize("kind", IMAGES)
def test_it_gives_the_pixels_of_training(kind, background, tmp_path):
    path = IMAGES[kind](tmp_path)
    found = open_picture(path, background)
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), np.asarray(decode(path, background)))


def png(levels, bits, kind, transparent):
    """A PNG of levels (H, W) or (H, W, 3), of which one is transparent."""
    rows = levels.reshape(len(levels), -1)
    packed = np.packbits((rows[..., np.newaxis] >> np.arange(bits - 1, -1, -1) & 1).astype(np.uint8), axis=None)
    lines = b"".join(b"\0" + row.tobytes() for row in packed.reshape(len(levels), -1))
    header = struct.pack(">IIBBBBB", levels.shape[1], len(levels), bits, kind, 0, 0, 0)
    color = struct.pack(f">{np.size(transparent)}H", *np.ravel(transparent))
    content = b"\x89PNG\r\n\x1a\n"
    for name, part in ((b"IHDR", header), (b"tRNS", color), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")):
        content += struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
    return content


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("place", [0, 1])
def test_the_transparent_gray_of_a_png_shows_the_background(bits, place):
    levels = np.array([[0, 2**bits - 1, 0, 2**bits - 1] * 2] * 2)
    content = png(levels, bits, 0, levels[0, place])
    shown = np.where(levels == levels[0, place], 77, levels * 255 // (2**bits - 1))
    assert np.array_equal(np.asarray(decode(content, (77, 77, 77)))[..., 1], shown)
    assert np.array_equal(np.asarray(decode(content))[..., 1], levels * 255 // (2**bits - 1))
    with Image.open(io.BytesIO(content)) as opened:
        for _ in range(2):  # the second time with its pixels loaded
            assert np.array_equal(np.asarray(decode(opened, (77, 77, 77)))[..., 1], shown)


def test_the_transparent_color_of_a_png_of_16_bits_shows_the_background():
    levels = np.array([[[1000, 2000, 3000], [40000, 50000, 60000]]])
    assert np.asarray(decode(png(levels, 16, 2, levels[0, 1]), (9, 9, 9))).tolist() == [[[3, 7, 11], [9, 9, 9]]]


@pytest.mark.parametrize("kind", ["damaged JPEG", "damaged PNG", "strip", "text"])
def test_it_refuses_what_training_refuses(kind, tmp_path):
    path = tmp_path / "x"
    if kind == "damaged JPEG":
        content = bytearray(saved(PHOTO.resize((600, 400)), tmp_path / "x.jpg").read_bytes())
        content[len(content) // 2 : len(content) // 2 + 400] = b"\xff\xd9" * 200
        path.write_bytes(content)
    elif kind == "damaged PNG":
        content = bytearray(saved(PHOTO, tmp_path / "x.png").read_bytes())
        content[content.index(b"IDAT") + 9] ^= 1
        path.write_bytes(content)
    elif kind == "strip":
        Image.new("1", (101, 1)).save(path, "PNG")
    else:
        path.write_text("words")
    with pytest.raises(DataError) as inside:
        decode(path)
    with pytest.raises(ValueError, match=r"\w") as outside:
        open_picture(path)
    assert str(inside.value) == str(outside.value)


def test_without_simplejpeg_it_reads_jpegs(tmp_path, monkeypatch):
    path = saved(PHOTO, tmp_path / "x.jpg")
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    assert open_picture(path).size == PHOTO.size
