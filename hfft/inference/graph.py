"""A network -> an ONNX file, by torch.onnx.export, with any number of images in a batch.

The exporter is torch's own, on top of torch.export: optimum-onnx 0.1.0, the newest, needs transformers below 4.58.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hfft.errors import ModelError

INPUT, OUTPUT = "pixel_values", "logits"  # as optimum calls them too
OPSET = 20
_ONE_FILE = 1_900_000_000  # bytes of weights; protobuf takes 2 GiB


class _Logits(nn.Module):
    """Pixels to logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


def write_graph(model: nn.Module, shape: tuple[int, ...], file: Path, metadata: Mapping[str, str]) -> None:
    """Export a classifier: `pixel_values` (batch, C, H, W) float32 -> `logits` (batch, K) float32.

    The file says nothing of the code and the machine that it was exported from, as the exporter would have it say.
    Weights of more than 1.9 GB lie beside it, in a file with `.data` behind its name.

    Args:
        model: In evaluation mode and float32, on the CPU.
        shape: (C, H, W) of an image.
        file: Where to write.
        metadata: Names and texts to store in the file.

    Raises:
        ModelError: If the exporter can't do it.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    pixels = torch.zeros(2, *shape)  # a batch of one would be taken for a constant
    try:
        # With gradients, torch.export decides otherwise about views and trips over Swin (torch 2.14).
        with torch.no_grad(), _silent():
            program: Any = torch.onnx.export(
                _Logits(model).eval(),
                (pixels,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
                verbose=False,
            )
    except Exception as error:  # exporters raise whatever they stumble over
        name = getattr(model, "config", None)
        kind = getattr(name, "model_type", type(model).__name__)
        raise ModelError(f"torch.onnx can't export this {kind} network: {_reason(error)}") from error
    _forget_origin(program.model)
    program.model.metadata_props.update(metadata)
    with _silent():
        program.save(file, external_data=size > _ONE_FILE)


def _forget_origin(graph: Any) -> None:
    """Drop what the exporter notes at each node: source lines, with the paths of this machine."""
    for node in graph.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Drop what the exporter prints, logs and warns of: what matters is raised, or found by the check after it."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _reason(error: BaseException) -> str:
    """The first line of what is at the bottom of it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
