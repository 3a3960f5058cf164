"""The page of `hfft demo`; also app.py of a Space, where this file runs without hfft."""

import html
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

import gradio
import torch
from gradio.themes import Default
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hfft.data.images.modes import open_picture
from hfft.system.markdown import escape

_TOP_CLASSES = 5
_MAX_UPLOAD = "64mb"
Labeled = tuple[dict[str, float] | None, Image.Image | None]


def make_labeler(model: Any, processor: Any) -> Callable[[str | None], Labeled]:
    """A function from an image file to the probability of each class, and the picture that the network gets.

    The processor may hold a background for transparent pixels.
    """
    config = model.config
    background = getattr(processor, "background", getattr(config, "pretrained_cfg", {}).get("background"))
    labels = [config.id2label[k] for k in range(len(config.id2label))]
    counts = Counter(labels)
    names = [f"{label} ({k})" if counts[label] > 1 else label for k, label in enumerate(labels)]
    is_multi_label = getattr(config, "problem_type", None) == "multi_label_classification"

    def pixels_of(image: Image.Image) -> torch.Tensor:
        return processor(images=image, return_tensors="pt")["pixel_values"]  # (1, C, H, W)

    def value_of(color: str) -> torch.Tensor:
        pixels = pixels_of(Image.new("RGB", (512, 512), color))[0]
        return pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2].reshape(-1, 1, 1)  # (C, 1, 1)

    black, white = value_of("black"), value_of("white")
    is_blue_first = bool((value_of("blue") == white)[0])

    def label(file: str | None) -> Labeled:
        if file is None:
            return None, None
        try:
            image = open_picture(file, background)
        except ValueError as error:
            raise _page_error(str(error)) from error
        pixels = pixels_of(image)
        with torch.inference_mode():
            logits = model(pixel_values=pixels.to(model.device, model.dtype)).logits[0].float()  # (K,)
        shares = logits.sigmoid() if is_multi_label else logits.softmax(0)
        levels = ((pixels[0] - black) / (white - black) * 255).round().clamp(0, 255).to(torch.uint8)  # (3, H, W)
        shown = levels.flip(0) if is_blue_first else levels
        picture = Image.fromarray(shown.permute(1, 2, 0).cpu().numpy())  # (H, W, 3)
        return dict(zip(names, shares.tolist(), strict=True)), picture

    return label


def _page_error(reason: str) -> gradio.Error:
    """Escaped, as the page would take the text for HTML."""
    return gradio.Error(html.escape(f"This image can't be read: {reason}", quote=False), print_exception=False)


def _uploaded_file(path: Any, folder: str) -> str:
    """The real path of a file in the folder of uploads; gradio lets other paths pass.

    An error says the same of what leads elsewhere and of what doesn't exist, so that nobody learns what does.
    """
    try:
        file, uploads = os.path.realpath(path), os.path.realpath(folder)
        if os.path.commonpath([file, uploads]) == uploads and os.path.isfile(file):
            return file
    except (TypeError, ValueError):  # no text, a zero byte, another drive
        pass
    raise _page_error("it was not uploaded here")


def build_page(label: Callable[[str | None], Labeled], title: str) -> gradio.Blocks:
    """The page: drop an image, see labels, probabilities and the picture that the network gets."""
    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        gradio.Markdown(f"# {escape(title)}")
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(label="Image", buttons=["fullscreen"], elem_id="image")
            with gradio.Column():
                labels = gradio.Label(label="Labels", num_top_classes=_TOP_CLASSES, elem_id="labels")
                options: dict[str, Any] = {"interactive": False, "buttons": ["download", "fullscreen"]}
                seen = gradio.Image(label="What the model sees", format="png", elem_id="seen", **options)

        def label_upload(upload: dict[str, Any] | None) -> Labeled:
            return label(None if upload is None else _uploaded_file(upload.get("path"), image.GRADIO_CACHE))

        # Gradio's own preprocessing would answer a broken image with a traceback.
        image.change(label_upload, image, [labels, seen], api_name="label", preprocess=False)
    return page


def launch(page: gradio.Blocks, **options: Any) -> str:
    """Start the page's server without a public link, with fonts that every machine has, and return its address."""
    theme = Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    own = {"theme": theme, "share": False, "ssr_mode": False, "show_error": True, "footer_links": []}
    _, address, _ = page.launch(max_file_size=_MAX_UPLOAD, **own, **options)
    return address


def run_space(source: str, title: str) -> None:
    """Serve the page of a model in a folder or on the Hub until the process ends."""
    model = AutoModelForImageClassification.from_pretrained(source, use_safetensors=True, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(source)
    launch(build_page(make_labeler(model, processor), title))
