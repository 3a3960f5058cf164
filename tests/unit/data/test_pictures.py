"""The rule that runs without hfft, too: the same pixels as inside, and a sentence for each kind of other content."""

import sys

import numpy as np
import pytest
from PIL import Image

from hfft.data import pictures
from hfft.data.decoding import decode
from hfft.data.pictures import open_picture
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


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (bytes(128) + b"DICM" + bytes(100), "is a DICOM file"),
        (b"\0\0\0\x1cftypheic" + bytes(100), "pip install pillow-heif"),
        (b"\0\0\0\x1cftypmif1" + bytes(100), "pip install pillow-heif"),
        (b"\0\0\0\x18ftypcrx " + bytes(100), "raw file"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100), "is JPEG XL"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n", "git lfs pull"),
        (b"\x93NUMPY\x01\0" + bytes(100), "array of numpy"),
        (b"II*\0" + bytes(100), "not an image in any format that hfft reads"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of Pillow, about the damage
def test_content_that_is_not_read_is_called_by_its_name(content, told, monkeypatch):
    monkeypatch.setattr(pictures, "formats", lambda: ("JPEG", "PNG", "TIFF"))  # as without pillow-heif
    with pytest.raises(DataError, match=told):
        decode(content)


def test_a_damaged_heic_needs_no_package(monkeypatch):
    pytest.importorskip("pillow_heif", reason="needs the extra heic")
    with pytest.raises(DataError) as caught:
        decode(b"\0\0\0\x1cftypheic" + bytes(100))
    assert "pip install" not in str(caught.value)
