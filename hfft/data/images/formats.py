"""Which files are read as images: their formats, and why others, and damaged ones, are refused; runs without hfft."""

import codecs
import io
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

from PIL import Image, TiffImagePlugin, UnidentifiedImageError

MAX_PIXELS = 178_956_970  # where Pillow speaks of a decompression bomb
MAX_ASPECT = 100  # long side by short side: beyond it, a processor that resizes the short side fills the memory
SMALL = 64  # pixels that each side of a JPEG has at least where it is decoded at reduced size
# Pillow knows more: some start another program (EPS), some are decoded in Python, where a small file takes minutes
# (QOI, SGI), and some only look like images (HDF5, MPEG).
_READ = (
    *("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "HEIF", "JPEG2000"),
    *("PPM", "TGA", "ICO", "PCX", "DDS", "PSD"),
)
_SAVE_AS = "save it as PNG or JPEG"
# Content that Pillow doesn't open: offset and bytes of its signature, in any case of letters, and the message.
_OTHERS = (
    (128, b"DICM", "is a DICOM file, which is not read: save its picture as PNG, or as TIFF of 16 bits"),
    (0, b"\xff\x0a", f"is JPEG XL, which is not read: {_SAVE_AS}"),
    (0, b"\0\0\0\x0cJXL ", f"is JPEG XL, which is not read: {_SAVE_AS}"),
    (4, b"ftypcrx ", f"is a camera's raw file, which is not read: {_SAVE_AS}"),
    (4, b"ftyp", "is a video, or a damaged AVIF or HEIC"),
    (0, b"\xff\xd8\xff", "is a JPEG with a damaged header, or not of 8 bits: save it as PNG"),
    (0, b"\x89PNG", "is a PNG with a damaged header"),
    (0, b"GIF8", "is a GIF with a damaged header"),
    (0, b"MM\0+", f"is a big-endian BigTIFF, which is not read: {_SAVE_AS}"),
    (0, b"\x93NUMPY", f"is an array of numpy, which is not read: {_SAVE_AS}"),
    (0, b"\x89HDF", f"is an HDF5 file, which is not read: {_SAVE_AS}"),
    (0, b"SIMPLE  =", f"is a FITS file, which is not read: {_SAVE_AS}"),
    (0, b"%PDF", f"is a PDF, which is not read: {_SAVE_AS}"),
    (0, b"%!PS", f"is PostScript, which is not read: {_SAVE_AS}"),
    (0, b"PK\3\4", "is a ZIP archive and no image: unpack it"),
    (0, b"version https://git-lfs", "is a pointer of Git LFS and no image: `git lfs pull` fetches it"),
    (0, b"<?xml", f"is XML (SVG?), which is not read: {_SAVE_AS}"),
    (0, b"<svg", f"is SVG, which is not read: {_SAVE_AS}"),
    (0, b"<!DOCTYPE html", "is a web page and no image (a download that failed?)"),
    (0, b"<html", "is a web page and no image (a download that failed?)"),
    (0, b"{", "is JSON and no image (a download that failed?)"),
)
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
PILLOW_ERRORS = (OSError, ValueError, SyntaxError, EOFError, RuntimeError, Image.DecompressionBombError, MemoryError)
# What Pillow remarks on odd files; what matters of it is an error here, or a finding of the audit.
warnings.filterwarnings("ignore", module=r"PIL\.")


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read here; HEIF is one of them where pillow-heif is installed."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]

        register_heif_opener()
    Image.init()
    return tuple(name for name in _READ if name in Image.OPEN)


@contextmanager
def pillow_errors() -> Iterator[None]:
    """What Pillow raises for bytes that are no image, as a ValueError of one line."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise ValueError(f"has more pixels than the {MAX_PIXELS:,} allowed (a decompression bomb?)") from error
    except (*PILLOW_ERRORS, TypeError, KeyError, IndexError, AttributeError, OverflowError, ArithmeticError) as error:
        # Plugins that are written in Python meet damaged headers in any of these ways.
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ValueError(reason if isinstance(error, PILLOW_ERRORS) else f"damaged: {reason}") from error


def open_header(encoded: bytes) -> Image.Image:
    """An image whose header is read and whose pixels are not; a ValueError if it is none, or can't come out right."""
    if not encoded:
        raise ValueError("the file is empty")
    with pillow_errors():
        try:
            image = Image.open(io.BytesIO(encoded), formats=formats())
        except UnidentifiedImageError as error:
            raise ValueError(_why_unidentified(encoded)) from error
        check_image(image)
        return image


def check_image(image: Image.Image) -> None:
    """Refuse an open image that is too large, or a TIFF that would come out wrong, with a ValueError."""
    check_size(*image.size)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_tiff(image)


def check_size(width: int, height: int) -> None:
    """Refuse images that would fill the memory, with a ValueError."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"has {width} x {height} pixels; allowed: {MAX_PIXELS:,} (a decompression bomb?)")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"has {width} x {height} pixels; allowed: one side at most {MAX_ASPECT} times the other")


def _why_unidentified(encoded: bytes) -> str:
    """What content is that Pillow doesn't open, and what to do."""
    if encoded[4:8] == b"ftyp" and encoded[8:12] in _HEIC and "HEIF" not in formats():
        return "is HEIC, which is read with the package pillow-heif: pip install pillow-heif"
    if encoded[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        reason = _why_unread_tiff(encoded)
        if reason is not None:
            return reason
    start = encoded[:256].removeprefix(codecs.BOM_UTF8).lstrip()
    for offset, signature, reason in _OTHERS:
        if (encoded if offset else start)[offset : offset + len(signature)].lower() == signature.lower():
            return reason
    return "not an image in any format that hfft reads"


def check_content(image: Image.Image, encoded: bytes) -> None:
    """Refuse, with a ValueError, damage that Pillow hides: missing pixels of a JPEG, and wrong checksums of a PNG."""
    if image.format in ("JPEG", "MPO"):
        with suppress(ImportError):  # without simplejpeg, Pillow fills missing pixels with gray
            import simplejpeg

            try:
                colors = {"L": "GRAY", "RGB": "RGB"}.get(image.mode, "CMYK")
                simplejpeg.decode_jpeg(encoded, colors, min_height=SMALL, min_width=SMALL)
            except ValueError as error:
                refuse_lost(error)
    elif image.format == "PNG":
        _check_png(encoded)


def refuse_lost(error: ValueError) -> None:
    """Raise where a message of libjpeg (jerror.h) says that pixels are missing or wrong."""
    message = str(error)
    if message.startswith("Premature end of JPEG file"):
        raise ValueError("image file is truncated") from error
    if any(words in message for words in ("premature end of data", "bad Huffman", "bad arithmetic", "found marker")):
        reason = message.removeprefix("Corrupt JPEG data: ")
        raise ValueError(f"the JPEG is damaged and part of its picture lost: {reason}") from error


def _check_png(encoded: bytes) -> None:
    """Raise where the checksum of a chunk that pixels depend on is wrong; Pillow ignores it."""
    start = 8
    while start + 12 <= len(encoded):
        size = int.from_bytes(encoded[start : start + 4], "big")
        kind, end = encoded[start + 4 : start + 8], start + 8 + size
        if kind in (b"IHDR", b"PLTE", b"IDAT") and end + 4 <= len(encoded):
            checksum = int.from_bytes(encoded[end : end + 4], "big")
            if zlib.crc32(memoryview(encoded)[start + 4 : end]) != checksum:
                raise ValueError(f"the PNG is damaged: wrong checksum of {kind.decode()}")
        start = end + 4


# Tags of a TIFF, and words for their values.
_SUBFILE, _WIDTH, _BITS, _COMPRESSION, _PHOTOMETRIC, _BANDS, _PLANAR = 254, 256, 258, 259, 262, 277, 284
_SUB_FILES, _INKS, _SAMPLES = 330, 332, 339
_UNREAD = (32771, 50001)  # CCITT's in words of 16 bits, and WebP: what libtiff makes of them is wrong or nothing
_KINDS = {1: "integers", 2: "integers with a sign", 3: "floating point", 5: "complex integers", 6: "complex numbers"}
_COLORS = {0: "white is zero", 3: "a palette", 5: "inks", 6: "YCbCr", 8: "CIELAB", 32803: "a camera's mosaic"}
_PACKED = {34712: "JPEG 2000", 33003: "JPEG 2000", 33005: "JPEG 2000", 50001: "WebP", 50002: "JPEG XL", 34887: "LERC"}


def _check_tiff(image: TiffImagePlugin.TiffImageFile) -> None:
    """Refuse a TIFF that Pillow 12.3 opens and decodes to other pixels."""
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
        raise ValueError(_tiff_reason(tags))
    if tags.get(_SUBFILE, 0) & 1 and _SUB_FILES in tags:
        raise ValueError("is a TIFF that begins with a preview (a camera's raw file?), not read: develop it first")


def _why_unread_tiff(encoded: bytes) -> str | None:
    """Why Pillow doesn't open a TIFF; None where its tags can't be read."""
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(encoded[: 16 if encoded[2:4] in (b"+\0", b"\0+") else 8])
        stream = io.BytesIO(encoded)
        stream.seek(tags.next)
        tags.load(stream)
        return _tiff_reason(tags) if _WIDTH in tags else None
    except Exception:  # a damaged header can do anything
        return None


def _tiff_reason(tags: TiffImagePlugin.ImageFileDirectory_v2) -> str:
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
