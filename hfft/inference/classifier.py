"""Images -> labels and probabilities, through the same pixels as the evaluation of the run."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from hfft.data.transforms import decode, evaluation_transform
from hfft.errors import DataError, ModelError
from hfft.evaluation.metrics import softmax
from hfft.model.checkpoint import labels_of, reopen

ImageLike = str | os.PathLike[str] | bytes | Image.Image


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        file: Path of the image, or its number in the call.
        label: The most probable class.
        probability: Its probability.
        top: The most probable classes with their probabilities, best first.
    """

    file: str
    label: str
    probability: float
    top: dict[str, float]


class Classifier:
    """A trained model with its processor and label names."""

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        """Wrap a model.

        Args:
            model: A classifier with id2label set.
            processor: The processor it was evaluated with.
        """
        self.model = model.eval()
        self.classes = labels_of(model.config)
        self.transform = evaluation_transform(processor)

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str]) -> "Classifier":
        """Open a run folder, a model folder, an adapter folder or a Hub id; on the accelerator, if there is one.

        Raises:
            ModelError: If there is no such model.
        """
        where = model_source(source)
        if (Path(where) / ADAPTER_CONFIG_NAME).is_file():
            from hfft.model.adapters import open_adapter  # and PEFT, which other models don't need

            model, processor = open_adapter(Path(where))
        else:
            model, processor = reopen(where)
        if torch.accelerator.is_available():
            model.to(torch.accelerator.current_accelerator())  # pyright: ignore[reportArgumentType]
        return cls(model, processor)

    def __call__(self, images: Iterable[ImageLike], *, top: int = 1, batch_size: int = 32) -> list[Prediction]:
        """Classify images.

        Args:
            images: Paths, encoded bytes or Pillow images.
            top: Classes to return for each image.
            batch_size: Images per forward pass.

        Raises:
            DataError: If an image can't be read; names it.
        """
        predictions: list[Prediction] = []
        batch: list[tuple[str, torch.Tensor]] = []
        for number, image in enumerate(images):
            name = str(image) if isinstance(image, str | os.PathLike) else str(number)
            batch.append((name, self._pixels(image, name)))
            if len(batch) == batch_size:
                predictions += self._predict(batch, top)
                batch = []
        return predictions + (self._predict(batch, top) if batch else [])

    def _pixels(self, image: ImageLike, name: str) -> torch.Tensor:
        try:
            return self.transform(decode(image))  # (C, H, W)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error

    def _predict(self, batch: Sequence[tuple[str, torch.Tensor]], top: int) -> list[Prediction]:
        pixels = torch.stack([pixels for _, pixels in batch]).to(self.model.device)  # (B, C, H, W)
        with torch.inference_mode():
            logits = self.model(pixel_values=pixels).logits.float().cpu().numpy()  # (B, K)
        return [self._prediction(name, row, top) for (name, _), row in zip(batch, softmax(logits), strict=True)]

    def _prediction(self, name: str, probabilities: np.ndarray, top: int) -> Prediction:
        order = np.argsort(-probabilities, kind="stable")[:top]
        best = {self.classes[k]: float(probabilities[k]) for k in order}
        return Prediction(name, self.classes[order[0]], float(probabilities[order[0]]), best)


def model_source(source: str | os.PathLike[str]) -> str:
    """The model folder of a run folder, or its adapter folder where nothing was merged; anything else as it is.

    Raises:
        ModelError: If the run has no model yet.
    """
    folder = Path(source)
    if not (folder / "recipe.yaml").is_file():
        return str(source)
    for result in (folder / "model", folder / "adapter"):
        if (result / "config.json").is_file():
            return str(result)
    raise ModelError(f"{folder}: this run is not finished; run its `hfft train` command again to continue it")
