"""A page that labels an image: what `hfft demo` shows, and app.py of a Space, where this file runs without hfft."""

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

SHOWN = 5  # classes
LARGEST = "64mb"  # image that is taken
_ELSEWHERE = "it was not uploaded here"  # said alike of what is there and what isn't
Answer = tuple[dict[str, float] | None, Image.Image | None]


def make_labeler(model: Any, processor: Any) -> Callable[[str | None], Answer]:
    """A function from an image file to the probability of each class, and the picture that the network gets to see.

    Args:
        model: A classifier of transformers, in evaluation mode.
        processor: Its image processor, which may hold a background for transparent pixels.
    """
    settings = getattr(model.config, "pretrained_cfg", {})  # timm's, which hold what else the processor's would
    background = getattr(processor, "background", settings.get("background"))
    counts = Counter(model.config.id2label.values())
    names = [
        f"{label} ({number})" if counts[label] > 1 else label
        for number, label in ((k, model.config.id2label[k]) for k in range(len(model.config.id2label)))
    ]

    has_many_labels = getattr(model.config, "problem_type", None) == "multi_label_classification"  # each by itself

    def prepare(image: Image.Image) -> torch.Tensor:
        return processor(images=image, return_tensors="pt")["pixel_values"]  # (1, C, H, W)

    def value_of(color: str) -> torch.Tensor:
        pixels = prepare(Image.new("RGB", (512, 512), color))[0]
        return pixels[:, pixels.shape[1] // 2, pixels.shape[2] // 2].reshape(-1, 1, 1)  # (C, 1, 1)

    black, white = value_of("black"), value_of("white")
    is_blue_first = bool((value_of("blue") == white)[0])

    def label(file: str | None) -> Answer:
        if file is None:
            return None, None
        try:
            image = open_picture(file, background)
        except ValueError as error:
            raise _refusal(str(error)) from error
        pixels = prepare(image)
        with torch.inference_mode():
            logits = model(pixel_values=pixels.to(model.device, model.dtype)).logits[0].float()  # (K,)
        levels = ((pixels[0] - black) / (white - black) * 255).round().clamp(0, 255).to(torch.uint8)  # (3, H, W)
        shown = levels.flip(0) if is_blue_first else levels
        shares = logits.sigmoid() if has_many_labels else logits.softmax(0)
        return dict(zip(names, shares.tolist(), strict=True)), Image.fromarray(
            shown.permute(1, 2, 0).cpu().numpy()  # (H, W, 3)
        )

    return label


def _refusal(reason: str) -> gradio.Error:
    """An error of the page, which would take its text for HTML."""
    return gradio.Error(html.escape(f"This image can't be read: {reason}", quote=False), print_exception=False)


def _uploaded(path: Any, folder: str) -> str:
    """A path that leads to a file in the folder of uploads, links followed, whatever gradio lets pass.

    Raises:
        gradio.Error: If it leads elsewhere, or to nothing, in the same words.
    """
    try:
        place, home = os.path.realpath(path), os.path.realpath(folder)
        if os.path.commonpath([place, home]) == home and os.path.isfile(place):
            return place
    except (TypeError, ValueError):  # no text, a zero byte, another drive
        pass
    raise _refusal(_ELSEWHERE)


def make_page(label: Callable[[str | None], Answer], title: str) -> gradio.Blocks:
    """The page: drop an image, see labels, probabilities and the picture that the network gets to see."""
    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        gradio.Markdown(f"# {escape(title)}")
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(label="Image", buttons=["fullscreen"], elem_id="image")
            with gradio.Column():
                labels = gradio.Label(label="Labels", num_top_classes=SHOWN, elem_id="labels")
                seen = gradio.Image(
                    label="What the model sees",
                    interactive=False,
                    format="png",
                    buttons=["download", "fullscreen"],
                    elem_id="seen",
                )

        def label_upload(upload: dict[str, Any] | None) -> Answer:
            return label(None if upload is None else _uploaded(upload.get("path"), image.GRADIO_CACHE))

        # Gradio's own reading of the file would answer a broken image with a traceback.
        image.change(label_upload, image, [labels, seen], api_name="label", preprocess=False)
    return page


def launch(page: gradio.Blocks, **options: Any) -> str:
    """Start the page's server, without a link that others could use, and with fonts that are on every machine.

    Args:
        page: From `make_page`.
        options: Of gradio's own launch.

    Returns:
        The address.
    """
    theme = Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    _, address, _ = page.launch(
        theme=theme, share=False, ssr_mode=False, show_error=True, max_file_size=LARGEST, footer_links=[], **options
    )
    return address


def run_space(source: str, title: str) -> None:
    """Open a model of transformers, in a folder or on the Hub, and serve its page until the process ends."""
    model = AutoModelForImageClassification.from_pretrained(source, use_safetensors=True, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(source)
    launch(make_page(make_labeler(model, processor), title))
