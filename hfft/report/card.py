"""The model card: README.md of the model folder, templates/card.md filled from the files of a run; and its figures."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hfft.errors import TrainingError
from hfft.model.remote_code import own_code
from hfft.recipe.loading import dump_recipe
from hfft.report.words import (
    how_trained,
    retention_rows,
    shared_recipe,
    spoken,
    time_in_words,
    training_in_words,
)
from hfft.runs.facts import ClassScores, Measured, RunFacts, SourceFacts, SplitFacts, most_confused, read_facts
from hfft.runs.record import CARD, FIGURES
from hfft.system.files import write_folder, write_text
from hfft.system.markdown import escape, fence, folded, table

REPOSITORY = "this/folder"
"""Stands for the model in the lines to copy; whoever publishes the card puts the Hub id there."""

_TEMPLATE = Path(__file__).parent / "templates" / "card.md"
_LISTED = 12  # classes that a sentence names
_UNFOLDED = 30  # rows of a table that is shown at once
_CONFUSED = 10  # pairs
_HUB = "https://huggingface.co"
_TASK = "image-classification"
# What the Hub calls our metrics, where it has them, and how they are averaged.
_HUB_METRICS = {"macro_f1": ("f1", {"average": "macro"}), "micro_f1": ("f1", {"average": "micro"})}


def write_report(
    folder: str | Path, *, metrics: Mapping[str, Any] | None = None, draws: bool = True
) -> tuple[Path, ...]:
    """Render card and, where it `draws`, figures of a finished run anew; the card and the figures that were written.

    `metrics` is the content of metrics.json where the run is about to write it. Nothing else in the folder changes.

    Raises:
        RunError: If it is no finished run, or its files can't be read.
        TrainingError: If card or figures can't be written.
    """
    facts = read_facts(folder, metrics=metrics)
    try:
        figures: tuple[Path, ...] = ()
        if draws:
            from hfft.report.figures import write_figures  # and matplotlib, which nothing else needs

            figures = write_figures(facts)
        return (write_card(facts, figures), *figures)
    except OSError as error:
        raise TrainingError(
            f"{folder}: card and figures can't be written: {error}; once they can, the same command writes them"
        ) from error


def write_card(facts: RunFacts, figures: Sequence[Path]) -> Path:
    """Write README.md into the folder of the model or the adapter, and below it those of the figures that it shows."""
    wanted = ["learning_curves"]
    if facts.judged is not None:
        wanted += [f"confusion_{facts.judged.name}", f"reliability_{facts.judged.name}"]
    shown = {path.stem: path for path in figures if path.suffix == ".png" and path.stem in wanted}

    def copy(aside: Path) -> None:
        for path in shown.values():
            shutil.copyfile(path, aside / path.name)

    if shown:
        write_folder(facts.result / FIGURES, copy)
    card = facts.result / CARD
    write_text(card, render_card(facts, {stem: f"{FIGURES}/{path.name}" for stem, path in shown.items()}))
    return card


def render_card(facts: RunFacts, figures: Mapping[str, str]) -> str:
    """The card's text, with its metadata; `figures` are paths seen from the card by name, such as `confusion_test`."""
    split = facts.judged
    values = {**_about(facts), **_training(facts), "curves_figure": figures.get("learning_curves")}
    if split is not None:
        values |= _results(facts, split)
        values |= {f"{kind}_figure": figures.get(f"{kind}_{split.name}") for kind in ("confusion", "reliability")}
    return str(ModelCard.from_template(card_data(facts), template_path=str(_TEMPLATE), **values))


def card_data(facts: RunFacts) -> ModelCardData:
    """The card's metadata, which the Hub reads; it names Hub ids only, and no path of the disk that it was made on."""
    base = None if facts.has_own_base else facts.checkpoint.hub_id
    others: dict[str, Any] = {}
    if base is not None:
        others["base_model_relation"] = "adapter" if facts.is_adapter else "finetune"
    if facts.examples:
        others["widget"] = [{"src": example.file, "example_title": example.label} for example in facts.examples]
    return ModelCardData(
        model_name=facts.recipe.name,
        base_model=base,
        datasets=[facts.data.hub_id] if facts.data.hub_id else None,
        license=facts.recipe.license or "unknown",
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag=_TASK,
        tags=["hfft", _TASK, facts.model_type, *(["multi-label"] if facts.is_multi_label else [])],
        eval_results=None if facts.judged is None else _eval_results(facts, facts.judged),
        **others,
    )


def _eval_results(facts: RunFacts, split: SplitFacts) -> list[EvalResult]:
    """One entry per metric of the split that the model is judged by."""
    shared: dict[str, Any] = {
        "task_type": _TASK,
        "task_name": "Image Classification",
        "dataset_type": facts.data.hub_id or "imagefolder",
        "dataset_name": facts.data.name,
        "dataset_config": facts.recipe.data.config if facts.data.hub_id else None,
        "dataset_revision": facts.data.revision,
        "dataset_split": split.name,
    }
    results = []
    for name, measured in split.metrics.items():
        metric, arguments = _HUB_METRICS.get(name, (name, None))
        own = {"metric_type": metric, "metric_name": spoken(name), "metric_args": arguments}
        results.append(EvalResult(**shared, **own, metric_value=measured.value))
    return results


def _about(facts: RunFacts) -> dict[str, Any]:
    """What the template says of the model, and the functions that it says it with."""
    code = own_code(facts.config)
    packages = ["hfft" if facts.is_adapter else "transformers", "torch", "torchvision", "pillow"]
    rows = [
        [str(number), escape(label), *(f"{split.counts[label]:,}" for split in facts.splits.values())]
        for number, label in enumerate(facts.labels)
    ]
    return {
        "facts": facts,
        "split": facts.judged,
        "repository": REPOSITORY,
        "checkpoint": _source(facts.checkpoint, ""),
        "data": _source(facts.data, "datasets/"),
        "class_names": _listed(facts.labels),
        "code": code,
        "remote": "" if code is None else ", trust_remote_code=True",
        "packages": [*packages, *(["timm"] if facts.model_type == "timm_wrapper" else [])],
        "classes": _table(["output", "class", *(f"{name} images" for name in facts.splits)], rows, left=2),
        "recipe": fence(dump_recipe(shared_recipe(facts)), "yaml"),
        "escape": escape,
        "spoken": spoken,
        "number": _number,
        "whole": "{:,}".format,
        "duration": time_in_words,
        "how_trained": how_trained,
    }


def _results(facts: RunFacts, split: SplitFacts) -> dict[str, Any]:
    names = list(split.metrics)
    held_out = [facts.splits[name] for name in ("test", "validation") if name in facts.splits]
    rows = [[part.name, f"{part.images:,}", *(_number(part.metrics[name]) for name in names)] for part in held_out]
    baselines = [
        [escape(row["about"]), *(_number(Measured(**row[split.name][name])) for name in names)]
        for row in facts.baselines.values()
        if split.name in row
    ]
    by_class = [[escape(label), f"{row.images:,}", *_class_cells(row)] for label, row in split.by_class.items()]
    more = ["average precision", "threshold"] if any(row.threshold for row in split.by_class.values()) else []
    seen = [label for label, row in split.by_class.items() if row.images]
    spoken_names = [spoken(name) for name in names]
    return {
        "counted": f"{split.images:,} {split.name} images",
        "results": table(["split", "images", *spoken_names], rows),
        "baselines": table([f"for comparison, on {split.name}", *spoken_names], baselines) if baselines else "",
        "by_class": _table(["class", "images", "precision", "recall", "F1", *more], by_class),
        "confused": most_confused(split, _CONFUSED),
        "all_ascii": all(map(str.isascii, split.counts)),
        "confidence": facts.confidence,
        "weakest": min(seen, key=lambda label: split.by_class[label].recall.value),
    }


def _class_cells(row: ClassScores) -> list[str]:
    """Precision, recall and F1, multi-label with average precision and threshold; `-` for a share of nothing."""
    cells = [
        _number(row.precision, 3) if row.predicted else "-",
        _number(row.recall, 3) if row.images else "-",
        _number(row.f1, 3) if row.images or row.predicted else "-",
    ]
    if row.threshold is not None:
        cells += ["-" if row.average_precision is None else f"{row.average_precision:.3f}", f"{row.threshold:.3f}"]
    return cells


def _training(facts: RunFacts) -> dict[str, Any]:
    versions, used = facts.environment["packages"], ["torch", "transformers"]
    used += ["peft"] if any(phase.spec.adapter for phase in facts.phases) else []
    used += ["timm"] if facts.model_type == "timm_wrapper" else []
    return {
        **training_in_words(facts),
        "kept": f"{escape(facts.kept)}." if len(facts.phases) > 1 and facts.kept else "",
        "retention": _retention(facts),
        "versions": [f"{name} {versions[name]}" for name in used],
    }


def _retention(facts: RunFacts) -> str:
    """What is left of the encoder, by phase; empty where nothing was measured or no phase changed it."""
    rows = retention_rows(facts)
    names = {
        "agreement": "same answers of the old head",
        "divergence": "divergence (nats)",
        "drift": "drift of features",
        "cka": "similarity of features",
        "nearest": "right by nearest neighbours",
    }
    keys = [key for key in names if rows and key in rows[0]]
    cells = [[escape(row["phase"]), *("-" if row[key] is None else f"{row[key]:.3f}" for key in keys)] for row in rows]
    return table(["after phase", *(names[key] for key in keys)], cells) if rows else ""


def _source(source: SourceFacts, kind: str) -> str:
    """A checkpoint or data set in a sentence; `kind` is the beginning of its path on the Hub."""
    if source.kind == "hub":
        return f"[`{source.name}`]({_HUB}/{kind}{source.name})"
    if source.kind == "local":
        return f"`{source.name}`" if "`" not in source.name else escape(source.name)
    return "images in memory" if kind else "a model in memory"


def _listed(names: Sequence[str]) -> str:
    shown = [*map(escape, names[:_LISTED])]
    if len(names) > _LISTED:
        return f"{', '.join(shown)} and {len(names) - _LISTED:,} more (listed below)"
    return f"{', '.join(shown[:-1])} and {shown[-1]}"


def _number(measured: Measured, digits: int = 4) -> str:
    return f"{measured.value:.{digits}f} ({measured.between(digits)})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A table with a row per class, folded where they are many."""
    shown = table(header, rows, left=left)
    return shown if len(rows) <= _UNFOLDED else folded(f"{len(rows):,} classes", shown)
