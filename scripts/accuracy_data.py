"""The data sets of benchmark_accuracy.py: images on disk once, and one table of splits per repetition.

`FOLDER/SET/images/` holds the images, `FOLDER/SET/split-N.csv` the columns path, label, split and kind; a method reads
the images of `train` and `validation`, and scores those of `test` once, at its end. A finished set is left alone.

- `solar`: ELPV (package `elpv-dataset`), CC BY-NC-SA 4.0. `defective` from a defect probability of 0.5, the rule of
  Deitsch et al. (Solar Energy 185, 2019): the experts' answer 1/3 is functional, 2/3 defective. Split 75/25, alike in
  probability and module type; kind is the module type, `mono` or `poly`.
- `fashion_100`, `fashion_1000`: Fashion-MNIST (Debian's `dataset-fashion-mnist`, MIT), so many training and validation
  images of each class; the test images are its own 10,000, in every split.
- `textile`: simulated defects of fabric (package `conformal-clip-data`, MIT), 2,000 images, split 75/25; kind is none.
- `digits`: scikit-learn's 1,797 digits (UCI, CC BY 4.0), enlarged to 64 x 64, split 75/25.

Validation is a fifth of what is not test, stratified.
"""

import csv
import gzip
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from prepare_quickstart import PreparationError, package_folder, read_cells

SEED = 20181101  # of all splits
TEST, VALIDATION = 0.25, 0.2  # shares: of all images, and of those that are not test
FASHION_CLASSES = (
    *("t_shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle_boot"),
)
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Picture:
    """An image of a data set.

    Attributes:
        name: File name below `images/`.
        label: Its class.
        stratum: What splits keep in proportion.
        image: A file to copy, or pixels, (H, W) uint8.
        kind: Part of the test images that is also scored alone; empty for none.
        is_test: True and False where the data set has a test split of its own.
    """

    name: str
    label: str
    stratum: str
    image: Path | np.ndarray
    kind: str = ""
    is_test: bool | None = None


def solar(_: Path) -> Iterator[Picture]:
    """The cells in the order of labels.csv."""
    folder = _package("elpv_dataset", "elpv-dataset") / "data"
    for cell in read_cells(folder / "labels.csv"):
        kind = cell.module_type
        yield Picture(cell.name, cell.label, f"{cell.probability} {kind}", folder / "images" / cell.name, kind)


def textile(_: Path) -> Iterator[Picture]:
    """The images of the three simulated conditions."""
    folder = _package("conformal_clip_data", "conformal-clip-data") / "data/textile_images/simulated"
    for file in sorted(folder.rglob("*.jpg")):
        label = file.parent.name
        yield Picture(f"{label}_{file.name}", label, label, file)


def _package(module: str, name: str) -> Path:
    try:
        return package_folder(module)
    except PreparationError as error:
        raise PreparationError(f"the package is not installed: pip install {name}") from error


def digits(_: Path) -> Iterator[Picture]:
    """The digits as prepare_digits.py makes them."""
    from prepare_digits import SIDE
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    for number, (pixels, label) in enumerate(zip(found.images, found.target.tolist(), strict=True)):  # (8, 8)
        image = Image.fromarray((pixels / 16 * 255).astype(np.uint8))
        large = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        yield Picture(f"{number:04d}.png", str(label), str(label), large)


def fashion(folder: Path) -> Iterator[Picture]:
    """All 70,000 images of Fashion-MNIST."""
    for part, is_test in (("train", False), ("t10k", True)):
        images = _idx(folder / f"{part}-images-idx3-ubyte.gz")
        labels = _idx(folder / f"{part}-labels-idx1-ubyte.gz")
        for number, (pixels, label) in enumerate(zip(images, labels.tolist(), strict=True)):
            name = FASHION_CLASSES[label]
            yield Picture(f"{part}_{number:05d}.png", name, name, pixels, is_test=is_test)


def _idx(file: Path) -> np.ndarray:
    """An array in the format of MNIST: two zeros, the type (8 is uint8), the number of axes, their lengths."""
    if not file.is_file():
        raise PreparationError(f"{file} is missing: apt-get install dataset-fashion-mnist, or name --fashion-mnist")
    content = gzip.decompress(file.read_bytes())
    lengths = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(lengths)


# By name: what lists the images, and how many of each class train and validate (all, when None).
SETS: dict[str, tuple[Callable[[Path], Iterator[Picture]], int | None]] = {
    "solar": (solar, None),
    "fashion_100": (fashion, 100),
    "fashion_1000": (fashion, 1000),
    "textile": (textile, None),
    "digits": (digits, None),
}


def prepare(name: str, folder: Path, splits: int, fashion_folder: Path = FASHION_FOLDER) -> list[Path]:
    """Write the images of a data set and its tables of splits, as far as they are missing; gives the tables."""
    tables = [folder / name / f"split-{number}.csv" for number in range(splits)]
    if not all(table.is_file() for table in tables):
        list_pictures, most = SETS[name]
        pictures = list(list_pictures(fashion_folder))
        rows = [split_pictures(pictures, number, most) for number in range(splits)]
        used = {picture.name: picture for split in rows for picture, _ in split}
        images = folder / name / "images"
        missing = [picture for file, picture in used.items() if not (images / file).is_file()]
        images.mkdir(parents=True, exist_ok=True)
        for picture in missing:
            _write_image(images / picture.name, picture.image)
        for table, split in zip(tables, rows, strict=True):
            _write_table(table, split)
    return tables


def split_pictures(pictures: list[Picture], number: int, most: int | None = None) -> list[tuple[Picture, str]]:
    """Pictures with their splits: the same for the same number, which is that of the repetition."""
    rng = np.random.default_rng([SEED, number])
    own = [picture for picture in pictures if picture.is_test]
    if own:
        test, rest = own, [picture for picture in pictures if not picture.is_test]
    else:
        test, rest = _divide(pictures, TEST, rng)
    if most is not None:
        rest = _at_most(rest, most, rng)
    validation, train = _divide(rest, VALIDATION, rng)
    parts = {"train": train, "validation": validation, "test": test}
    return [(picture, split) for split, part in parts.items() for picture in part]


def _divide(pictures: list[Picture], share: float, rng: np.random.Generator) -> tuple[list[Picture], list[Picture]]:
    """A share of the pictures of each stratum, and the others; the rounding of one stratum makes up for the last's."""
    taken: set[int] = set()
    seen = 0
    strata = np.asarray([picture.stratum for picture in pictures])
    for stratum in np.unique(strata):
        places = rng.permutation(np.flatnonzero(strata == stratum))
        seen += len(places)
        taken.update(places[: round(seen * share) - len(taken)].tolist())
    chosen = [picture for place, picture in enumerate(pictures) if place in taken]
    return chosen, [picture for place, picture in enumerate(pictures) if place not in taken]


def _at_most(pictures: list[Picture], most: int, rng: np.random.Generator) -> list[Picture]:
    labels = np.asarray([picture.label for picture in pictures])
    kept = [rng.permutation(np.flatnonzero(labels == label))[:most] for label in np.unique(labels)]
    return [pictures[place] for place in np.sort(np.concatenate(kept)).tolist()]


def _write_image(path: Path, image: Path | np.ndarray) -> None:
    """Write a file that is whole or absent."""
    partial = path.with_name(f".{path.name}")
    if isinstance(image, Path):
        partial.write_bytes(image.read_bytes())
    else:
        Image.fromarray(image).save(partial, path.suffix.removeprefix("."))
    partial.replace(path)


def _write_table(path: Path, rows: list[tuple[Picture, str]]) -> None:
    partial = path.with_name(f".{path.name}")
    with partial.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "label", "split", "kind"])
        writer.writerows([f"images/{one.name}", one.label, split, one.kind] for one, split in rows)
    partial.replace(path)


# What methods read and give


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        method: Its name.
        table: The data set's images and splits, as accuracy_data.py writes them.
        checkpoint: Folder.
        seed: Of the method; the number of the split.
        folder: For its files.
        result: File to write.
        minutes: Budget of `auto`.
    """

    method: str
    table: str
    checkpoint: str
    seed: int
    folder: str
    result: str
    minutes: float = 10.0


@dataclass(frozen=True)
class Outcome:
    """What a method gives: the class of each test image, and what it trained.

    Attributes:
        predictions: Test image, as the table names it, to its class.
        trainable: Parameters that were trained, in the phase that trained most.
        chosen: What validation chose.
        retention: Share of images to which the pretrained head still gives the same class.
    """

    predictions: Mapping[str, str]
    trainable: int
    chosen: str = ""
    retention: float | None = None


@dataclass(frozen=True)
class Row:
    """An image of a table, as accuracy_data.py writes it."""

    path: str
    label: str
    split: str
    kind: str


def read_rows(table: str) -> dict[str, list[Row]]:
    """The images of each split, in the order of the table."""
    rows: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    with open(table, encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            rows[row["split"]].append(Row(**row))
    return rows


def flips_of(table: str) -> bool | str:
    """Flips that leave an image's class as it is: known from what the images show."""
    return {"solar": "both", "textile": "both", "fashion_100": True, "fashion_1000": True}.get(
        Path(table).parent.name, False
    )


def outcome_of(job: Job, answers: np.ndarray, classes: Sequence[str], trainable: int, chosen: str) -> Outcome:
    """What class numbers say, which are in the order of the table's test images."""
    files = [row.path for row in read_rows(job.table)["test"]]
    predictions = {file: classes[int(number)] for file, number in zip(files, answers, strict=True)}
    return Outcome(predictions, trainable, chosen)
