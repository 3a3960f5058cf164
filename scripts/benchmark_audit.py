"""How long the audit takes and how much memory: a folder of made-up photos, audited twice.

`--images 10000` makes photos of 500 x 375, as data sets have them; `--images 100000 --size 64 48` is for the memory.
"""

import argparse
import io
import os
import resource
import tempfile
import time
from pathlib import Path
from threading import Event, Thread

import numpy as np
import psutil
from PIL import Image


def make_photos(folder: Path, count: int, size: tuple[int, int], classes: int = 10) -> int:
    """Write JPEGs that differ: blotches, edges and grain.

    Returns:
        Bytes in all.
    """
    rng = np.random.default_rng(0)
    grain = rng.normal(0, 8, (size[1] * 2, size[0] * 2, 3))
    total = 0
    for number in range(count):
        path = folder / f"class{number % classes}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BILINEAR
        )
        top, left = rng.integers(size[1]), rng.integers(size[0])
        pixels = (
            np.asarray(coarse.resize(size, Image.Resampling.BILINEAR))
            + grain[top : top + size[1], left : left + size[0]]
        )
        stream = io.BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
        total += path.write_bytes(stream.getvalue())
    return total


def _watch(stop: Event, seen: list[int]) -> None:
    """Sample the memory that only this process can give back, without pages of mapped files."""
    process = psutil.Process()
    while not stop.wait(0.2):
        info = process.memory_info()
        seen.append(info.rss - getattr(info, "shared", 0))


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--size", type=int, nargs=2, default=(500, 375), metavar=("WIDTH", "HEIGHT"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        os.environ["HF_HOME"] = f"{made}/home"  # read when the libraries are imported
        from hfft.commands.check_data import check_data

        total = make_photos(Path(made, "photos"), arguments.images, tuple(arguments.size))
        print(f"{arguments.images:,} images of {arguments.size[0]} x {arguments.size[1]}, {total / 2**20:,.0f} MiB")
        for title in ("first audit", "again"):
            seen: list[int] = []
            stop = Event()
            watch = Thread(target=_watch, args=(stop, seen), daemon=True)
            watch.start()
            begun, used = time.monotonic(), time.process_time()
            found = check_data(f"{made}/photos")
            taken, cpu = time.monotonic() - begun, time.process_time() - used
            stop.set()
            watch.join()
            shown = [f"{seen[int(share * (len(seen) - 1))] / 2**20:,.0f}" for share in (0, 0.25, 0.5, 0.75, 1)]
            print(f"{title}: {taken:.1f} s, {cpu:.1f} s of processor time, {len(found.findings)} findings")
            print(f"  MiB of memory at 0, 25, 50, 75, 100 % of the time: {', '.join(shown)}")
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(f"most of the process, mapped files included: {most:,.0f} MiB")


if __name__ == "__main__":
    main()
