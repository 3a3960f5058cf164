import io
import os

import numpy as np
import pillow_heif
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from hfft.data.images import decoding, modes
from hfft.data.images.decoding import decode, decode_bytes, decode_row, decode_small, on_background
from hfft.data.sources.folders import endings
from hfft.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decoded(content):
    image = decode(content)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, PIXELS),
        (2, PIXELS[:, ::-1]),
        (3, PIXELS[::-1, ::-1]),
        (4, PIXELS[::-1]),
        (5, PIXELS.transpose(1, 0, 2)),
        (6, PIXELS[::-1].transpose(1, 0, 2)),
        (7, PIXELS[::-1, ::-1].transpose(1, 0, 2)),
        (8, PIXELS[:, ::-1].transpose(1, 0, 2)),
    ],
)
def test_orientation_follows_exif(orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decoded(encoded(Image.fromarray(PIXELS), exif=exif)), upright)


def test_gray_becomes_three_equal_channels():
    gray = PIXELS[:, :, 0]
    assert np.array_equal(decoded(encoded(Image.fromarray(gray))), np.stack([gray] * 3, axis=2))


def test_one_bit_becomes_black_and_white():
    bits = PIXELS[:, :, 0] > 127
    assert np.array_equal(decoded(encoded(Image.fromarray(bits))), np.stack([bits * 255] * 3, axis=2))


def test_a_palette_is_looked_up():
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8))
    image = image.convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert decoded(encoded(image)).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]


def test_transparency_is_dropped_and_the_color_below_stays():
    alpha = np.arange(35, dtype=np.uint8).reshape(5, 7, 1)
    assert np.array_equal(decoded(encoded(Image.fromarray(np.concatenate([PIXELS, alpha], axis=2)))), PIXELS)


def test_cmyk_becomes_rgb():
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 255, 0], [0, 0, 0, 255]]], dtype=np.uint8)
    image = Image.frombytes("CMYK", (5, 1), inks.tobytes())
    white, cyan, magenta, yellow, black = decoded(encoded(image, "TIFF"))[0].tolist()
    assert (white, black) == ([255, 255, 255], [0, 0, 0])
    assert (cyan, magenta, yellow) == ([0, 255, 255], [255, 0, 255], [255, 255, 0])


DEEP = np.array([[0, 257, 257 * 100, 257 * 128 + 100, 65535]], dtype=np.uint16)
SHALLOW = [0, 1, 100, 128, 255]


def sixteen_bits(kind):
    if kind == "TIFF, big-endian":
        return encoded(Image.frombytes("I;16B", (5, 1), DEEP.astype(">u2").tobytes()), "TIFF")
    return encoded(Image.fromarray(DEEP), kind)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TIFF, big-endian"])
def test_sixteen_bits_are_scaled(kind):
    content = sixteen_bits(kind)
    assert Image.open(io.BytesIO(content)).mode.startswith("I;16")
    assert decoded(content)[0].tolist() == [[value] * 3 for value in SHALLOW]


def test_what_plain_convert_makes_of_sixteen_bits():
    plain = np.asarray(Image.open(io.BytesIO(sixteen_bits("PNG"))).convert("RGB"))
    assert plain[0, :, 0].tolist() == [0, 255, 255, 255, 255]  # all that isn't black is white


def test_thirty_two_bit_integers_are_read_as_sixteen():
    image = Image.fromarray(DEEP.astype(np.int32))
    assert image.mode == "I"
    assert decoded(encoded(image, "TIFF"))[0, :, 0].tolist() == SHALLOW


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.4, 255.0], [0, 100, 255]),
        ([0.0, 25700.0, 65535.0], [0, 100, 255]),
    ],
)
def test_floating_point_is_scaled_by_its_range(values, expected):
    content = encoded(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF")
    assert Image.open(io.BytesIO(content)).mode == "F"
    assert decoded(content)[0, :, 2].tolist() == expected


def test_what_plain_convert_makes_of_floating_point():
    content = encoded(Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)), "TIFF")
    plain = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert plain.max() <= 1  # black


def test_floating_point_that_is_no_number():
    content = encoded(Image.fromarray(np.array([[0.0, np.nan]], dtype=np.float32)), "TIFF")
    with pytest.raises(DataError, match="not finite"):
        decode(content)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 3), color) for color in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decoded(content)[0, 0].tolist() == [255, 0, 0]


def test_bytes_path_and_image_are_the_same(tmp_path):
    image = Image.fromarray(PIXELS)
    path = tmp_path / "x.png"
    path.write_bytes(encoded(image))
    for source in (path.read_bytes(), path, str(path), image):
        assert np.array_equal(decoded(source), PIXELS)


def test_the_audit_takes_a_jpeg_at_reduced_size():
    content = encoded(Image.new("RGB", (1024, 512), "red"), "JPEG")
    header, picture, remark = decode_small(content)
    assert (header.size, tuple(picture.shape), remark) == ((1024, 512), (1, 64, 128), None)


def damaged_dds():
    content = bytearray(encoded(Image.fromarray(PIXELS), "DDS"))
    content[80:84] = (27).to_bytes(4, "little")  # pixel format flags that Pillow answers with NotImplementedError
    return bytes(content)


LARGE_NOISE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"just some words", "not an image in any format that hfft reads"),
        (encoded(LARGE_NOISE, "JPEG")[:-1000], "image file is truncated"),
        (encoded(LARGE_NOISE, "PNG")[:-1000], "image file is truncated"),
        (encoded(LARGE_NOISE, "PNG").replace(b"IDAT", b"IDOT"), "is a PNG with a damaged header"),
        (damaged_dds(), "Unknown pixel format flags 27"),
    ],
    ids=["empty", "text", "cut JPEG", "cut PNG", "broken PNG", "damaged DDS"],
)
def test_what_is_no_image(content, reason):
    for read in (decode, decode_small):
        with pytest.raises(DataError, match=reason):
            read(content)


@pytest.mark.filterwarnings("ignore")  # Pillow's own, about the damage
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"])
def test_a_damaged_file_gives_an_image_or_a_data_error(kind):
    content = encoded(LARGE_NOISE, kind)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(content[: rng.integers(1, len(content) + 1)])
        for place in rng.integers(0, min(len(damaged), 300), 5):
            damaged[place] = rng.integers(256)
        try:
            assert decode(bytes(damaged)).mode == "RGB"
        except DataError:
            refused += 1
    assert refused > 0


def test_a_path_that_is_missing(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        decode(tmp_path / "none.png")


def test_a_row_names_its_file(tmp_path):
    (tmp_path / "bad.png").write_text("words")
    missing = {"image": {"bytes": None, "path": str(tmp_path / "bad.png")}, "label": 0, "file": "ant/bad.png"}
    with pytest.raises(DataError, match=r"^ant/bad.png: not an image"):
        decode_row(missing)
    with pytest.raises(DataError, match=r"^train/3: the row holds no image"):
        decode_row({"image": None, "label": 0, "file": "train/3"})
    good = {"image": {"bytes": encoded(Image.fromarray(PIXELS)), "path": "elsewhere.png"}, "label": 0, "file": "x"}
    assert np.array_equal(np.asarray(decode_row(good)), PIXELS)


def pillow(content):
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))


def row_pixels(content):
    """What a row of a data set gives, (H, W, 3)."""
    image = decode_row({"image": {"bytes": content, "path": None}, "label": 0, "file": "x"})
    if isinstance(image, torch.Tensor):
        return image.expand(3, -1, -1).permute(1, 2, 0).numpy()
    return np.asarray(image.convert("RGB"))


JPEGS = {
    "4:2:0": {},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:4:4": {"subsampling": "4:4:4", "quality": 95},
    "coarse": {"quality": 10},
    "progressive": {"progressive": True},
}


@pytest.mark.parametrize("size", [(64, 48), (33, 21), (5, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_a_jpeg_of_a_row_is_what_pillow_makes_of_it(options, mode, size):
    content = encoded(LARGE_NOISE.resize(size).convert(mode), "JPEG", **options)
    assert np.array_equal(row_pixels(content), pillow(content))


@pytest.mark.parametrize("orientation", range(10))
def test_orientation_of_a_jpeg_of_a_row(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(LARGE_NOISE.crop((0, 0, 40, 30)), "JPEG", exif=exif)
    assert np.array_equal(row_pixels(content), pillow(content))


def test_an_orientation_that_is_text_means_nothing():
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\0006\0\0\0\0\0\0\0"
    content = encoded(LARGE_NOISE.crop((0, 0, 40, 30)), "JPEG", exif=exif)
    assert Image.open(io.BytesIO(content)).getexif()[0x0112] == "6"
    assert np.array_equal(row_pixels(content), pillow(content))


@pytest.mark.parametrize("equal", [True, False])
def test_simplejpeg_decodes_where_it_equals_pillow(monkeypatch, equal):
    monkeypatch.setattr(decoding, "_simplejpeg_equals_pillow", lambda: equal)
    row = {"image": {"bytes": encoded(LARGE_NOISE, "JPEG"), "path": None}, "label": 0, "file": "x"}
    assert isinstance(decode_row(row), torch.Tensor if equal else Image.Image)


def test_simplejpeg_is_trusted_as_long_as_it_equals_pillow(monkeypatch):
    check, decoder = decoding._simplejpeg_equals_pillow.__wrapped__, decoding._decode_jpeg
    assert check()
    monkeypatch.setattr(decoding, "_decode_jpeg", lambda *args: decoder(*args) ^ 1)
    assert not check()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_gray_row_has_one_channel(kind):
    image = decode_row({"image": {"bytes": encoded(LARGE_NOISE.convert("L"), kind), "path": None}, "file": "x"})
    assert (image.shape[0] == 1) if isinstance(image, torch.Tensor) else (image.mode == "L")


@pytest.mark.parametrize("cut", [30, 700, 2000])
def test_a_cut_jpeg_of_a_row(cut):
    row = {"image": {"bytes": encoded(LARGE_NOISE, "JPEG")[:cut], "path": None}, "label": 0, "file": "ant/1.jpg"}
    with pytest.raises(DataError, match=r"^ant/1.jpg: (image file is truncated|not an image|Truncated|broken)"):
        decode_row(row)


# What is refused, and what is read by a rule of its own


def photo(size=(300, 200), seed=3):
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def refused(content):
    """The one reason that all ways of reading give."""
    reasons = set()
    for read in (decode, decode_bytes, decode_small):
        with pytest.raises(DataError) as caught:
            read(content)
        reasons.add(str(caught.value))
    (reason,) = reasons
    return reason


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_whose_picture_is_partly_lost(mode):
    content = bytearray(encoded(photo().convert(mode), "JPEG", quality=90))
    middle = len(content) // 2
    content[middle : middle + 400] = b"\xff\xd9" * 200
    plain = Image.open(io.BytesIO(bytes(content)))
    assert plain.size == (300, 200)
    plain.load()  # Pillow fills the lower half with gray and says nothing
    assert refused(bytes(content)).startswith("the JPEG is damaged and part of its picture lost: ")


def test_bytes_between_the_parts_of_a_jpeg_are_a_remark():
    content = encoded(photo(), "JPEG")
    longer = content[:-2] + bytes(12) + content[-2:]
    assert np.array_equal(decoded(longer), decoded(content))
    _, _, remark = decode_small(longer)
    assert "extraneous bytes" in remark


@pytest.mark.parametrize("kind", ["IHDR", "PLTE", "IDAT"])
def test_a_png_with_a_wrong_checksum(kind):
    content = bytearray(encoded(photo().quantize(16), "PNG"))
    place = content.index(kind.encode())
    end = place + 4 + int.from_bytes(content[place - 4 : place], "big")
    content[end] ^= 1
    refused(bytes(content))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([-1.0, 0.5], "from -1 to 0.5"),
        ([0.0, 70000.0], "from 0 to 70000"),
        ([-40.0, 200.0], "from -40 to 200"),
        ([np.inf, 0.0], "not finite"),
    ],
)
def test_floats_that_would_have_to_be_clipped(values, told):
    assert told in refused(encoded(Image.fromarray(np.array([values], np.float32)), "TIFF"))


def test_half_a_level_beyond_a_range_is_rounding():
    for top in (1, 255, 65535):
        values = np.array([[-top / 1000, top / 2, top * 1.0009]], np.float32)
        assert decoded(encoded(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("values", [[-200, 5], [0, 66000]])
def test_integers_beyond_sixteen_bits(values):
    assert "allowed: 0 to 1, 0 to 255, or 0 to 65535" in refused(
        encoded(Image.fromarray(np.array([values], np.int32)), "TIFF")
    )


def test_a_decompression_bomb():
    small = encoded(Image.new("1", (14000, 13000)), "PNG")
    assert len(small) < 100_000
    assert refused(small).endswith("(a decompression bomb?)")


def test_a_bomb_is_refused_even_where_pillow_was_told_not_to(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    test_a_decompression_bomb()


@pytest.mark.parametrize(("size", "good"), [((100, 1), True), ((101, 1), False), ((2, 201), False), ((2, 200), True)])
def test_strips(size, good):
    content = encoded(Image.new("RGB", size, "red"))
    if good:
        assert decode(content).size == size
    else:
        assert refused(content) == f"has {size[0]} x {size[1]} pixels; allowed: one side at most 100 times the other"


def test_formats_that_start_programs_are_not_read():
    assert "EPS" in Image.SAVE
    eps = encoded(Image.fromarray(PIXELS), "EPS")
    assert Image.open(io.BytesIO(eps)).format == "EPS"  # and Ghostscript would be started
    assert refused(eps).startswith("is PostScript, which is not read")
    assert ".eps" not in endings()
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".bmp", ".gif", ".avif"} <= set(endings())


def with_alpha(image, alpha):
    image = image.convert("RGBA")
    image.putalpha(alpha)
    return image


TRANSPARENT = {
    "RGBA": lambda: encoded(with_alpha(photo(), photo(seed=8).convert("L"))),
    "LA": lambda: encoded(with_alpha(photo(), photo(seed=8).convert("L")).convert("LA")),
    "palette": lambda: encoded(photo().quantize(16), "PNG", transparency=3),
    "palette, several": lambda: encoded(photo().quantize(16), "PNG", transparency=bytes(range(0, 256, 16))),
    "gray, one level": lambda: encoded(
        photo().convert("L"), "PNG", transparency=int(np.asarray(photo().convert("L"))[0, 0])
    ),
    "WebP": lambda: encoded(with_alpha(photo(), photo(seed=8).convert("L")), "WEBP", lossless=True, exact=True),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparent_pixels_over_a_background(kind):
    content = TRANSPARENT[kind]()
    image = decode_bytes(content)
    assert image.mode == "RGBA"
    color, alpha = np.asarray(image)[..., :3].astype(float), np.asarray(image)[..., 3:] / 255
    assert alpha.min() < 1
    assert np.array_equal(np.asarray(on_background(image, None)), color)
    assert np.array_equal(decoded(content), np.asarray(Image.open(io.BytesIO(content)).convert("RGBA").convert("RGB")))
    expected = color * alpha + np.array([10, 200, 90]) * (1 - alpha)
    assert np.abs(np.asarray(decode(content, (10, 200, 90))) - expected).max() <= 1
    assert np.array_equal(np.asarray(on_background(image, (10, 200, 90))), np.asarray(decode(content, (10, 200, 90))))


def test_an_opaque_image_with_an_alpha_channel_is_no_transparent_one():
    assert decode_bytes(encoded(with_alpha(photo(), 255))).mode == "RGB"
    assert decode_bytes(encoded(photo().convert("L").convert("LA"))).mode == "RGB"


def test_transparent_images_are_turned_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = with_alpha(photo(), photo(seed=8).convert("L"))
    upright = decode_bytes(encoded(image, exif=exif))
    assert np.array_equal(np.asarray(upright), np.asarray(image.transpose(Image.Transpose.ROTATE_270)))


def test_inks_are_shown_as_their_profile_says(monkeypatch):
    """Any profile shows that it is used; real ones of inks are too large to be here."""
    content = encoded(photo().convert("CMYK"), "JPEG", icc_profile=b"profile", quality=95)
    plain = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert np.array_equal(decoded(content), plain)  # a profile that can't be read
    asked = []

    def show(image, source, target, outputMode):
        asked.append((image.mode, outputMode))
        return Image.new("RGB", image.size, (1, 2, 3))

    monkeypatch.setattr(modes.ImageCms, "ImageCmsProfile", lambda stream: stream.read())
    monkeypatch.setattr(modes.ImageCms, "profileToProfile", show)
    assert decoded(content).reshape(-1, 3).max(axis=0).tolist() == [1, 2, 3]
    assert asked == [("CMYK", "RGB")]


def test_a_profile_of_other_colors_is_not_applied_to_inks():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    content = encoded(photo().convert("CMYK"), "JPEG", icc_profile=profile, quality=95)
    assert np.array_equal(decoded(content), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop"])
def test_what_is_no_file_keeps_nobody_waiting(kind, tmp_path):
    path = tmp_path / "x.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)
    with pytest.raises(DataError, match=r"is no regular file|can't be read: "):
        decode(path)


def test_heic():
    stream = io.BytesIO()
    pillow_heif.from_pillow(photo()).save(stream, quality=95)
    assert ".heic" in endings()
    image = decode_bytes(stream.getvalue())
    assert image.size == (300, 200)
    assert np.abs(np.asarray(image, float) - np.asarray(photo(), float)).mean() < 6
    assert refused(stream.getvalue()[:-800])
