"""A folder of photos with every defect that is known of; each names its files and what an audit has to say of them."""

from __future__ import annotations

import atexit
import io
import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

Found = set[tuple[str, frozenset[str]]]  # kind, files
Defect = Callable[[Path], Found]

CLASSES = ("ant", "bee", "cat")
SPLITS = {"train": 12, "validation": 6, "test": 6}
_TINTS = np.array([(60, 0, 0), (0, 60, 0), (0, 0, 60)])


def picture(seed: int, label: int = 0, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """Smooth blotches, others for each seed, with a tint for each class."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 190, (6, 7, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)) + _TINTS[label]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _write(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return name


def _seed(name: str) -> int:
    return zlib.crc32(name.encode())


def _of(name: str, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """A picture of its own for a file, in the tint of its class."""
    return picture(_seed(name), CLASSES.index(name.split("/")[1]), size)


def make_clean(folder: Path) -> Path:
    """Splits of three classes without any defect."""
    return Path(shutil.copytree(_clean_once(), folder))


@cache
def _clean_once() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="hfft-clean-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for split, count in SPLITS.items():
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                file = f"{split}/{name}/{number:03d}.jpg"
                (folder / file).write_bytes(encoded(_of(file), quality=90))
    return folder


# Files that can't be read


def _broken(name: str, content: Callable[[str], bytes]) -> Defect:
    def defect(folder: Path) -> Found:
        return {("broken", frozenset([_write(folder, name, content(name))]))}

    return defect


def _middle_lost(name: str) -> bytes:
    content = bytearray(encoded(_of(name, (300, 200)), quality=90))
    middle = len(content) // 2
    content[middle : middle + 400] = b"\xff\xd9" * 200  # an end in the middle
    return bytes(content)


def _bad_checksum(name: str) -> bytes:
    content = encoded(_of(name), "PNG")
    place = content.index(b"IDAT")
    length = struct.unpack(">I", content[place - 4 : place])[0]
    end = place + 4 + length
    return content[: end - 10] + bytes([content[end - 10] ^ 255]) + content[end - 9 :]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, data: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header)
    return start + _chunk(b"IDAT", zlib.compress(data)) + _chunk(b"IEND", b"")


def _floats(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(values.astype(np.float32)), "TIFF")


def _zip(name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.jpg", encoded(_of(name)))
    return stream.getvalue()


def _pipe(folder: Path) -> Found:
    os.mkfifo(folder / "train/ant/pipe.jpg")
    return {("broken", frozenset(["train/ant/pipe.jpg"]))}


def _dangling(folder: Path) -> Found:
    (folder / "train/bee/gone.jpg").symlink_to("nowhere.jpg")
    return {("broken", frozenset(["train/bee/gone.jpg"]))}


def _loop(folder: Path) -> Found:
    (folder / "train/cat/loop.png").symlink_to("loop.png")
    return {("broken", frozenset(["train/cat/loop.png"]))}


_SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'
_HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
BROKEN: dict[str, Defect] = {
    "empty file": _broken("train/ant/empty.jpg", lambda name: b""),
    "text": _broken("train/ant/text.png", lambda name: b"no picture, only words\n"),
    "web page": _broken("train/ant/page.jpg", lambda name: _HTML),
    "vector graphics": _broken("train/bee/vector.png", lambda name: _SVG),
    "archive": _broken("train/bee/archive.jpg", _zip),
    "zeros": _broken("train/bee/zeros.jpg", lambda name: bytes(5000)),
    "cut JPEG": _broken("train/cat/cut.jpg", lambda name: encoded(_of(name))[:-300]),
    "JPEG header alone": _broken("train/cat/header.jpg", lambda name: encoded(_of(name))[:200]),
    "JPEG without its middle": _broken("validation/ant/middle.jpg", _middle_lost),
    "cut PNG": _broken("validation/bee/cut.png", lambda name: encoded(_of(name), "PNG")[:-500]),
    "PNG with a wrong checksum": _broken("test/ant/checksum.png", _bad_checksum),
    "PNG without pixels": _broken("test/bee/nopixels.png", lambda name: _png(0, 0)),
    "decompression bomb": _broken("test/cat/bomb.png", lambda name: _png(60_000, 60_000, bytes(10_000_000))),
    "cut GIF": _broken("train/ant/cut.gif", lambda name: encoded(_of(name), "GIF")[:-700]),
    "cut WebP": _broken("train/ant/cut.webp", lambda name: encoded(_of(name), "WEBP")[:-300]),
    "cut TIFF": _broken("train/bee/cut.tif", lambda name: encoded(_of(name), "TIFF")[:-3000]),
    "cut AVIF": _broken("train/cat/cut.avif", lambda name: encoded(_of(name), "AVIF")[:-300]),
    "floats that are no numbers": _broken("train/bee/nan.tif", lambda name: _floats(np.full((40, 40), np.nan))),
    "floats of no known range": _broken(
        "train/cat/range.tif", lambda name: _floats(np.linspace(-4000, 9000, 1600).reshape(40, 40))
    ),
    "strip": _broken("train/cat/strip.png", lambda name: encoded(_of(name, (600, 3)), "PNG")),
    "named pipe": _pipe,
    "link to nowhere": _dangling,
    "link to itself": _loop,
}

# Files that can be read and are wrong or odd


def _equal(*names: str, kind: str, source: str | None = None, **options) -> Defect:
    """One picture several times; with options, the later ones are saved anew."""

    def defect(folder: Path) -> Found:
        first, *others = names
        image = _of(source or first, (240, 200))
        _write(folder, first, encoded(image, quality=95))
        for name in others:
            copy = image.resize((120, 100)) if options.get("half") else image
            suffix = Image.registered_extensions()[Path(name).suffix]
            content = encoded(copy, suffix, quality=70) if options else encoded(image, quality=95)
            _write(folder, name, content)
        return {(part, frozenset(names)) for part in kind.split(" + ")}

    return defect


def _one(kind: str, name: str, content: Callable[[str], bytes]) -> Defect:
    def defect(folder: Path) -> Found:
        return {(kind, frozenset([_write(folder, name, content(name))]))}

    return defect


def _extra_bytes(name: str) -> bytes:
    content = encoded(_of(name))
    return content[:-2] + bytes(20) + content[-2:]


def _transparent(name: str) -> bytes:
    image = _of(name).convert("RGBA")
    image.putalpha(Image.fromarray(np.tile(np.arange(96, dtype=np.uint8) * 2, (80, 1))))
    return encoded(image, "PNG")


def _palette(name: str) -> bytes:
    return encoded(_of(name).quantize(64), "GIF", transparency=0)


def _frames(name: str) -> bytes:
    others = [_of(f"{name}/{number}") for number in range(2)]
    return encoded(_of(name), "GIF", save_all=True, append_images=others)


def _inks(name: str) -> bytes:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return encoded(_of(name).convert("CMYK"), "JPEG", icc_profile=profile, quality=95)


def _gray(name: str) -> np.ndarray:
    return np.asarray(_of(name).convert("L"))


def _sixteen(name: str) -> bytes:
    return encoded(Image.fromarray(_gray(name).astype(np.uint16) * 16), "PNG")  # 12 bits in 16


def _deep_images(folder: Path) -> Found:
    names = ["train/ant/deep.png", "train/bee/unit.tif", "train/cat/levels.tif"]
    _write(folder, names[0], _sixteen(names[0]))
    _write(folder, names[1], _floats(_gray(names[1]) / 255.0))
    _write(folder, names[2], _floats(_gray(names[2])))
    return {
        ("deep", frozenset(names)),
        ("few levels", frozenset(names[:1])),
        ("mixed ranges", frozenset(names[1:])),
    }


def _strays(folder: Path) -> Found:
    names = ["loose.jpg", "train/ant/photo.bak", "train/bee/noending", "train/cat/raw.cr2", "test/beside.png"]
    for name in names[:3]:
        _write(folder, name, encoded(picture(_seed(name))))
    _write(folder, names[3], b"II*\0" + bytes(200))
    _write(folder, names[4], encoded(picture(_seed(names[4])), "PNG"))
    return {("left out", frozenset([name])) for name in names}


def _transparent_images(folder: Path) -> Found:
    names = ["train/bee/ghost.png", "train/cat/palette.gif"]
    _write(folder, names[0], _transparent(names[0]))
    _write(folder, names[1], _palette(names[1]))
    return {("transparent", frozenset(names))}


def _gigantic(name: str) -> bytes:
    return encoded(_of(name).convert("L").resize((8000, 6400), Image.Resampling.NEAREST), quality=50)


ODD: dict[str, Defect] = {
    "same file twice": _equal("train/ant/one.jpg", "train/ant/two.jpg", kind="duplicate"),
    "same file in two splits": _equal("train/bee/seen.jpg", "test/bee/seen.jpg", kind="leak"),
    "same file under two labels": _equal("train/ant/both.jpg", "train/cat/both.jpg", kind="two labels"),
    "same file in two splits under two labels": _equal(
        "train/ant/all.jpg", "validation/bee/all.jpg", kind="leak + two labels"
    ),
    "picture saved in another format": _equal(
        "train/bee/photo.jpg", "train/bee/photo.webp", kind="near duplicate", again=True
    ),
    "picture at half size": _equal("train/cat/big.jpg", "train/cat/small.jpg", kind="near duplicate", half=True),
    "picture saved anew in two splits": _equal(
        "train/cat/known.jpg", "validation/cat/known.png", kind="near leak", again=True
    ),
    "picture saved anew under two labels": _equal(
        "test/ant/twice.jpg", "test/bee/twice.jpg", kind="near two labels", again=True
    ),
    "PNG called JPEG": _one("wrong ending", "train/ant/really.jpg", lambda name: encoded(_of(name), "PNG")),
    "JPEG called PNG": _one("wrong ending", "test/cat/really.png", lambda name: encoded(_of(name))),
    "one color": _one("blank", "train/ant/black.png", lambda name: encoded(Image.new("RGB", (96, 80)), "PNG")),
    "one pixel": _one("tiny", "train/bee/dot.png", lambda name: encoded(_of(name, (5, 4)), "PNG")),
    "thumbnail among photos": _one("tiny", "train/cat/icon.png", lambda name: encoded(_of(name, (18, 16)), "PNG")),
    "banner": _one("extreme shape", "test/ant/banner.png", lambda name: encoded(_of(name, (500, 40)), "PNG")),
    "gigantic": _one("huge", "train/ant/wall.jpg", _gigantic),
    "extra bytes": _one("damaged", "validation/cat/extra.jpg", _extra_bytes),
    "several frames": _one("frames", "train/ant/film.gif", _frames),
    "inks with a profile": _one("inks", "train/bee/inks.jpg", _inks),
    "deep images": _deep_images,
    "transparent images": _transparent_images,
    "files that are no rows": _strays,
}


# Classes


def _empty_class(folder: Path) -> Found:
    (folder / "train" / "dog").mkdir()
    return {("empty class", frozenset())}


def _rare_class(folder: Path) -> Found:
    (folder / "train" / "elk").mkdir()
    for number in range(2):
        name = f"train/elk/{number}.jpg"
        _write(folder, name, encoded(picture(_seed(name))))
    return {("rare class", frozenset())}


def _alike_class(folder: Path) -> Found:
    for split, count in SPLITS.items():
        (folder / split / "Ant ").mkdir()
        for number in range(count):
            name = f"{split}/Ant /{number}.jpg"
            _write(folder, name, encoded(picture(_seed(name))))
    return {("like another class", frozenset())}


CLASS_DEFECTS: dict[str, Defect] = {
    "class without images": _empty_class,
    "class of two images": _rare_class,
    "class called like another": _alike_class,
}
ALL = {**BROKEN, **ODD, **CLASS_DEFECTS}


def make_hostile(folder: Path, defects: dict[str, Defect] = ALL) -> Found:
    """A clean folder, then every defect.

    Returns:
        What an audit has to find, and nothing else.
    """
    make_clean(folder)
    return set().union(*(defect(folder) for defect in defects.values()))


def clean(folder: Path, target: Path, found: Found) -> Path:
    """A copy of a hostile folder without the files that can't be read."""
    broken = {file for kind, files in found if kind == "broken" for file in files}
    shutil.copytree(
        folder,
        target,
        symlinks=True,
        ignore=lambda parent, names: [n for n in names if str(Path(parent, n).relative_to(folder)) in broken],
    )
    return target
