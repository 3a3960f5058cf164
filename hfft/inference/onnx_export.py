"""A network -> an ONNX file, compared with torch on the same pixels; and its image processor for models without hfft.

The exporter is torch's own, on top of torch.export: optimum-onnx 0.1.0, the newest, needs transformers below 4.58.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import ViTImageProcessor
from transformers.image_processing_backends import TorchvisionBackend

from hfft.data.images.transforms import Transform, background_of, evaluation_transform, pixel_scale
from hfft.errors import ModelError, first_line

TOLERANCE = 1e-4  # of logits up to 1; of larger ones, relative to the largest of the image
_INPUT, _OUTPUT = "pixel_values", "logits"  # as optimum calls them too
_OPSET = 20
_MAX_BYTES = 1_900_000_000  # of weights in one file; protobuf takes 2 GiB
_BATCH_SIZES = (1, 2, 5, 16)
_TOP_1, _LABELS = "class on top", "labels"
# What transformers.js 4.3 knows by its source (src/models/registry.js, image_processors.js). Ten networks were tried:
# beit, convnext, deit, dinov2, efficientnet, mobilevit, resnet, segformer, swin, vit.
_JS_NETWORKS = (
    *("beit", "convnext", "convnextv2", "deit", "dinov2", "dinov2_with_registers", "efficientnet", "fastvit", "hiera"),
    *("ijepa", "mobilenet_v1", "mobilenet_v2", "mobilevit", "mobilevitv2", "pvt", "resnet", "segformer", "swin"),
    *("vit", "vit_msn"),
)
_JS_PROCESSORS = (  # each with ImageProcessor at its end
    *("Bit", "CLIP", "ConvNext", "DeiT", "EfficientNet", "MobileNetV1", "MobileNetV2", "MobileViT", "Pvt"),
    *("Segformer", "Siglip", "ViT"),
)
_NOISE = ((375, 500), (601, 333), (333, 333), (90, 121), (31, 40))  # (height, width) of the test images
_MEAN, _LARGEST = 0.05, 3.0  # levels of 255: how far torchvision's 8-bit resize may be from Pillow's
_LEVIT = 256 / 224  # LeViT's processor resizes to this multiple of the crop


class ParityError(ModelError):
    """An exported model that computes something else than the one that it was exported from."""

    exit_code = 1


@dataclass(frozen=True)
class ParityResult:
    """How far two programs agree."""

    images: int
    what: str  # the images are
    largest_difference: float  # of two logits
    tolerance: float  # for it; times the largest logit of an image where that is larger than 1
    same_top1: int  # images with the same answer; where it differs, the logits of both are equal within the tolerance
    batch_sizes: tuple[int, ...]
    answer: str = _TOP_1  # what `same_top1` counts, in words

    @property
    def in_words(self) -> str:
        """Three lines for the screen."""
        sizes = ", ".join(map(str, self.batch_sizes))
        lines = (
            f"compared with torch on {self.images:,} {self.what}, in batches of {sizes}:",
            f"  logits differ by at most {self.largest_difference:.2g} ({self.tolerance:g} is allowed)",
            f"  the same {self.answer} for {self.same_top1:,} of {self.images:,}",
        )
        return "\n".join(lines)


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


def write_graph(model: nn.Module, shape: tuple[int, ...], file: Path, metadata: Mapping[str, str]) -> None:
    """Export a classifier: `pixel_values` (batch, C, H, W) float32 -> `logits` (batch, K) float32.

    The file holds `metadata`, no source lines and no paths of this machine. Weights of more than 1.9 GB are written to
    a second file, with `.data` behind the name of the first. The model is in evaluation mode and float32, on the CPU.

    Raises:
        ModelError: If the exporter can't do it.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    pixels = torch.zeros(2, *shape)  # a batch of one would be taken for a constant
    try:
        # With gradients, torch.export decides otherwise about views and fails on Swin (torch 2.14).
        with torch.no_grad(), _silent():
            program: Any = torch.onnx.export(
                _Logits(model).eval(),
                (pixels,),
                input_names=[_INPUT],
                output_names=[_OUTPUT],
                opset_version=_OPSET,
                dynamo=True,
                dynamic_shapes={_INPUT: {0: torch.export.Dim("batch")}},
                verbose=False,
            )
    except Exception as error:  # of many kinds
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        root = error
        while isinstance(root.__cause__, Exception):
            root = root.__cause__
        raise ModelError(f"torch.onnx can't export this {kind} network: {first_line(root)}") from error
    for node in program.model.graph.all_nodes():  # source lines, with the paths of this machine
        for entry in (node, *node.outputs):
            entry.metadata_props.clear()
    program.model.metadata_props.update(metadata)
    with _silent():
        program.save(file, external_data=size > _MAX_BYTES)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Drop what the exporter prints, logs and warns of; the comparison finds what matters."""
    before, nowhere = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def open_graph(file: Path) -> Callable[[np.ndarray], np.ndarray]:
    """An exported classifier in onnxruntime on the CPU: (B, C, H, W) float32 -> (B, K) float32.

    Raises:
        ParityError: If onnxruntime can't open it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; a warning about the graph is of no use to a user
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # torch needs the cores in turn
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no base class of its own
        raise ParityError(f"onnxruntime can't open what was exported: {error}; nothing written") from error
    return lambda pixels: np.asarray(session.run([_OUTPUT], {_INPUT: pixels})[0])


def compare_outputs(
    exported: Callable[[np.ndarray], np.ndarray],
    reference: Callable[[Tensor], Tensor],
    images: Iterable[tuple[str, Tensor]],
    what: str,
    thresholds: np.ndarray | None = None,
) -> ParityResult:
    """Run both, (B, C, H, W) float32 -> (B, K), on the same batches of 1, 2, 5 and 16 images, in turn.

    `images` are names and pixels, (C, H, W), and `what` says what they are. `thresholds` are those of a multi-label
    model, the logit from which each label is given, (K,).

    Raises:
        ParityError: If `exported` can't take a batch, or a logit differs by more than the tolerance or is no number.
    """
    count = same = 0
    largest, sizes = 0.0, set()
    remaining, batch_sizes = iter(images), cycle(_BATCH_SIZES)
    while batch := list(islice(remaining, next(batch_sizes))):
        pixels = torch.stack([one for _, one in batch])  # (B, C, H, W)
        with torch.inference_mode():
            expected = reference(pixels).numpy()  # (B, K)
        found = _run(exported, pixels.numpy(), expected.shape)
        differences = np.abs(found - expected).max(axis=1)  # (B,)
        allowed = TOLERANCE * np.maximum(1, np.abs(expected).max(axis=1))
        for (name, _), difference, limit in zip(batch, differences, allowed, strict=True):
            if not difference <= limit:  # NaN too
                gap = f"logits of {name}, in a batch of {len(batch)}, that differ by {difference:.3g}"
                raise ParityError(f"model.onnx has {gap} from torch's; allowed: {limit:.3g}. Nothing was written")
        largest = max(largest, float(differences.max()))
        if thresholds is None:
            same += int((found.argmax(axis=1) == expected.argmax(axis=1)).sum())
        else:
            same += int(((found >= thresholds) == (expected >= thresholds)).all(axis=1).sum())
        count += len(batch)
        sizes.add(len(batch))
    answer = _TOP_1 if thresholds is None else _LABELS
    return ParityResult(count, what, largest, TOLERANCE, same, tuple(sorted(sizes)), answer)


def _run(exported: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    try:
        found = exported(pixels)
    except Exception as error:  # onnxruntime has no base class of its own
        why = f"can't run a batch of {len(pixels)} images: {first_line(error)}"
        raise ParityError(f"model.onnx {why}; nothing written") from error
    if found.shape != shape:
        raise ParityError(f"model.onnx answers {len(pixels)} images with {found.shape} numbers, torch with {shape}")
    return found


@dataclass(frozen=True)
class Preprocessing:
    """How others prepare images for an exported network."""

    steps: dict[str, Any] | None  # for `onnx_predict.preprocess`; None where the processor does something else
    processor: Any  # to be saved: the network's own, or one that transformers.js knows and that does the same
    opens_in_js: bool  # whether transformers.js opens the folder
    missing: tuple[str, ...]  # what users of the folder without hfft have to do without, a sentence each


def plan_preprocessing(config: Any, processor: Any, transform: Transform) -> Preprocessing:
    """How others prepare images for the network of a config, given its image processor and evaluation transform."""
    steps = preprocessing_steps(processor, transform)
    saved = _js_processor(processor, transform, steps)
    name, missing = _name(saved), []
    is_letterbox = getattr(saved, "fit", None) == "letterbox"
    shape = " (letterbox: the whole image in its shape, between bars)" if is_letterbox else ""
    if steps is None:
        missing.append(f"no predict.py: it can't do what the image processor, {name}, does{shape}")
    js_problem = None
    if config.model_type not in _JS_NETWORKS:
        js_problem = f"doesn't open it: it knows no {config.model_type} network"
    elif not _is_known_in_js(saved):
        js_problem = f"doesn't open it: it knows no {name}"
    elif steps is None:
        js_problem = f"can't prepare images: it can't do what {name} does{shape}"
    if js_problem is not None:
        missing.append(f"transformers.js 4.3 {js_problem}")
    if steps is not None and "background" in steps:
        missing.append("transformers.js and pipeline() know no background: lay transparent images over it before")
    return Preprocessing(steps, saved, js_problem is None, tuple(missing))


def preprocessing_steps(processor: Any, transform: Transform) -> dict[str, Any] | None:
    """Resize, crop and scale as `onnx_predict.preprocess` takes them, verified on images of noise.

    None where the processor does something else.
    """
    try:
        scale = pixel_scale(processor)
    except ModelError:
        return None
    std = 1 / (scale.white - scale.black)  # (3, 1, 1)
    common = {
        "channels": list(scale.channels),
        "mean": [round(value, 6) for value in (-scale.black * std).flatten().tolist()],
        "std": [round(value, 6) for value in std.flatten().tolist()],
    }
    background = background_of(processor)
    if background is not None:
        common["background"] = list(background)
    level = float((scale.white - scale.black).abs().max()) / 255
    candidates = ({**shape, **common} for shape in _shapes(processor, scale.height, scale.width))
    return next((steps for steps in candidates if _is_faithful(steps, transform, level)), None)


def _shapes(processor: Any, height: int, width: int) -> Iterator[dict[str, Any]]:
    """What the processor may do to an image's shape, the most likely first."""
    rest = {"resample": _resample(processor), "crop": [height, width]}
    steps = getattr(getattr(processor, "val_transforms", None), "transforms", ())  # timm's
    for size in [step.size for step in steps if type(step).__name__ == "Resize"]:
        yield {"resize": size if isinstance(size, int) else list(size), **rest, "crop_rounding": "even"}
    if isinstance(processor, TorchvisionBackend):
        size, ratio = getattr(processor, "size", None), getattr(processor, "crop_pct", None)
        edges = [size.shortest_edge] if size and size.shortest_edge else []
        edges += [int(edge / ratio) for edge in edges if ratio] + [int(_LEVIT * edge) for edge in edges]
        exact = [[size.height, size.width]] if size and size.height and size.width else []
        for resize in (*exact, *edges, [height, width]):
            yield {"resize": resize, **rest, "crop_rounding": "down"}


def _resample(processor: Any) -> str:
    asked = getattr(processor, "resample", None)
    if asked is None:
        asked = getattr(processor, "data_config", {}).get("interpolation", "bilinear")
    known = {str(filter_.name).lower() for filter_ in Image.Resampling}
    name = asked if isinstance(asked, str) else Image.Resampling(asked).name.lower()
    return name if name in known else "bicubic"


def _is_faithful(steps: dict[str, Any], transform: Transform, level: float) -> bool:
    """Whether images of noise come out as in the evaluation; `level` is one of the 255 steps of a pixel."""
    from hfft.inference.onnx_predict import preprocess  # and onnxruntime

    rng = np.random.default_rng(0)
    for height, width in _NOISE:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = transform(image)
        found = torch.from_numpy(preprocess(image, steps))
        if found.shape != expected.shape:
            return False
        difference = (found - expected).abs() / level
        if difference.mean() > _MEAN or difference.max() > _LARGEST:
            return False
    return True


def _js_processor(processor: Any, transform: Transform, steps: dict[str, Any] | None) -> Any:
    """The processor if transformers.js knows it; else a ViT processor if that does the same to noise."""
    if _is_known_in_js(processor) or steps is None or steps["channels"] != [0, 1, 2]:
        return processor
    size = steps["resize"]
    plain: Any = ViTImageProcessor(
        size={"shortest_edge": size} if isinstance(size, int) else dict(zip(("height", "width"), size, strict=True)),
        do_center_crop=size != steps["crop"],
        crop_size=dict(zip(("height", "width"), steps["crop"], strict=True)),
        image_mean=steps["mean"],
        image_std=steps["std"],
        resample=Image.Resampling[steps["resample"].upper()],
    )
    if "background" in steps:
        plain.background = steps["background"]
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 100, 3), dtype=np.uint8))
    expected, found = transform(noise), evaluation_transform(plain)(noise)
    is_same = found.shape == expected.shape and bool((found - expected).abs().max() < 1e-3)  # of 1/255 / std
    return plain if is_same else processor


def _is_known_in_js(processor: Any) -> bool:
    return _name(processor).removesuffix("ImageProcessor") in _JS_PROCESSORS


def _name(processor: Any) -> str:
    return type(processor).__name__.removesuffix("Fast")
