"""The model card: README.md of the model folder, rendered from the numbers of a run."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hfft.files import write_text
from hfft.recipe.spec import PhaseSpec, Recipe

_TEXT = """---
{metadata}
---

# {name}

An image classifier for {classes}, fine-tuned from `{base}` with hfft.

## Results

| split | images | {metric_names} |
|---|---|{rules}|
{rows}

In brackets: 95 % bootstrap intervals, images resampled within each class.

## Classes

| class | training images |
|---|---|
{counts}

## Training

{phases}

## Use

```python
{use}
```
"""
_USE_MODEL = """from transformers import pipeline

classify = pipeline("image-classification", model="this/folder")
classify("image.jpg")"""
_USE_ADAPTER = """import hfft

classify = hfft.Classifier.from_pretrained("this/folder")  # loads `{base}` too
classify(["image.jpg"])"""


def write_card(folder: Path, recipe: Recipe, *, metrics: dict[str, Any], data: dict[str, Any]) -> None:
    """Render the card of a finished run.

    Args:
        folder: The model or adapter folder.
        recipe: What was asked for.
        metrics: Content of metrics.json.
        data: Content of data.json.
    """
    splits = [split for split in ("test", "validation") if split in metrics]
    names = list(metrics[splits[0]]) if splits else []
    rows = [_row(split, metrics[split], sum(data["splits"][split]["counts"].values())) for split in splits]
    counts = data["splits"]["train"]["counts"]
    last = recipe.phases[-1].adapter
    is_merged = last is None or last.merge
    text = _TEXT.format(
        metadata=_metadata(recipe, metrics[splits[0]] if splits else {}, splits[0] if splits else ""),
        name=recipe.name,
        base=recipe.model.checkpoint,
        classes=_listed(list(counts)),
        metric_names=" | ".join(name.replace("_", " ") for name in names),
        rules="|".join("---" for _ in names),
        rows="\n".join(rows),
        counts="\n".join(f"| {label} | {count} |" for label, count in counts.items()),
        use=(_USE_MODEL if is_merged else _USE_ADAPTER).format(base=recipe.model.checkpoint),
        phases="\n".join(f"{number}. {_phase(phase)}" for number, phase in enumerate(recipe.phases, start=1)),
    )
    write_text(folder / "README.md", str(ModelCard(text)))


def _metadata(recipe: Recipe, metrics: dict[str, Any], split: str) -> str:
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type="imagefolder",
            dataset_name=Path(recipe.data.source).name,
            dataset_split=split,
            metric_type=name,
            metric_value=values["value"],
        )
        for name, values in metrics.items()
    ]
    data = ModelCardData(
        model_name=recipe.name,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["hfft", "image-classification"],
        eval_results=results or None,
    )
    return data.to_yaml()


def _row(split: str, metrics: dict[str, Any], images: int) -> str:
    cells = [f"{value['value']:.4f} ({value['low']:.4f} to {value['high']:.4f})" for value in metrics.values()]
    return " | ".join([f"| {split}", str(images), *cells]) + " |"


def _phase(phase: PhaseSpec) -> str:
    what = f"adapter {phase.adapter.method} on {phase.adapter.on}" if phase.adapter else f"unfreeze {phase.unfreeze}"
    settings = ", ".join(f"{key} {value}" for key, value in phase.arguments.items())
    return f"**{phase.name}**: {what}; {settings}"


def _listed(names: list[str]) -> str:
    shown = names if len(names) <= 12 else [*names[:11], f"{len(names) - 11} more classes"]
    return ", ".join(shown[:-1]) + f" and {shown[-1]}"
