"""report.html: what a run says of itself, on a page that needs no other file; it renders and computes nothing."""

import logging
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hfft.data.audit.findings import KINDS
from hfft.data.sources.reading import ImageData
from hfft.errors import TrainingError, first_line
from hfft.evaluators.attribution import Mistakes, keep_mistakes
from hfft.evaluators.pictures import Shown
from hfft.inference.classifier import Classifier
from hfft.recipe.loading import dump_recipe
from hfft.report.charts import Chart, coverage_chart, curve_charts, reliability_chart, retention_chart
from hfft.report.doubts import Doubts, keep_doubts
from hfft.report.matrix import lay_out
from hfft.report.rendering import embedded, render
from hfft.report.words import (
    duration,
    for_all_phases,
    headline,
    how_trained,
    interpolation_in_words,
    machine,
    shared_command,
    shared_recipe,
    spoken,
    what_trains,
)
from hfft.runs.facts import ClassScores, Measured, RunFacts, SplitFacts, most_confused, read_facts
from hfft.runs.record import HINT_PICTURES, MISTAKES, PAGE
from hfft.system.files import write_text

_BASELINES = {"majority": "most frequent class", "knn": "nearest neighbours, untrained", "head": "head alone"}
_STAGES = {
    "data": "looking at the images",
    "load": "loading the checkpoint",
    "evaluation": "measuring the result",
    "retention": "measuring what is left",
}
_UNFOLDED = 30  # classes up to which the table of images is shown at once
_ROWS = 1000  # classes that the table of images lists
_PAIRS = 12

_LOG = logging.getLogger(__name__)  # the main process alone gets here


def write_page(folder: str | Path, images: ImageData | None = None, *, trust_remote_code: bool = False) -> Path:
    """Write report.html of a finished run, and before it the pictures of its worst mistakes, if they aren't there.

    Args:
        folder: Of the run.
        images: The run's; looked for where its recipe says when None and pictures are missing.
        trust_remote_code: Runs the Python code that the model brings, where it brings some; without it, the page
            doesn't show where such a network looks.

    Returns:
        The page.

    Raises:
        RunError: If it is no run folder, the run isn't finished, or its files can't be read.
        TrainingError: If the page can't be written.
    """
    facts = read_facts(folder)
    page = facts.folder / PAGE
    try:
        mistakes = keep_mistakes(facts, images, open_model=partial(_open, trust_remote_code=trust_remote_code))
        write_text(page, render_page(facts, mistakes, keep_doubts(facts, images)))
    except OSError as error:
        raise TrainingError(
            f"{page}: can't be written: {error}; once it can, `hfft report {folder}` writes it"
        ) from error
    return page


def _open(folder: Path, *, trust_remote_code: bool) -> tuple[Any, Any]:
    classifier = Classifier.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return classifier.model, classifier.processor


def try_page(folder: Path, images: ImageData | None, *, trust_remote_code: bool = False) -> None:
    """Write the page at the end of a run, which has succeeded whatever becomes of its page; the log says which.

    Args:
        folder: Of the run.
        images: As for `write_page`.
        trust_remote_code: Likewise.
    """
    try:
        page = write_page(folder, images, trust_remote_code=trust_remote_code)
    except Exception as error:  # hours of training are not lost for a picture
        why = f"{type(error).__name__}: {first_line(error)}"
        _LOG.warning(f"{folder / PAGE} was not written: {why}; the run is whole, and")
        _LOG.warning(f"`hfft report {folder}` tries it again")
        return
    _LOG.info(f"report: {page}")


def render_page(facts: RunFacts, mistakes: Mistakes | None, doubts: Doubts | None = None) -> str:
    """The page's text.

    Args:
        facts: Of the run.
        mistakes: Its worst mistakes, whose pictures are in its folder; None where they aren't known.
        doubts: Its label hints, likewise.
    """
    split = facts.judged
    context = {
        "facts": facts,
        "split": split,
        "title": facts.recipe.name,
        "machine": machine(facts.environment),
        "findings": _findings(facts),
        "skipped": facts.skipped,
        "audited": facts.recipe.data.audit != "off",
        **_summary(facts),
        **_answer(facts, split),
        **_measured(facts, split),
        **_trust(facts, split),
        "curves": curve_charts(facts.phases),
        "mistakes": mistakes,
        "pictures": [] if mistakes is None else [_picture(facts, one, "taken for") for one in mistakes.shown],
        "doubts": doubts,
        "hints": [] if doubts is None else [_picture(facts, one, "may be", HINT_PICTURES) for one in doubts.shown],
        **_retention(facts),
        **_training(facts),
    }
    names = {
        "numbers": ("Numbers", "measured_splits"),
        "curves": ("Curves", "curves"),
        "confusion": ("Confusion", "confusion"),
        "classes": ("Classes", "classes"),
        "trust": ("Confidence", "trust"),
        "mistakes": ("Mistakes", "mistakes"),
        "hints": ("Labels", "doubts"),
        "retention": ("Retention", "retention"),
    }
    always = [("data", "Images"), ("phases", "Training"), ("recipe", "Recipe")]
    there = [(part, name) for part, (name, key) in names.items() if context[key]]
    return render("run.html", {**context, "sections": [("answer", "Answer"), *there, *always]})


def _summary(facts: RunFacts) -> dict[str, Any]:
    largest = max(facts.phases, key=lambda phase: phase.plan.trainable)
    base, data = facts.checkpoint.name, facts.data.name if facts.data.kind != "memory" else "images in memory"
    result = facts.result.name
    return {
        "subtitle": f"{len(facts.labels):,} classes; {base} fine-tuned on {data}",
        "trained": ", then ".join(what_trains(phase.spec, phase.plan.trains) for phase in facts.phases[:3])
        + (f", and {len(facts.phases) - 3} phases more" if len(facts.phases) > 3 else ""),
        "most_trained": largest.plan.trainable,
        "all_parameters": largest.plan.total,
        "shipped": f"{result}/ of phase {facts.kept_phase}" if len(facts.phases) > 1 else f"{result}/",
        "why": f"{facts.kept}." if facts.kept else "There was one phase, or nothing to choose by.",
        "data_about": ", ".join(f"{part.images:,} {part.name}" for part in facts.splits.values())
        + f" images of {len(facts.labels):,} classes, from {data}.",
        "shown_labels": _shown_labels(facts),
        "folded": len(facts.labels) > _UNFOLDED,
    }


def _shown_labels(facts: RunFacts) -> list[str]:
    if len(facts.labels) <= _ROWS:
        return list(facts.labels)
    train = facts.splits["train"].counts
    by_size = sorted(facts.labels, key=lambda label: -train[label])
    return [*by_size[: _ROWS // 2], *by_size[-_ROWS // 2 :]]


def _answer(facts: RunFacts, split: SplitFacts | None) -> dict[str, Any]:
    if split is None:
        return {"headline": "", "best": None, "beside": [], "beside_low": 0.0, "left_out": [], "baselines": []}
    name = headline(split.metrics)
    baselines, left_out = [], []
    for kind, row in facts.baselines.items():
        title = _BASELINES.get(kind, kind)
        if split.name in row:
            metrics = {metric: Measured(**value) for metric, value in row[split.name].items()}
            baselines.append({"name": title, "about": row["about"], "metrics": metrics})
        else:
            left_out.append(f"{title} ({row['about']})")
    rows = [{"name": "this model", "value": split.metrics[name], "is_own": True}]
    others = [{"name": row["name"], "value": row["metrics"][name], "is_own": False} for row in baselines]
    rows += sorted(others, key=lambda row: -row["value"].value)
    least = min(row["value"].least for row in rows)
    low = math.floor(max(least - 0.02, 0) * 10) / 10
    return {
        "headline": spoken(name),
        "best": split.metrics[name],
        "beside": rows,
        "beside_low": min(low, 0.9),
        "left_out": left_out,
        "baselines": baselines,
    }


def _measured(facts: RunFacts, split: SplitFacts | None) -> dict[str, Any]:
    parts = [facts.splits[name] for name in ("test", "validation") if name in facts.splits]
    is_confused = split is not None and bool(split.confusion)  # not where images have any number of labels
    by_class = {} if split is None else split.by_class
    return {
        "measured_splits": [part for part in parts if part.metrics],
        "confusion": lay_out(split, facts.labels) if split is not None and is_confused else None,
        "confused": most_confused(split, _PAIRS) if split is not None else [],
        "classes": [_class_row(label, scores, split) for label, scores in by_class.items() if split is not None],
        "has_thresholds": any(scores.threshold is not None for scores in by_class.values()),
    }


def _class_row(label: str, scores: ClassScores, split: SplitFacts) -> dict[str, Any]:
    """A class in the table; None for a share of nothing."""
    others = {given: count for given, count in split.confusion.get(label, {}).items() if given != label and count}
    most = max(others, key=lambda given: others[given], default=None)
    return {
        "label": label,
        "images": scores.images,
        "precision": scores.precision if scores.predicted else None,
        "recall": scores.recall if scores.images else None,
        "f1": scores.f1 if scores.images or scores.predicted else None,
        "confused": "" if most is None else f"{most} ({others[most]:,})",
        "average_precision": scores.average_precision,
        "threshold": scores.threshold,
    }


def _trust(facts: RunFacts, split: SplitFacts | None) -> dict[str, Any]:
    charts: list[Chart] = []
    if split is not None and split.bins:
        charts.append(reliability_chart(split, is_multi_label=facts.is_multi_label))
    found, words = facts.confidence, ""
    if split is not None and split.calibration_error is not None:
        words = (
            f"On average, a probability is {split.calibration_error:.3f} away from the share that is "
            f"{'there' if facts.is_multi_label else 'right'} (expected calibration error). "
        )
    if found:
        charts += [coverage_chart(found)] if "risk_coverage" in found else []
        before, after = found["before"], found["after"]
        words += (
            f"Divided by a temperature of {found['temperature']:.3f}, fitted on {found['fitted_on']['images']:,} "
            f"{found['fitted_on']['split']} images, the logits have a log loss of {after['log_loss']:.4f} instead of "
            f"{before['log_loss']:.4f} on the {found['measured_on']} images."
        )
    thresholds = [{"wanted": float(key), "found": row} for key, row in found.get("thresholds", {}).items()]
    return {
        "trust": charts,
        "confidence": words,
        "thresholds": thresholds,
        "confidence_split": found.get("measured_on", ""),
    }


def _picture(facts: RunFacts, one: Shown, verb: str, folder: str = MISTAKES) -> dict[str, Any]:
    """An image in a gallery; a picture that was removed since is said to be missing."""
    files = {key: facts.folder / folder / name for key in ("picture", "overlay") if (name := getattr(one, key))}
    there = {key: embedded(path) for key, path in files.items() if path.is_file()}
    missing = one.missing or "" if "picture" in there else one.missing or "its file is gone"
    return {
        "file": one.file,
        "label": one.label,
        "verb": verb,
        "answer": one.prediction,
        "label_share": one.label_probability,
        "answer_share": one.probability,
        "picture": there.get("picture"),
        "overlay": there.get("overlay"),
        "missing": missing,
    }


def _retention(facts: RunFacts) -> dict[str, Any]:
    phases: Mapping[str, Any] = facts.retention.get("phases", {})
    if not any(phase["changed"] for phase in phases.values()):
        return {"retention": [], "retention_charts": [], "retention_about": "", "has_old_task": False}
    sample, before = facts.retention["sample"], next(iter(phases.values()))["knn_accuracy"]["before"]
    rows = []
    for name, phase in phases.items():
        old, entering = phase["old_task"] or {}, phase["head_input"] or {}
        changed = len(phase["changed"])
        rows.append(
            {
                "phase": name,
                "changed": f"{changed} part{'s' if changed > 1 else ''}" if changed else "nothing",
                "agreement": old.get("agreement"),
                "divergence": old.get("kl_divergence"),
                "drift": entering.get("cosine_drift"),
                "cka": entering.get("cka"),
                "nearest": phase["knn_accuracy"]["after"],
            }
        )
    charts = []
    if facts.blocks:
        charts = [
            retention_chart(facts.blocks, "cosine_drift", "How far features drifted (1 - cosine)"),
            retention_chart(facts.blocks, "cka", "How similar features stayed (CKA)"),
        ]
    return {
        "retention": rows,
        "retention_charts": charts,
        "has_old_task": any(phase["old_task"] is not None for phase in phases.values()),
        "retention_about": f"The encoder after each phase beside the pretrained one, on {sample['images']:,} "
        f"{sample['split']} images; drift and similarity in the table are of what enters the head."
        + (f" Nearest neighbours were right in {before:.3f} before." if before is not None else ""),
        "interpolation": f"{words}." if (words := interpolation_in_words(facts)) else "",
    }


def _findings(facts: RunFacts) -> list[dict[str, Any]]:
    """By kind, in the order of the audit."""
    known = [kind for kind in KINDS if any(one["kind"] == kind for one in facts.findings)]
    return [
        {
            "name": kind,
            "is_harm": KINDS[kind][0] == "harm",
            "about": KINDS[kind][1],
            "entries": [one for one in facts.findings if one["kind"] == kind],
        }
        for kind in known
    ]


def _training(facts: RunFacts) -> dict[str, Any]:
    phases = [
        {
            "name": phase.spec.name,
            "time": f"{duration(phase.result.seconds)}, {phase.result.images_per_second:,.0f} images/s",
            "words": how_trained(phase),
        }
        for phase in facts.phases
    ]
    frozen = any(phase.result.frozen["tensors"] for phase in facts.phases)
    stages = {name: value for name, value in facts.seconds.items() if name != "total"}
    most = max([*stages.values(), 0.001])
    folders = {f"{n}-{phase.spec.name}": f"phase {phase.spec.name}" for n, phase in enumerate(facts.phases)}
    return {
        "phases": phases,
        "for_all": for_all_phases(facts.recipe),
        "proof": "What was frozen in a phase was compared before and after, all bytes of it: none had changed."
        if frozen
        else "",
        "stages": [
            {
                "name": folders.get(name, _STAGES.get(name, name)),
                "share": f"{100 * value / most:.2f}",
                "time": duration(value),
            }
            for name, value in stages.items()
        ],
        "command": shared_command(facts.environment),
        "recipe": dump_recipe(shared_recipe(facts)),
    }
