"""Endings of files that are read as images."""

from functools import cache

from PIL import Image

from hfft.data.pictures import formats


@cache
def endings() -> dict[str, str]:
    """Endings of file names, in small letters and with their dot, to the format that they promise."""
    read = formats()
    return {ending: name for ending, name in Image.registered_extensions().items() if name in read}
