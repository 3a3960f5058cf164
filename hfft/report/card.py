"""The model card: README.md of the model folder, rendered from the files of a run; and its figures."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from hfft.errors import TrainingError
from hfft.model.remote_code import own_code
from hfft.recipe.loading import dump_recipe
from hfft.report.metadata import card_data
from hfft.report.retained import confidence_in_words, retention_in_words
from hfft.report.words import (
    duration,
    for_all_phases,
    how_trained,
    interpolation_in_words,
    machine,
    shared_recipe,
    spoken,
)
from hfft.runs.facts import ClassScores, Measured, RunFacts, SourceFacts, SplitFacts, most_confused, read_facts
from hfft.runs.record import CARD, FIGURES
from hfft.system.files import write_folder, write_text
from hfft.system.markdown import escape, fence, folded, table

REPOSITORY = (
    "this/folder"  # stands for the model in the lines to copy; whoever publishes the card puts the Hub id there
)
_LISTED = 12  # classes that a sentence names
_UNFOLDED = 30  # rows of a table that is shown at once
_CONFUSED = 10  # pairs
_ALWAYS = (
    "It answers every image with one of its classes, also one that shows none of them; a low probability is a hint "
    "and no proof."
)
_ANY = (
    "It knows no labels but these, and may give some to an image that shows something else; thresholds of rare labels "
    "were chosen on few images."
)
_INTERVALS = (
    "In brackets: 95 % intervals. They say how much the numbers would move with other images of the same kind, and "
    "nothing of other seeds or other sources."
)
_HUB = "https://huggingface.co"

_ONE = "which one of these classes an image shows"
_USE_MODEL = f"""\
from transformers import pipeline
classify = pipeline("image-classification", model="{REPOSITORY}")
print(classify("image.jpg"))"""
_USE_ADAPTER = f"""\
import hfft
classify = hfft.Classifier.from_pretrained("{REPOSITORY}")
print(classify(["image.jpg"]))"""


def write_report(
    folder: str | Path, *, metrics: Mapping[str, Any] | None = None, draws: bool = True
) -> tuple[Path, ...]:
    """Render figures and card of a finished run anew; nothing else in its folder changes.

    Args:
        folder: Of the run.
        metrics: Content of metrics.json, where the run is about to write it; read from there when None.
        draws: Whether there are figures; else the card alone is written, and shows none.

    Returns:
        What was written: the card and the figures.

    Raises:
        RunError: If it is no run folder, the run isn't finished, or its files can't be read.
        TrainingError: If card or figures can't be written.
    """
    facts = read_facts(folder, metrics=metrics)
    try:
        figures = _drawn(facts) if draws else ()
        return (write_card(facts, figures), *figures)
    except OSError as error:
        raise TrainingError(
            f"{folder}: card and figures can't be written: {error}; once they can, the same command writes them"
        ) from error


def _drawn(facts: RunFacts) -> tuple[Path, ...]:
    from hfft.report.figures import write_figures  # and matplotlib, which nothing else needs

    return write_figures(facts)


def write_card(facts: RunFacts, figures: Sequence[Path]) -> Path:
    """Write README.md into the folder of the model or the adapter, and beside it the figures that it shows.

    Args:
        facts: Of the run.
        figures: Files to choose from.

    Returns:
        The card.
    """
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
    """The card's text, with its metadata.

    Args:
        facts: Of the run.
        figures: Name of a figure, such as `confusion_test`, to where it lies as seen from the card.
    """
    sections = {
        f"# {escape(facts.recipe.name)}": _summary(facts),
        "## What it is for": _purpose(facts),
        "## How to use it": _use(facts),
        "## Classes": _classes(facts),
        "## Results": _results(facts, figures),
        "## How it was trained": _training(facts, figures),
        "## Limits": "\n".join(f"- {limit}" for limit in _limits(facts)),
        "## Recipe": _recipe(facts),
    }
    text = "\n\n".join(f"{title}\n\n{body}" for title, body in sections.items() if body)
    return str(ModelCard(f"---\n{card_data(facts).to_yaml().rstrip()}\n---\n\n{text}\n"))


def _summary(facts: RunFacts) -> str:
    kind = "An adapter that makes an image classifier" if facts.is_adapter else "An image classifier"
    base = _source(facts.checkpoint, "")
    text = (
        f"{kind} for {len(facts.labels)} classes, fine-tuned from {base} on {_source(facts.data, 'datasets/')} with "
        f"hfft {facts.environment['hfft']}."
    )
    if facts.judged is not None:
        value = facts.judged.metrics[facts.headline]
        text += f" {spoken(facts.headline).capitalize()} on {_counted(facts.judged)}: **{_number(value)}**."
    return text


def _purpose(facts: RunFacts) -> str:
    which = "which of these classes an image shows, any number of them" if facts.is_multi_label else _ONE
    data = "table_with_lists_of_labels.csv" if facts.is_multi_label else "folder_with_one_folder_per_class"
    return (
        f"It says {which}: {_listed(facts.labels)}. It is for images like those "
        "that it was trained on: taken, cropped and labelled in the same way. On others, measure it first:\n\n"
        + fence(f"hfft evaluate {REPOSITORY} --data {data}", "bash")
    )


def _use(facts: RunFacts) -> str:
    use = _USE_ADAPTER if facts.is_adapter else _USE_MODEL
    if own_code(facts.config) is not None:
        use = use.replace(f'"{REPOSITORY}"', f'"{REPOSITORY}", trust_remote_code=True')
    lines = fence(use, "python")
    needs = ["hfft" if facts.is_adapter else "transformers", "torch", "torchvision", "pillow"]
    needs += ["timm"] if facts.model_type == "timm_wrapper" else []
    text = f"{lines}\n\nNeeds {', '.join(needs)}. Resizing and scaling of pixels are saved with the model."
    examples = f"`examples/` holds {len(facts.examples)} of the images to try it on." if facts.examples else ""
    return " ".join(
        part for part in (text, _code_note(facts), _labels_note(facts), _adapter_note(facts), examples) if part
    )


def _code_note(facts: RunFacts) -> str:
    code = own_code(facts.config)
    if code is None:
        return ""
    return f"The network is the Python code in `{code}.py`: read it before you trust it."


def _labels_note(facts: RunFacts) -> str:
    if not facts.is_multi_label:
        return ""
    return (
        "Each label has a probability of its own: they don't sum to 1. An image has the labels whose probability "
        "reaches their threshold, in the table below and in `config.json`; `hfft.Classifier` applies them "
        "(`.labels`), `pipeline()` shows the probabilities alone."
    )


def _adapter_note(facts: RunFacts) -> str:
    if not facts.is_adapter:
        return ""
    if facts.has_own_base:
        return "It is added to weights of an earlier phase, which are in the run's folder only."
    return f"The weights that it is added to, {_source(facts.checkpoint, '')}, are loaded too."


def _classes(facts: RunFacts) -> str:
    rows = [
        [str(number), escape(label), *(f"{split.counts[label]:,}" for split in facts.splits.values())]
        for number, label in enumerate(facts.labels)
    ]
    return _maybe_folded(table(["output", "class", *(f"{name} images" for name in facts.splits)], rows, left=2), rows)


def _results(facts: RunFacts, figures: Mapping[str, str]) -> str:
    split = facts.judged
    if split is None:
        return "No images were held out, so nobody knows how good it is."
    measured = [part for part in (facts.splits.get("test"), facts.splits.get("validation")) if part is not None]
    names = list(split.metrics)
    rows = [[part.name, f"{part.images:,}", *(_number(part.metrics[name]) for name in names)] for part in measured]
    parts = [
        table(["split", "images", *map(spoken, names)], rows),
        _INTERVALS,
        _thresholds_note(facts),
        _beside(facts, split),
        f"By class, on {_counted(split)}, with Wilson's 95 % intervals:",
        _by_class(split),
        "" if facts.is_multi_label else _confusions(split, figures),
        _calibration(facts, split, figures),
        confidence_in_words(facts),
    ]
    return "\n\n".join(part for part in parts if part)


def _thresholds_note(facts: RunFacts) -> str:
    if not facts.is_multi_label:
        return ""
    chosen = (
        "the threshold that gives each label its best F1 on the validation images, chosen anew for each line below"
        if facts.confidence
        else "a threshold of 0.5 for each label, as there were no validation images to choose others on"
    )
    return f"F1, subset accuracy and Hamming loss are those of labels given by {chosen}."


def _beside(facts: RunFacts, split: SplitFacts) -> str:
    names = list(split.metrics)
    measured = {row["about"]: row[split.name] for row in facts.baselines.values() if split.name in row}
    rows = [[escape(about), *(_number(Measured(**row[name])) for name in names)] for about, row in measured.items()]
    if not rows:
        return ""
    body = table([f"for comparison, on {split.name}", *map(spoken, names)], rows)
    return f"What is simpler, on the same images:\n\n{body}"


def _by_class(split: SplitFacts) -> str:
    rows = [[escape(label), f"{scores.images:,}", *_class_cells(scores)] for label, scores in split.by_class.items()]
    more = ["average precision", "threshold"] if any(row.threshold for row in split.by_class.values()) else []
    return _maybe_folded(table(["class", "images", "precision", "recall", "F1", *more], rows), rows)


def _class_cells(scores: ClassScores) -> list[str]:
    """Precision, recall and F1; `-` where there is nothing that one could be a share of."""
    more = []
    if scores.threshold is not None:
        found = scores.average_precision
        more = ["-" if found is None else f"{found:.3f}", f"{scores.threshold:.3f}"]
    return [
        _number(scores.precision, 3) if scores.predicted else "-",
        _number(scores.recall, 3) if scores.images else "-",
        _number(scores.f1, 3) if scores.images or scores.predicted else "-",
        *more,
    ]


def _confusions(split: SplitFacts, figures: Mapping[str, str]) -> str:
    pairs = most_confused(split, _CONFUSED)
    lines = [
        f"- {count:,} of {split.counts[label]:,} images of {escape(label)} were taken for {escape(given)}"
        for label, given, count in pairs
    ]
    name = f"confusion_{split.name}"
    figure = f"![Confusion matrix of the {split.name} images]({figures[name]})" if name in figures else ""
    if figure and not all(map(str.isascii, split.counts)):
        figure += "\n\nA name that the figure's fonts could not show is there by its output, such as #0."
    listed = "\n".join(["Most confused:", "", *lines]) if lines else "No image was taken for another class."
    return "\n\n".join(part for part in (figure, listed) if part)


def _calibration(facts: RunFacts, split: SplitFacts, figures: Mapping[str, str]) -> str:
    name = f"reliability_{split.name}"
    figure = f"\n\n![Reliability diagram of the {split.name} images]({figures[name]})" if name in figures else ""
    if facts.is_multi_label:
        return (
            f"Expected calibration error {split.calibration_error:.3f}: how far the probability of a label is from "
            f"the share of images that have it, on average over the labels.{figure}"
        )
    return (
        f"Expected calibration error {split.calibration_error:.3f}: how far the probability of the predicted class is "
        f"from the share that is right, on average.{figure}"
    )


def _training(facts: RunFacts, figures: Mapping[str, str]) -> str:
    phases = [
        f"{number}. **{escape(phase.spec.name)}** ({duration(phase.result.seconds)}, "
        f"{phase.result.images_per_second:,.0f} images/s). {escape(how_trained(phase))}"
        for number, phase in enumerate(facts.phases, start=1)
    ]
    frozen = [phase for phase in facts.phases if phase.result.frozen["tensors"]]
    held = (
        "What was frozen in a phase was compared before and after, all bytes of it: none had changed."
        if frozen
        else ""
    )
    packages, used = facts.environment["packages"], ["torch", "transformers"]
    used += ["peft"] if any(phase.spec.adapter for phase in facts.phases) else []
    used += ["timm"] if facts.model_type == "timm_wrapper" else []
    versions = ", ".join(f"{name} {packages[name]}" for name in used)
    figure = f"![Learning curves]({figures['learning_curves']})" if "learning_curves" in figures else ""
    where = (
        f"Trained and measured in {duration(facts.seconds['total'])} on {escape(machine(facts.environment))}, in "
        f"{facts.environment['precision']}, with {versions}; seed {facts.recipe.seed}. Times are those of the process "
        "that finished a phase; of a run that was interrupted, they leave out what came before."
    )
    kept = f"{escape(facts.kept)}." if len(phases) > 1 and facts.kept else ""
    way = interpolation_in_words(facts)
    if way:
        way = f"{way}; nothing was trained for that (https://hf.co/papers/2109.01903)."
    retained = [way, retention_in_words(facts)]
    parts = ("\n".join(phases), for_all_phases(facts.recipe), kept, held, *retained, where, figure)
    return "\n\n".join(part for part in parts if part)


def _limits(facts: RunFacts) -> list[str]:
    limits = [
        _ANY if facts.is_multi_label else _ALWAYS,
        "How it does on images from other sources, cameras or times was not measured.",
    ]
    if not facts.is_adapter:
        limits.append(
            "`pipeline()` clips images of 16 bits or floating-point values, which hfft scales: convert them."
        )
    split = facts.judged
    if split is not None:
        seen = {label: scores for label, scores in split.by_class.items() if scores.images}
        weakest = min(seen, key=lambda label: seen[label].recall.value)
        limits.append(
            f"The class that it finds least often is {escape(weakest)}: recall {_number(seen[weakest].recall, 3)} on "
            f"{seen[weakest].images:,} {split.name} images."
        )
    if split is not None and split.is_carved and facts.recipe.data.group_column is None:
        limits.append(
            f"The {split.name} images were taken out of the training images at random: if several show the same "
            "thing, new things will be recognised less well than measured."
        )
    if "validation" in facts.splits:
        chosen = "Weights and thresholds" if facts.is_multi_label else "Weights"
        limits.append(f"{chosen} were chosen by the validation images, whose numbers are therefore too good.")
    if facts.recipe.license is None:
        limits.append("Its licence is unknown; those of the checkpoint and of the images may restrict its use.")
    return limits


def _recipe(facts: RunFacts) -> str:
    where = (
        "hfft's own file; what was on a local disk is named by its last folder. `hfft train` with it repeats the run."
    )
    return f"{where}\n\n{fence(dump_recipe(shared_recipe(facts)), 'yaml')}"


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


def _counted(split: SplitFacts) -> str:
    return f"{split.images:,} {split.name} images"


def _number(measured: Measured, digits: int = 4) -> str:
    return f"{measured.value:.{digits}f} ({measured.between(digits)})"


def _maybe_folded(body: str, rows: Sequence[Any]) -> str:
    return body if len(rows) <= _UNFOLDED else folded(f"{len(rows):,} classes", body)
