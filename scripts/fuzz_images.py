"""Damaged images of every format: each is decoded or refused with a reason, soon, in little memory, and always alike.

    python scripts/fuzz_images.py --count 2000

For every mutant, training, audit and prediction must agree on whether it is an image; nothing but a DataError may come
out, none may take longer than 20 seconds, and the process must stay below 2.5 GiB. Mutants are functions of their
number: `--only 1234 --save x.bin` writes one.
"""

import argparse
import io
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image

from hfft.data.audit.audit import examine_content
from hfft.data.images.decoding import decode, decode_bytes, on_background
from hfft.errors import DataError

_LONGEST = 20.0  # seconds for one image
_MOST = 2.5  # GiB
_MODES = ("RGB", "L", "RGBA", "P", "1", "CMYK", "I;16", "F", "LA")
_NUMBERS = (0, 1, 255, 4096, 65535, 2**31 - 1, 2**31, 2**32 - 1)
_KINDS = {
    "JPEG": ({}, {"progressive": True}, {"quality": 30, "subsampling": "4:4:4"}, {"restart_marker_blocks": 2}),
    "PNG": ({}, {"optimize": True}),
    "WEBP": ({}, {"lossless": True}),
    "GIF": ({},),
    "BMP": ({},),
    "TIFF": ({}, {"compression": "tiff_lzw"}, {"compression": "tiff_deflate"}, {"compression": "jpeg"}),
    "AVIF": ({},),
    "JPEG2000": ({},),
    "PPM": ({},),
    "TGA": ({}, {"rle": True}),
    "ICO": ({},),
    "PCX": ({},),
    "DDS": ({},),
}


def whole_images() -> list[bytes]:
    """A small image in every format and mode that Pillow writes, the same at each call."""
    rng = np.random.default_rng(0)
    blotches = Image.fromarray(rng.integers(0, 256, (9, 11, 4), dtype=np.uint8), "RGBA").resize((97, 83))
    found = []
    for kind, all_options in _KINDS.items():
        for mode in _MODES:
            image = Image.fromarray(np.asarray(blotches.convert("L"), np.uint16) * 257) if mode == "I;16" else None
            image = image or blotches.convert("RGB").convert(mode) if mode not in ("RGBA", "LA") else blotches
            image = image.convert("LA") if mode == "LA" else image
            for options in all_options:
                if options.get("compression") == "jpeg" and mode not in ("RGB", "L"):
                    continue  # libtiff can't, and Pillow's encoder destroys its memory on the way out
                stream = io.BytesIO()
                try:
                    image.save(stream, kind, **options)
                except (OSError, ValueError, KeyError, TypeError):  # a mode that the format doesn't have
                    continue
                found.append(stream.getvalue())
    return found


def mutant(number: int, whole: list[bytes]) -> bytes:
    """A damaged image: cut, overwritten, with pieces taken out, put in or exchanged, or glued to another."""
    rng = np.random.default_rng([7, number])
    content = bytearray(whole[rng.integers(len(whole))])
    for _ in range(rng.integers(1, 4)):
        size = max(len(content), 1)
        front = min(size, 600) if rng.random() < 0.6 else size  # headers are where most can go wrong
        place = int(rng.integers(front))
        match rng.integers(7):
            case 0:
                del content[int(rng.integers(1, size + 1)) :]
            case 1:
                for spot in rng.integers(front, size=rng.integers(1, 9)):
                    if spot < len(content):
                        content[spot] = int(rng.integers(256))
            case 2:
                content[place : place + 4] = int(rng.choice(_NUMBERS)).to_bytes(4, "big")
            case 3:
                content[place : place + 4] = int(rng.choice(_NUMBERS)).to_bytes(4, "little")
            case 4:
                del content[place : place + int(rng.integers(1, 64))]
            case 5:
                content[place:place] = rng.integers(0, 256, rng.integers(1, 64), dtype=np.uint8).tobytes()
            case _:
                content[place:] = whole[rng.integers(len(whole))][place:]
    return bytes(content)


def judge(content: bytes) -> str:
    """`image` or `refused`; what training, audit and prediction disagree on is an AssertionError."""
    examined = examine_content(content, "full")
    problem, picture = None, None
    try:
        picture = on_background(decode_bytes(content), (1, 2, 3))
    except DataError as error:
        problem = str(error)
    if picture is None:
        assert examined.problem is not None, f"training refuses what the audit takes: {problem}"
        assert problem == examined.problem, f"two reasons: {problem} / {examined.problem}"
        return "refused"
    assert examined.problem is None, f"the audit refuses what training takes: {examined.problem}"
    size = picture.shape[-2:] if isinstance(picture, torch.Tensor) else picture.size[::-1]
    assert decode(content).size == tuple(reversed(size)), "two sizes"
    return "image"


def _run_child(first: int, count: int) -> None:
    """Judge mutants, and print the number of each before it is looked at."""
    whole = whole_images()
    for number in range(first, first + count):
        print(f"at {number}", flush=True)
        begun = time.monotonic()
        print(f"is {judge(mutant(number, whole))}", flush=True)
        taken = time.monotonic() - begun
        if taken > 2:
            print(f"slow {number} {taken:.1f}", flush=True)
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f}", flush=True)


def _keep(stream: IO[str], kept: list[str]) -> None:
    kept.append(stream.read())


def fuzz(first: int, count: int) -> tuple[Counter[str], list[str], float]:
    """Judge mutants in a process that may crash or hang.

    Returns:
        How many were images and how many were refused, what went wrong, and the most memory in GiB.
    """
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    peak, at, end = 0.0, first, first + count
    while at < end:
        command = [sys.executable, __file__, "--child", str(at), str(end - at)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        errors: list[str] = []
        assert child.stdout is not None
        assert child.stderr is not None
        reader = threading.Thread(target=_keep, args=(child.stderr, errors), daemon=True)
        reader.start()
        watch: threading.Timer | None = None
        hung = threading.Event()
        begun = False
        for line in child.stdout:
            if watch is not None:
                watch.cancel()
            word, _, value = line.strip().partition(" ")
            if word == "at":
                at, begun = int(value), True
                watch = threading.Timer(_LONGEST, lambda process=child, flag=hung: (flag.set(), process.kill()))
                watch.start()
            elif word == "is":
                counts[value] += 1
            elif word == "slow":
                print(f"slow: mutant {value} s")
            else:
                peak, at = max(peak, float(value)), end
        if watch is not None:
            watch.cancel()
        code = child.wait()
        reader.join()
        if code != 0:
            last = "".join(errors).strip().splitlines()[-1:] or [f"exit code {code}"]
            wrong.append(f"mutant {at}: " + (f"more than {_LONGEST:g} s" if hung.is_set() else last[0]))
            at += 1
            if not begun:
                break
    return counts, wrong, peak


def main() -> int:
    """Run from the command line; 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int, help="judge this mutant alone, in this process")
    parser.add_argument("--save", type=Path, help="write the mutant of --only")
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _run_child(*arguments.child)
        return 0
    if arguments.only is not None:
        content = mutant(arguments.only, whole_images())
        if arguments.save:
            arguments.save.write_bytes(content)
        print(judge(content))
        return 0
    begun = time.monotonic()
    counts, wrong, peak = fuzz(arguments.first, arguments.count)
    taken = time.monotonic() - begun
    print(f"{sum(counts.values())} mutants in {taken:.0f} s: {counts['image']} images, {counts['refused']} refused")
    print(f"most memory: {peak:.2f} GiB")
    for line in wrong:
        print(f"wrong: {line}")
    return int(bool(wrong) or peak > _MOST)


if __name__ == "__main__":
    sys.exit(main())
