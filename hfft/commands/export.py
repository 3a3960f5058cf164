"""`hfft export`: a trained model -> a folder with model.onnx, checked against torch on real images."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hfft._version import __version__
from hfft.data.images.decoding import decode_row
from hfft.data.images.resize_mode import check_processor
from hfft.data.images.transforms import Transform
from hfft.data.sources.of_run import images_of_run
from hfft.errors import DataError, HfftError, ModelError
from hfft.inference.browsers import BROWSERS, known_processor, lacks, name_precision
from hfft.inference.classifier import Classifier
from hfft.inference.extras import require
from hfft.inference.graph import INPUT, OUTPUT, write_graph
from hfft.inference.images import find_images
from hfft.inference.parity import Parity, ParityError, compare
from hfft.inference.places import check_folder, name_of
from hfft.inference.reading import ImageLike, Ready, read_ahead
from hfft.inference.standalone import without_hfft
from hfft.inference.writing import WritingError
from hfft.model.checkpoint import quiet
from hfft.runs.record import EXPORT, RunRecord
from hfft.system.files import write_folder, write_json, write_text
from hfft.system.markdown import escape
from hfft.system.progress import SOON, bar

_Entry = tuple[str, torch.Tensor]  # name of an image, and its pixels
MOST_IMAGES = 1000
_GENERATED = 32
_AHEAD = 32  # images decoded before they are needed
_FILES = (
    "onnx/model.onnx",
    "onnx/model.onnx.data",
    "model.onnx",  # of earlier versions
    "model.onnx.data",
    "config.json",
    "preprocessor_config.json",
    "parity.json",
    "predict.py",
    "README.md",
    "__pycache__/predict.*",
)
_CARD = """# {name}

`model.onnx`, exported by hfft {version}: from `pixel_values`, (batch, {shape}) float32, to `logits`,
(batch, {classes}) float32, for any number of images. Its metadata holds `labels`, in the order of the logits, and what
the images need: {preprocessing}.

Beside torch, on {images} {what}: logits differ by at most {difference:.1e}, and the same {answer} for {same}.

{use}
{missing}"""
_USE = """```bash
python predict.py image.jpg   # with onnxruntime, numpy and Pillow alone
```"""
_USE_BROWSER = """
```js
import { pipeline } from '@huggingface/transformers';   // in a browser or Node
const classify = await pipeline('image-classification', 'this/folder');
```"""
_USE_PROCESSOR = (
    """Images have to be prepared by the image processor, `AutoImageProcessor.from_pretrained("this/folder")`."""
)


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: Holds onnx/model.onnx, and beside onnx what says how to use it.
        parity: How far it agrees with torch.
        missing: What those who open it without hfft have to do themselves, a sentence each.
    """

    folder: Path
    parity: Parity
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Sample:
    """Images to check with.

    Attributes:
        what: What they are.
        count: How many.
        read: Goes through them: name and (C, H, W) float32 of each.
    """

    what: str
    count: int
    read: Callable[[Transform], Iterator[_Entry]]


def export_onnx(
    source: str,
    *,
    output: Path | None = None,
    images: Path | None = None,
    most: int = MOST_IMAGES,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    subfolder: str | None = None,
) -> Export:
    """Export a model to ONNX, compare it with torch in onnxruntime, and only then put it in its place.

    Args:
        source: Run folder, model folder, adapter folder or Hub id.
        output: Folder to write; `onnx` in the source's folder when None.
        images: Folder of images to compare on. When None: the run's test images, or validation or training images
            where it has none; for a model without a run, generated images.
        most: Compare on so many images at most, evenly spread.
        overwrite: Whether an earlier export is replaced.
        trust_remote_code: As for `Classifier.from_pretrained`.
        subfolder: As for `Classifier.from_pretrained`.

    Raises:
        MissingPackageError: If a package of the extra `onnx` is missing.
        DataError: If the folder can't be written, or there are no such images.
        ModelError: If there is no such model, or its network can't be exported.
        ParityError: If what was exported computes something else. Nothing is written.
    """
    require("onnx", "onnx", "onnxscript", "onnxruntime")
    folder = _folder(source, output)
    place = check_folder(folder, "--output", _FILES, overwrite=overwrite)
    sample = _sample(source, images, most)
    classifier = Classifier.from_pretrained(
        source, device="cpu", trust_remote_code=trust_remote_code, subfolder=subfolder
    )
    check_processor(classifier.processor)
    done: list[tuple[Parity, tuple[str, ...]]] = []
    try:
        write_folder(place, lambda aside: done.append(_write(aside, name_of(source), classifier, sample)))
    except OSError as error:
        raise WritingError(f"--output {folder}: can't be written: {error.strerror or error}") from error
    return Export(folder, *done[0])


def _folder(source: str, output: Path | None) -> Path:
    if output is not None:
        return output
    if not Path(source).is_dir():
        raise DataError(f"{source} is no folder here, in which to put the export; say where with --output FOLDER")
    return Path(source) / EXPORT


def _sample(source: str, folder: Path | None, most: int) -> _Sample:
    """Images to check with; none is read yet."""
    if folder is not None:
        found = list(find_images([str(folder)]).images)
        return _of_images(f"images of {folder.name}", [found[k] for k in _spread(len(found), most)])
    if not RunRecord(source).is_run:
        return _of_images("generated images", _generate(min(_GENERATED, most)))
    try:
        splits = images_of_run(Path(source)).splits
    except HfftError as error:
        raise DataError(f"{error}; give other images to check the export on with --images FOLDER") from error
    split = next(name for name in ("test", "validation", "train") if name in splits)
    rows: Any = splits[split].select(_spread(len(splits[split]), most))
    return _Sample(
        f"{split} images of the run",
        len(rows),
        lambda transform: ((row["file"], transform(decode_row(row))) for row in rows),
    )


def _of_images(what: str, images: Sequence[ImageLike]) -> _Sample:
    def read(transform: Transform) -> Iterator[_Entry]:
        for entry in read_ahead(images, transform, ahead=_AHEAD):
            if not isinstance(entry, Ready):
                raise DataError(f"{entry.file}: {entry.reason}")
            yield entry.file, entry.pixels

    return _Sample(what, len(images), read)


def _spread(count: int, most: int) -> list[int]:
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def _generate(count: int) -> list[ImageLike]:
    """Coarse noise, from which photos differ less than from fine noise."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (12, 16, 3), dtype=np.uint8).repeat(20, 0).repeat(20, 1) for _ in range(count)]


def _write(folder: Path, name: str, classifier: Classifier, sample: _Sample) -> tuple[Parity, tuple[str, ...]]:
    from hfft.inference import onnx_predict  # onnxruntime may be missing
    from hfft.inference.preprocessing import describe_preprocessing

    model: Any = classifier.model
    processor: Any = classifier.processor
    read = sample.read(classifier.transform)
    entries = iter(bar("comparing", sample.count, read, delay=SOON))
    first = next(entries)
    shape = tuple(first[1].shape)
    how = describe_preprocessing(processor, classifier.transform)
    saved = known_processor(processor, classifier.transform, how)
    missing = tuple(lacks(model.config, saved, how))
    metadata = {
        "name": name,
        "labels": json.dumps(classifier.classes, ensure_ascii=False),
        "processor": json.dumps(processor.to_dict(), ensure_ascii=False),
        **({} if how is None else {"preprocessing": json.dumps(how)}),
        **_thresholds(classifier),
        "hfft_version": __version__,
    }
    graph = folder / EXPORT / "model.onnx"
    graph.parent.mkdir()
    write_graph(model, shape, graph, metadata)
    parity = compare(
        _session(graph),
        lambda batch: model(pixel_values=batch).logits,
        _of_one_shape(chain([first], entries), shape),
        sample.what,
        None if classifier.thresholds is None else np.log(classifier.thresholds / (1 - classifier.thresholds)),
    )
    with quiet():
        model.config.save_pretrained(folder)
        saved.save_pretrained(folder)
    name_precision(folder / "config.json")
    write_json(folder / "parity.json", asdict(parity))
    if how is not None:
        write_text(folder / "predict.py", without_hfft(onnx_predict))
    write_text(folder / "README.md", _card(name, shape, classifier, parity, missing, is_plain=how is not None))
    return parity, missing


def _card(
    name: str,
    shape: tuple[int, ...],
    classifier: Classifier,
    parity: Parity,
    missing: Sequence[str],
    *,
    is_plain: bool,
) -> str:
    use = _USE if is_plain else _USE_PROCESSOR
    return _CARD.format(
        name=escape(name),
        version=__version__,
        shape=", ".join(map(str, shape)),
        classes=len(classifier.classes),
        preprocessing="`processor`, the settings of the image processor"
        + (", and `preprocessing`, the same as resize, crop, mean and std" if is_plain else ""),
        images=parity.images,
        what=parity.what,
        difference=parity.largest_difference,
        same=parity.same_top1,
        answer=parity.answer,
        use=use if any(BROWSERS in line for line in missing) else use + _USE_BROWSER,
        missing="".join(f"\n- {line}" for line in missing) + ("\n" if missing else ""),
    )


def _thresholds(classifier: Classifier) -> dict[str, str]:
    """For the metadata of a model for any number of labels: the probability from which each is given."""
    if classifier.thresholds is None:
        return {}
    return {"thresholds": json.dumps(dict(zip(classifier.classes, classifier.thresholds.tolist(), strict=True)))}


def _of_one_shape(entries: Iterable[_Entry], shape: tuple[int, ...]) -> Iterator[_Entry]:
    for name, pixels in entries:
        if tuple(pixels.shape) != shape:
            raise ModelError(
                f"the image processor makes {tuple(pixels.shape)} of {name} and {shape} of another image; an export "
                "needs one that makes all images equally large"
            )
        yield name, pixels


def _session(file: Path) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; a warning about the graph is of no use to a user
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # torch wants the cores in turn
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no base class of its own
        raise ParityError(f"onnxruntime can't open what was exported: {error}; nothing written") from error
    return lambda pixels: np.asarray(session.run([OUTPUT], {INPUT: pixels})[0])
