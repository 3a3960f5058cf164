"""Memory while a run goes over many images: audit, training steps, evaluation of an epoch, scoring at the end.

    python scripts/memory_over_images.py [--images 100000] [--classes 10]

Made-up photos of 64 x 48, a ViT of two small blocks, one epoch of all its weights without replay. What counts is the
memory of this process and its data loader workers together, mapped files included, at quarters of each stage's time.
"""

import argparse
import bisect
import os
import tempfile
import time
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil
from benchmark_audit import make_photos

_SIDE = 32
_STAGES = ("audit", "training steps", "evaluation", "scoring and results")


def share_of_memory(process: psutil.Process) -> int:
    """Bytes of a process, those that it shares with others divided among them (PSS, Linux)."""
    try:
        return process.memory_full_info().pss
    except psutil.Error:  # it has just ended
        return 0


class Watch(Thread):
    """Samples memory twice a second."""

    def __init__(self) -> None:
        """Watch this process and all that it starts."""
        super().__init__(daemon=True)
        self.times: list[float] = []
        self.bytes: list[int] = []
        self.stopped = Event()

    def run(self) -> None:
        """Until stopped."""
        process = psutil.Process()
        while not self.stopped.wait(0.5):
            self.times.append(time.monotonic())
            self.bytes.append(sum(map(share_of_memory, [process, *process.children(recursive=True)])))


def save_checkpoint(folder: Path) -> None:
    """A ViT that hardly computes."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(
        image_size=_SIDE,
        patch_size=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": _SIDE, "width": _SIDE}).save_pretrained(folder)


def run(folder: Path, marks: list[float]) -> None:
    """One run, and when its stages began and ended."""
    from transformers import TrainerCallback

    import hfft

    class Marks(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            marks.append(time.monotonic())

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.monotonic())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.monotonic())

    recipe = {
        "name": "memory",
        "output_dir": str(folder / "runs"),
        "model": {"checkpoint": str(folder / "vit")},
        "data": {"source": str(folder / "photos"), "splits": {"validation": 0.3, "test": 0.3}},
        "training": {"per_device_train_batch_size": 64, "num_train_epochs": 1, "disable_tqdm": True},
        "precision": "float32",
        "replay": {"mode": "off"},
        "phases": [{"name": "all", "unfreeze": "all", "learning_rate": 1e-3}],
    }
    marks.append(time.monotonic())
    hfft.finetune(hfft.load_recipe(recipe), callbacks=[Marks()])
    marks.append(time.monotonic())


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        os.environ["HF_HOME"] = str(folder / "home")  # read when the libraries are imported
        make_photos(folder / "photos", arguments.images, (64, 48), arguments.classes)
        from hfft.system.lazy_imports import quick_imports

        with quick_imports():  # as the command line does, so that workers needn't copy what was imported
            import hfft.commands.finetune  # noqa: F401
        save_checkpoint(folder / "vit")
        marks: list[float] = []
        watch = Watch()
        watch.start()
        run(folder, marks)
        watch.stopped.set()
        watch.join()
    print(f"{arguments.images:,} images in {arguments.classes} classes; MiB at 0, 25, 50, 75, 100 % of the time")
    for stage, begin, end in zip(_STAGES, marks, marks[1:], strict=False):
        low, high = bisect.bisect(watch.times, begin), bisect.bisect(watch.times, end)
        seen = watch.bytes[low:high] or watch.bytes[low - 1 : low]
        shown = [f"{seen[int(share * (len(seen) - 1))] / 2**20:,.0f}" for share in (0, 0.25, 0.5, 0.75, 1)]
        print(f"{stage:20} {', '.join(shown)}, at most {max(seen) / 2**20:,.0f}  ({end - begin:.0f} s)")


if __name__ == "__main__":
    main()
