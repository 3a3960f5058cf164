"""Which files are read as images: a list of formats that are decoded inside of this process, and their endings."""

from contextlib import suppress
from functools import cache

from PIL import Image

# Pillow knows more: some start another program (EPS), some are decoded in Python, where a small file takes minutes
# (QOI, SGI), and some only look like images (HDF5, MPEG).
_READ = (
    *("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "HEIF", "JPEG2000"),
    *("PPM", "TGA", "ICO", "PCX", "DDS", "PSD"),
)


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read here; HEIF is one of them where pillow-heif is installed."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener  # pyright: ignore[reportMissingImports]

        register_heif_opener()
    Image.init()
    return tuple(name for name in _READ if name in Image.OPEN)


@cache
def endings() -> dict[str, str]:
    """Endings of file names, in small letters and with their dot, to the format that they promise."""
    read = formats()
    return {ending: name for ending, name in Image.registered_extensions().items() if name in read}
