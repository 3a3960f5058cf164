"""TIFFs that Pillow opens give the pixels that they show, or are refused; other content is called by its name."""

import io

import numpy as np
import pytest
import tifffile

from hfft.data.audit.audit import examine_content
from hfft.data.images import formats
from hfft.data.images.decoding import decode, decode_bytes, decode_small
from hfft.data.images.modes import open_picture
from hfft.errors import DataError

Y, X = np.mgrid[:32, :48]
GRAY = ((5 * X + Y) % 256).astype(np.uint8)
RGB = np.dstack([GRAY, (8 * Y % 256).astype(np.uint8), ((3 * X + 7 * Y) % 256).astype(np.uint8)])
DEEP = GRAY.astype(np.uint16) * 257
DEEP_RGB = RGB.astype(np.uint16) * 257
SHARE = (GRAY / 255).astype(np.float32)
WHITE = {"photometric": "miniswhite"}
PLANES = {"photometric": "rgb", "planarconfig": "separate"}
BIG = {"byteorder": ">"}
PACKED = {"compression": "zlib"}
TILED = {"tile": (16, 16)}
EXTRA = {"extrasamples": ["unspecified"] * 12, "photometric": "minisblack", "planarconfig": "contig"}


def tiff(pixels, **options):
    stream = io.BytesIO()
    tifffile.imwrite(stream, pixels, **{"photometric": "minisblack"} | options)
    return stream.getvalue()


def planes(pixels):
    return np.ascontiguousarray(np.moveaxis(pixels, 2, 0))


@pytest.mark.parametrize("more", [{}, PACKED, TILED], ids=["raw", "packed", "tiled"])
@pytest.mark.parametrize(
    ("pixels", "options", "shown"),
    [
        (255 - GRAY, WHITE, GRAY),
        (65535 - DEEP, WHITE, GRAY),
        (1 - SHARE, WHITE, GRAY),
        (255 - GRAY.astype(np.float32), WHITE, GRAY),
        (GRAY > 99, {}, (GRAY > 99) * 255),
        (GRAY <= 99, WHITE, (GRAY > 99) * 255),
        (DEEP, BIG, GRAY),
        (GRAY // 2, {"dtype": np.int8}, GRAY // 2),
        (DEEP_RGB, {"photometric": "rgb"}, RGB),
        (DEEP_RGB, {"photometric": "rgb"} | BIG, RGB),
        (planes(RGB), PLANES, RGB),
    ],
    ids=[
        *("white zero", "white zero, 16 bits", "white zero, floats", "white zero, floats to 255", "1 bit"),
        *("1 bit, white zero", "big-endian", "signed bytes", "RGB, 16 bits", "RGB, 16 bits, big-endian", "planes"),
    ],
)
def test_pixels_that_a_file_shows(pixels, options, shown, more):
    if options.get("dtype") is np.int8:
        pixels, options = pixels.astype(np.int8), {}
    content = tiff(pixels, **options, **more)
    shown = shown if shown.ndim == 3 else np.dstack([shown] * 3)
    assert np.abs(np.asarray(decode(content)) - shown.astype(float)).max() <= 1


@pytest.mark.parametrize(
    ("pixels", "options", "told"),
    [
        (planes(DEEP_RGB), PLANES, "16-bit integers, each band in a plane of its own"),
        (planes(DEEP_RGB), PLANES | TILED, "each band in a plane of its own"),
        ((GRAY > 99).astype(np.float32), BIG | PACKED, "32-bit floating point, compressed"),
        (DEEP.astype(np.int32), BIG | PACKED, "32-bit integers with a sign, compressed"),
        (GRAY.astype(np.float16), {}, "16-bit floating point"),
        (GRAY.astype(np.float64), {}, "64-bit floating point"),
        (GRAY.astype(np.int8), {}, "negative values"),
        (np.dstack([GRAY] * 13), EXTRA, "13 bands of 8-bit integers"),
        (np.dstack([DEEP] * 13), EXTRA, "save three of the bands"),
        (planes(RGB), {"photometric": "ycbcr", "planarconfig": "separate"}, "YCbCr"),
        (planes(RGB), {"photometric": "cielab", "planarconfig": "separate"} | PACKED, "CIELAB"),
    ],
)
def test_what_would_come_out_as_other_pixels_is_refused(pixels, options, told, tmp_path):
    content = tiff(pixels, **options)
    for read in (decode, decode_bytes, decode_small):
        with pytest.raises(DataError, match=told):
            read(content)
    assert told in examine_content(content, "full").problem
    (tmp_path / "x.tif").write_bytes(content)
    with pytest.raises(ValueError, match=told):
        open_picture(tmp_path / "x.tif")


def test_planes_that_are_compressed_are_read():
    content = tiff(planes(DEEP_RGB), **PLANES, **PACKED)
    assert np.abs(np.asarray(decode(content)) - RGB.astype(int)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_white_is_zero_and_turned(orientation):
    tags = {"extratags": [(274, 3, 1, orientation, True)]}
    plain, inverse = tiff(DEEP, **tags), tiff(65535 - DEEP, **WHITE, **tags)
    assert np.array_equal(np.asarray(decode(inverse)), np.asarray(decode(plain)))


def test_the_audit_takes_the_peak_of_what_is_shown():
    dark = examine_content(tiff((65535 - DEEP // 64).astype(np.uint16), **WHITE), "full").record
    assert dark[5] == pytest.approx(65535 // 64, abs=5)


def test_the_preview_of_a_raw_file_is_not_taken_for_it():
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:
        writer.write(RGB, photometric="rgb", subfiletype=1, subifds=1)
        writer.write(np.tile(RGB, (2, 2, 1)), photometric="rgb")
    with pytest.raises(DataError, match="preview"):
        decode(stream.getvalue())
    assert np.array_equal(np.asarray(decode(tiff(RGB, photometric="rgb", subfiletype=1))), RGB)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (bytes(128) + b"DICM" + bytes(100), "is a DICOM file"),
        (b"\0\0\0\x1cftypheic" + bytes(100), "pip install pillow-heif"),
        (b"\0\0\0\x1cftypmif1" + bytes(100), "pip install pillow-heif"),
        (b"\0\0\0\x18ftypcrx " + bytes(100), "raw file"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100), "is JPEG XL"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"\xef\xbb\xbf<!doctype HTML PUBLIC><html>", "is a web page"),
        (b'{"error": "not found"}', "is JSON"),
        (b"PK\3\4" + bytes(100), "unpack it"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "is PostScript"),
        (b"\xff\xd8\xff\xc0\x00\x11\x0c" + bytes(100), "is a JPEG with a damaged header"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is a PNG with a damaged header"),
        (b"\0\0\0\x18ftypmp42" + bytes(100), "is a video"),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n", "git lfs pull"),
        (b"\x93NUMPY\x01\0" + bytes(100), "array of numpy"),
        (b"II*\0" + bytes(100), "not an image in any format that hfft reads"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of Pillow, about the damage
def test_content_that_is_not_read_is_called_by_its_name(content, told, monkeypatch):
    monkeypatch.setattr(formats, "formats", lambda: ("JPEG", "PNG", "TIFF"))  # as without pillow-heif
    with pytest.raises(DataError, match=told):
        decode(content)


def test_a_damaged_heic_needs_no_package():
    with pytest.raises(DataError) as caught:
        decode(b"\0\0\0\x1cftypheic" + bytes(100))
    assert "pip install" not in str(caught.value)
