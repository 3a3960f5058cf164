"""Whether Pillow gets the pixels of a TIFF right, which its tags tell; runs without hfft, too."""

import io

from PIL import Image, TiffImagePlugin

_SUBFILE, _WIDTH, _BITS, _COMPRESSION, _PHOTOMETRIC, _BANDS, _PLANAR = 254, 256, 258, 259, 262, 277, 284
_SUB_FILES, _INKS, _SAMPLES = 330, 332, 339
_UNREAD = (32771, 50001)  # CCITT's in words of 16 bits, and WebP: what libtiff makes of them is wrong or nothing
_KINDS = {1: "integers", 2: "integers with a sign", 3: "floating point", 5: "complex integers", 6: "complex numbers"}
_COLORS = {0: "white is zero", 3: "a palette", 5: "inks", 6: "YCbCr", 8: "CIELAB", 32803: "a camera's mosaic"}
_PACKED = {34712: "JPEG 2000", 33003: "JPEG 2000", 33005: "JPEG 2000", 50001: "WebP", 50002: "JPEG XL", 34887: "LERC"}


def check_tiff(image: Image.Image) -> None:
    """Refuse a TIFF that Pillow 12.3 opens and decodes to other pixels.

    Raises:
        ValueError: With the reason.
    """
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    tags = image.tag_v2
    is_packed = tags.get(_COMPRESSION, 1) != 1
    is_planar = tags.get(_PLANAR) == 2 and tags.get(_BANDS, 1) > 1
    color = tags.get(_PHOTOMETRIC)
    if (
        tags.get(_COMPRESSION) in _UNREAD
        or (is_packed and tags.prefix == b"MM" and image.mode in ("I", "F"))
        or (is_planar and not is_packed and max(tags.get(_BITS, (1,))) > 8)
        or (color == 6 and not is_packed and tags.get(_BANDS, 1) > 1)
        or (is_planar and color == 8)
        or (image.mode == "CMYK" and tags.get(_INKS) == 2)
    ):
        raise ValueError(_described(tags))
    if tags.get(_SUBFILE, 0) & 1 and _SUB_FILES in tags:
        raise ValueError("is a TIFF that begins with a preview (a camera's raw file?), not read: develop it first")


def is_white_zero(image: Image.Image) -> bool:
    """Whether levels count from white to black, which Pillow turns around in images of 8 bits alone."""
    return isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == 0


def holds_signed_bytes(image: Image.Image) -> bool:
    """Whether its bytes are from -128 to 127; Pillow takes them as 0 to 255."""
    is_tiff = isinstance(image, TiffImagePlugin.TiffImageFile)
    return is_tiff and image.mode == "L" and image.tag_v2.get(_SAMPLES) == (2,)


def describe_tiff(encoded: bytes) -> str | None:
    """Why a TIFF is not read that Pillow doesn't open; None where its tags can't be read."""
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(encoded[: 16 if encoded[2:4] in (b"+\0", b"\0+") else 8])
        stream = io.BytesIO(encoded)
        stream.seek(tags.next)
        tags.load(stream)
        return _described(tags) if _WIDTH in tags else None
    except Exception:  # a damaged header can do anything
        return None


def _described(tags: TiffImagePlugin.ImageFileDirectory_v2) -> str:
    """What a TIFF is that is not read, and what to do."""
    bands, packed = tags.get(_BANDS, 1), tags.get(_COMPRESSION, 1)
    traits = [f"{bands} {'band' if bands == 1 else 'bands'} of {max(tags.get(_BITS, (1,)))}-bit"]
    traits[0] += f" {_KINDS.get(max(tags.get(_SAMPLES, (1,))), 'values')}"
    traits += [_COLORS[color] for color in (tags.get(_PHOTOMETRIC),) if color in _COLORS]
    traits += ["each band in a plane of its own"] if tags.get(_PLANAR) == 2 and bands > 1 else []
    traits += [] if packed == 1 else [f"compressed ({_PACKED.get(packed, f'scheme {packed}')})"]
    traits += ["big-endian"] if tags.prefix == b"MM" else []
    way_out = "save three of the bands as RGB of 8 bits, or one as gray" if bands > 4 else "save it as RGB of 8 bits"
    return f"is a TIFF of {', '.join(traits)}, which is not read: {way_out}" + (
        ", or gray of 8 or 16 bits" * (bands <= 2)
    )
