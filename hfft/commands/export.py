"""`hfft export`: a trained model -> a folder with model.onnx, compared with torch on real images."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from hfft._version import __version__
from hfft.data.images.decoding import Decoded, decode_row, stored_path
from hfft.data.images.resize_mode import check_processor
from hfft.data.images.transforms import Transform
from hfft.data.sources.reading import images_of_run
from hfft.errors import DataError, HfftError, ModelError, first_line
from hfft.inference.classifier import Classifier
from hfft.inference.images import find_input_images
from hfft.inference.onnx_export import (
    ParityResult,
    Preprocessing,
    compare_outputs,
    open_graph,
    plan_preprocessing,
    write_graph,
)
from hfft.inference.opening import source_name
from hfft.inference.outputs import check_output_folder, source_without_hfft, write_output_folder
from hfft.model.config import quiet
from hfft.runs.record import EXPORT, RunRecord
from hfft.system.files import read_json, write_json, write_text
from hfft.system.lazy_imports import require
from hfft.system.markdown import escape
from hfft.system.progress import SOON, bar
from hfft.system.text import path_text, printable_path

MAX_IMAGES = 1000
_GENERATED = 32
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

Compared with torch on {images} {what}: logits differ by at most {difference:.1e}, and the same {answer} for {same}.

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
    """What was written."""

    folder: Path  # holds onnx/model.onnx, and next to onnx what says how to use it
    parity: ParityResult  # how far it agrees with torch
    missing: tuple[str, ...] = ()  # what users of the folder without hfft have to do without, a sentence each


class _Sample(NamedTuple):
    what: str  # the images are, which both are compared on
    total: int
    images: Iterable[tuple[str, Decoded]]  # names and pixels, decoded lazily


def export_onnx(
    source: str,
    *,
    output: Path | None = None,
    images: Path | None = None,
    most: int = MAX_IMAGES,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    subfolder: str | None = None,
) -> Export:
    """Export a model to ONNX, compare it with torch in onnxruntime, and only then put the folder in its place.

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
        HfftError: If a package of the extra `onnx`, the model or the images are missing, the folder can't be written,
            or the network can't be exported.
        ParityError: If the exported model computes something else. Nothing is written.
    """
    require("onnx", "onnx", "onnxscript", "onnxruntime")
    if output is None:
        if not Path(source).is_dir():
            raise DataError(f"{source} is no folder here, in which to put the export; say where with --output FOLDER")
        output = Path(source) / EXPORT
    folder = check_output_folder(output, "--output", _FILES, overwrite=overwrite)
    sample = _sample(source, images, most)
    classifier = Classifier.from_pretrained(
        source, device="cpu", trust_remote_code=trust_remote_code, subfolder=subfolder
    )
    check_processor(classifier.processor)
    exports: list[Export] = []

    def write(aside: Path) -> None:
        parity, missing = _write_export(aside, source_name(source), classifier, sample)
        exports.append(Export(output, parity, missing))

    write_output_folder(folder, "--output", write)
    return exports[0]


def _sample(source: str, folder: Path | None, most: int) -> _Sample:
    if folder is not None:
        found: Any = list(find_input_images([str(folder)]).images)
        rows = [
            {"file": printable_path(file), "image": {"bytes": None, "path": stored_path(path_text(file))}}
            for file in (found[k] for k in _spread(len(found), most))
        ]
        return _decoded(f"images of {folder.name}", rows)
    if not RunRecord(source).is_run:
        count = min(_GENERATED, most)
        return _Sample("generated images", count, _generated(count))
    try:
        splits = images_of_run(Path(source)).splits
    except HfftError as error:
        raise DataError(f"{error}; give other images to check the export on with --images FOLDER") from error
    split = next(name for name in ("test", "validation", "train") if name in splits)
    return _decoded(f"{split} images of the run", splits[split].select(_spread(len(splits[split]), most)))


def _decoded(what: str, rows: Any) -> _Sample:
    return _Sample(what, len(rows), ((row["file"], decode_row(row)) for row in rows))


def _spread(count: int, most: int) -> list[int]:
    return np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()


def _generated(count: int) -> Iterator[tuple[str, Decoded]]:
    """Coarse noise, which is closer to photos than fine noise."""
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8).repeat(20, 0).repeat(20, 1)
        yield str(number), Image.fromarray(pixels)


def _write_export(
    folder: Path, name: str, classifier: Classifier, sample: _Sample
) -> tuple[ParityResult, tuple[str, ...]]:
    from hfft.inference import onnx_predict  # onnxruntime may be missing

    model: Any = classifier.model
    processor: Any = classifier.processor
    entries = _transformed(sample, classifier.transform)
    first = next(entries)
    shape = tuple(first[1].shape)
    preprocessing = plan_preprocessing(model.config, processor, classifier.transform)
    metadata = {
        "name": name,
        "labels": json.dumps(classifier.classes, ensure_ascii=False),
        "processor": json.dumps(processor.to_dict(), ensure_ascii=False),
        "hfft_version": __version__,
    }
    if preprocessing.steps is not None:
        metadata["preprocessing"] = json.dumps(preprocessing.steps)
    thresholds = classifier.thresholds
    if thresholds is not None:
        metadata["thresholds"] = json.dumps(dict(zip(classifier.classes, thresholds.tolist(), strict=True)))
    graph = folder / "onnx" / "model.onnx"
    graph.parent.mkdir()
    write_graph(model, shape, graph, metadata)
    parity = compare_outputs(
        open_graph(graph),
        lambda batch: model(pixel_values=batch).logits,
        chain([first], entries),
        sample.what,
        None if thresholds is None else np.log(thresholds / (1 - thresholds)),
    )
    with quiet():
        model.config.save_pretrained(folder)
        preprocessing.processor.save_pretrained(folder)
    # transformers.js looks for quantized weights in a browser, unless the config says that weights are float32.
    config = folder / "config.json"
    write_json(config, {**read_json(config), "transformers.js_config": {"dtype": "fp32"}})
    write_json(folder / "parity.json", asdict(parity))
    if preprocessing.steps is not None:
        write_text(folder / "predict.py", source_without_hfft(onnx_predict))
    write_text(folder / "README.md", _card(name, shape, classifier.classes, parity, preprocessing))
    return parity, preprocessing.missing


def _transformed(sample: _Sample, transform: Transform) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and pixels, all of one shape."""
    shape = None
    for name, decoded in bar("comparing", sample.total, sample.images, delay=SOON):
        try:
            pixels = transform(decoded)
        except (ValueError, RuntimeError) as error:
            raise DataError(f"{name}: the image processor can't take it: {first_line(error)}") from error
        shape = shape or tuple(pixels.shape)
        if tuple(pixels.shape) != shape:
            raise ModelError(
                f"the image processor makes {tuple(pixels.shape)} of {name} and {shape} of another image; an export "
                "needs one that makes all images equally large"
            )
        yield name, pixels


def _card(
    name: str, shape: tuple[int, ...], classes: tuple[str, ...], parity: ParityResult, preprocessing: Preprocessing
) -> str:
    has_steps = preprocessing.steps is not None
    use = _USE if has_steps else _USE_PROCESSOR
    return _CARD.format(
        name=escape(name),
        version=__version__,
        shape=", ".join(map(str, shape)),
        classes=len(classes),
        preprocessing="`processor`, the settings of the image processor"
        + (", and `preprocessing`, the same as resize, crop, mean and std" if has_steps else ""),
        images=parity.images,
        what=parity.what,
        difference=parity.largest_difference,
        same=parity.same_top1,
        answer=parity.answer,
        use=use + _USE_BROWSER if preprocessing.opens_in_js else use,
        missing="".join(f"\n- {line}" for line in preprocessing.missing) + ("\n" if preprocessing.missing else ""),
    )
