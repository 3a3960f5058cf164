"""report.html: what a run says of itself, on a page that needs no other file."""

from pathlib import Path
from typing import Any

from hfft.data.audit.findings import KINDS
from hfft.evaluators.attribution import Mistakes, read_mistakes
from hfft.evaluators.label_pictures import PicturedIssues, read_label_issues
from hfft.evaluators.pictures import Shown
from hfft.recipe.loading import dump_recipe
from hfft.report.confusion import lay_out
from hfft.report.figures import Chart, learning_curves, reliability, retention_by_block, risk_by_coverage
from hfft.report.rendering import embedded, lowest_tick, render
from hfft.report.words import (
    for_all_phases,
    headline,
    how_trained,
    interpolation_in_words,
    machine_in_words,
    retention_rows,
    shared_command,
    shared_recipe,
    spoken,
    trained_parts,
)
from hfft.runs.facts import ClassScores, Measured, RunFacts, SplitFacts, most_confused, read_facts
from hfft.runs.record import FIGURES, FIRST_BATCH, LABEL_PICTURES, MISTAKES, PAGE
from hfft.system.files import write_text

_BASELINES = {"majority": "most frequent class", "knn": "nearest neighbours, untrained", "head": "head alone"}
_STEPS = {
    "data": "looking at the images",
    "load": "loading the checkpoint",
    "evaluation": "measuring the result",
    "retention": "measuring what is left",
}
_ROWS = 1000  # classes that the table of images lists
_PAIRS = 12
# Sections of the page: id, name, and what is empty where a run has nothing for it.
_SECTIONS = (
    *(("answer", "Answer", "facts"), ("numbers", "Numbers", "measured_splits"), ("curves", "Curves", "curves")),
    *(("confusion", "Confusion", "confusion"), ("classes", "Classes", "classes"), ("trust", "Confidence", "trust")),
    *(("mistakes", "Mistakes", "mistakes"), ("labels", "Labels", "label_issues")),
    *(("retention", "Retention", "retention"), ("data", "Images", "facts"), ("phases", "Training", "facts")),
    ("recipe", "Recipe", "facts"),
)


def write_page(folder: str | Path) -> Path:
    """Write report.html of a finished run from the files in its folder.

    Raises:
        RunError: If it is no run folder, the run isn't finished, or its files can't be read.
        OSError: If the page can't be written.
    """
    facts = read_facts(folder)
    page = facts.folder / PAGE
    write_text(page, render_page(facts, read_mistakes(facts.folder), read_label_issues(facts.folder)))
    return page


def render_page(facts: RunFacts, mistakes: Mistakes | None, issues: PicturedIssues | None = None) -> str:
    """The page's text.

    Args:
        facts: Of the run.
        mistakes: Its worst mistakes, whose pictures are in its folder; None where they aren't known.
        issues: Its label issues, likewise.
    """
    split = facts.judged
    context = {
        "facts": facts,
        "split": split,
        "title": facts.recipe.name,
        "machine": machine_in_words(facts.environment),
        "findings": [(kind, *KINDS[kind], found) for kind in KINDS if (found := _findings(facts, kind))],
        **_summary(facts),
        **_answer(facts, split),
        **_measured(facts, split),
        **_trust(facts, split),
        "curves": learning_curves(facts.phases),
        "mistakes": mistakes,
        "pictures": [] if mistakes is None else [_picture(facts, MISTAKES, one) for one in mistakes.shown],
        "label_issues": issues,
        "label_pictures": [] if issues is None else [_picture(facts, LABEL_PICTURES, one) for one in issues.shown],
        **_retention(facts),
        **_training(facts),
    }
    sections = [(part, name) for part, name, key in _SECTIONS if context[key]]
    return render("run.html", {**context, "sections": sections})


def _summary(facts: RunFacts) -> dict[str, Any]:
    result = facts.result.name
    trained = ", then ".join(trained_parts(phase.spec, phase.plan.trains) for phase in facts.phases[:3])
    more = len(facts.phases) - 3
    return {
        "source": facts.data.name if facts.data.kind != "memory" else "images in memory",
        "trained": trained + (f", and {more} phases more" if more > 0 else ""),
        "largest": max((phase.plan for phase in facts.phases), key=lambda plan: plan.trainable),
        "shipped": f"{result}/ of phase {facts.kept_phase}" if len(facts.phases) > 1 else f"{result}/",
        "shown_labels": _shown_labels(facts),
    }


def _shown_labels(facts: RunFacts) -> list[str]:
    if len(facts.labels) <= _ROWS:
        return list(facts.labels)
    train = facts.splits["train"].counts
    by_size = sorted(facts.labels, key=lambda label: -train[label])
    return [*by_size[: _ROWS // 2], *by_size[-_ROWS // 2 :]]


def _answer(facts: RunFacts, split: SplitFacts | None) -> dict[str, Any]:
    """The headline, and that of the baselines."""
    if split is None:
        return {"headline": "", "compared": [], "left_out": [], "baselines": []}
    name = headline(split.metrics)
    baselines, left_out = [], []
    for kind, row in facts.baselines.items():
        title = _BASELINES.get(kind, kind)
        if split.name in row:
            metrics = {metric: Measured(**value) for metric, value in row[split.name].items()}
            baselines.append({"name": title, "about": row["about"], "metrics": metrics})
        else:
            left_out.append(f"{title} ({row['about']})")
    others = [{"name": row["name"], "value": row["metrics"][name], "is_own": False} for row in baselines]
    others.sort(key=lambda row: -row["value"].value)
    compared = [{"name": "this model", "value": split.metrics[name], "is_own": True}, *others]
    return {
        "headline": spoken(name),
        "best": split.metrics[name],
        "compared": compared,
        "lowest": lowest_tick([row["value"] for row in compared]),
        "left_out": left_out,
        "baselines": baselines,
    }


def _measured(facts: RunFacts, split: SplitFacts | None) -> dict[str, Any]:
    parts = [facts.splits[name] for name in ("test", "validation") if name in facts.splits]
    by_class = {} if split is None else split.by_class
    return {
        "measured_splits": [part for part in parts if part.metrics],
        "confusion": lay_out(split, facts.labels) if split is not None and split.confusion else None,
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
    found = facts.confidence
    charts: list[Chart] = []
    if split is not None and split.bins:
        charts.append(reliability(split, is_multi_label=facts.is_multi_label))
    if "risk_coverage" in found:
        charts.append(risk_by_coverage(found))
    return {
        "trust": charts,
        "confidence": found,
        "thresholds": [{"wanted": float(key), "found": row} for key, row in found.get("thresholds", {}).items()],
    }


def _picture(facts: RunFacts, folder: str, one: Shown) -> dict[str, Any]:
    """An image in a gallery; a picture that was removed since is said to be missing."""
    names = {"picture": one.picture, "overlay": one.overlay}
    files = {key: facts.folder / folder / name for key, name in names.items() if name}
    there = {key: embedded(path) if path.is_file() else None for key, path in files.items()}
    missing = one.missing or ("" if there.get("picture") else "its file is gone")
    return {**vars(one), "picture": there.get("picture"), "overlay": there.get("overlay"), "missing": missing}


def _retention(facts: RunFacts) -> dict[str, Any]:
    rows = retention_rows(facts)
    if not rows:
        return {"retention": []}
    drift, cka = "How far features drifted (1 - cosine)", "How similar features stayed (CKA)"
    keys = {"cosine_drift": drift, "cka": cka} if facts.blocks else {}
    return {
        "retention": rows,
        "nearest_before": next(iter(facts.retention["phases"].values()))["knn_accuracy"]["before"],
        "retention_charts": [retention_by_block(facts.blocks, key, title) for key, title in keys.items()],
        "interpolation": interpolation_in_words(facts),
    }


def _findings(facts: RunFacts, kind: str) -> list[Any]:
    return [one for one in facts.findings if one["kind"] == kind]


def _training(facts: RunFacts) -> dict[str, Any]:
    steps = {name: seconds for name, seconds in facts.seconds.items() if name != "total"}
    folders = {f"{n}-{phase.spec.name}": f"phase {phase.spec.name}" for n, phase in enumerate(facts.phases)}
    names = {**_STEPS, **folders}
    first_batch = facts.folder / FIGURES / FIRST_BATCH
    return {
        "phase_words": [how_trained(phase) for phase in facts.phases],
        "for_all": for_all_phases(facts.recipe),
        "first_batch": embedded(first_batch) if first_batch.is_file() else None,
        "has_frozen": any(phase.result.frozen["tensors"] for phase in facts.phases),
        "steps": {names.get(name, name): seconds for name, seconds in steps.items()},
        "longest": max([*steps.values(), 0.001]),
        "command": shared_command(facts.environment),
        "recipe": dump_recipe(shared_recipe(facts)),
    }
