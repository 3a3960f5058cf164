"""Pages of one file each, with style, script and pictures in it: report.html of a run, and runs side by side."""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from hfft._version import __version__
from hfft.data.audit.findings import KINDS
from hfft.errors import TrainingError
from hfft.evaluators.attribution import Mistakes, read_mistakes
from hfft.evaluators.pictures import PicturedIssues, Shown, read_label_issues
from hfft.recipe.loading import dump_recipe
from hfft.report.confusion import Matrix, lay_out
from hfft.report.figures import learning_curves, reliability, retention_by_block, risk_by_coverage
from hfft.report.words import (
    headline,
    how_trained,
    retention_rows,
    shared_command,
    shared_recipe,
    spoken,
    time_in_words,
    trained_parts,
    training_in_words,
)
from hfft.runs.facts import HELD_OUT, ClassScores, Measured, RunFacts, SplitFacts, most_confused, read_facts
from hfft.runs.record import FIGURES, FIRST_BATCH, LABEL_PICTURES, MISTAKES, PAGE
from hfft.system.files import write_text
from hfft.system.text import printable

_TEMPLATES = Path(__file__).parent / "templates"
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
_RETENTION = {  # columns of the comparison
    "agreement": "same answers of the old head",
    "drift": "drift of features",
    "cka": "similarity (CKA)",
    "nearest": "right by nearest neighbours",
}


def write_page(folder: str | Path) -> Path:
    """Write report.html of a finished run from the files in its folder.

    Raises:
        RunError: If it is no finished run, or its files can't be read.
        OSError: If the page can't be written.
    """
    facts = read_facts(folder)
    page = facts.folder / PAGE
    write_text(page, render_page(facts, read_mistakes(facts.folder), read_label_issues(facts.folder)))
    return page


def render_page(facts: RunFacts, mistakes: Mistakes | None, issues: PicturedIssues | None = None) -> str:
    """The page's text; the pictures of mistakes and label issues are in the run's folder. None: they aren't known."""
    split = facts.judged
    context = {
        "facts": facts,
        "split": split,
        "title": facts.recipe.name,
        "findings": [(kind, *about, found) for kind, about in KINDS.items() if (found := _findings(facts, kind))],
        **training_in_words(facts),
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
    result, labels = facts.result.name, facts.labels
    if len(labels) > _ROWS:
        by_size = sorted(labels, key=lambda label: -facts.splits["train"].counts[label])
        labels = (*by_size[: _ROWS // 2], *by_size[-_ROWS // 2 :])
    trained = ", then ".join(trained_parts(phase.spec, phase.plan.trains) for phase in facts.phases[:3])
    more = len(facts.phases) - 3
    return {
        "source": facts.data.name if facts.data.kind != "memory" else "images in memory",
        "trained": trained + (f", and {more} phases more" if more > 0 else ""),
        "largest": max((phase.plan for phase in facts.phases), key=lambda plan: plan.trainable),
        "shipped": f"{result}/ of phase {facts.kept_phase}" if len(facts.phases) > 1 else f"{result}/",
        "shown_labels": labels,
    }


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
    if split is None:
        return {"measured_splits": [], "confusion": None, "classes": []}
    parts = [facts.splits[name] for name in HELD_OUT if name in facts.splits]
    return {
        "measured_splits": [part for part in parts if part.metrics],
        "confusion": lay_out(split, facts.labels) if split.confusion else None,
        "confused": most_confused(split, _PAIRS),
        "classes": [_class_row(label, scores, split) for label, scores in split.by_class.items()],
        "has_thresholds": any(scores.threshold is not None for scores in split.by_class.values()),
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
    charts = [reliability(split, is_multi_label=facts.is_multi_label)] if split is not None and split.bins else []
    charts += [risk_by_coverage(found)] if "risk_coverage" in found else []
    thresholds = [{"wanted": float(key), "found": row} for key, row in found.get("thresholds", {}).items()]
    return {"trust": charts, "confidence": found, "thresholds": thresholds}


def _embedded(picture: Path) -> str | None:
    """A JPEG or PNG as an address that holds it; None where there is no such file."""
    if not picture.is_file():
        return None
    kind = "png" if picture.suffix == ".png" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture.read_bytes()).decode()}"


def _picture(facts: RunFacts, folder: str, one: Shown) -> dict[str, Any]:
    """An image in a gallery; a picture that was removed since is missing."""
    found: dict[str, str | None] = {}
    for kind, name in {"picture": one.picture, "overlay": one.overlay}.items():
        found[kind] = _embedded(facts.folder / folder / name) if name else None
    return {**vars(one), **found, "missing": one.missing or ("" if found["picture"] else "its file is gone")}


def _retention(facts: RunFacts) -> dict[str, Any]:
    rows = retention_rows(facts)
    drift, cka = "How far features drifted (1 - cosine)", "How similar features stayed (CKA)"
    keys = {"cosine_drift": drift, "cka": cka} if rows and facts.blocks else {}
    return {"retention": rows, "retention_charts": [retention_by_block(facts.blocks, *item) for item in keys.items()]}


def _findings(facts: RunFacts, kind: str) -> list[Any]:
    return [one for one in facts.findings if one["kind"] == kind]


def _training(facts: RunFacts) -> dict[str, Any]:
    folders = {f"{n}-{phase.spec.name}": f"phase {phase.spec.name}" for n, phase in enumerate(facts.phases)}
    names = {**_STEPS, **folders}
    steps = {names.get(name, name): seconds for name, seconds in facts.seconds.items() if name != "total"}
    return {
        "phase_words": [how_trained(phase) for phase in facts.phases],
        "first_batch": _embedded(facts.folder / FIGURES / FIRST_BATCH),
        "steps": steps,
        "longest": max([*steps.values(), 0.001]),
        "command": shared_command(facts.environment),
        "recipe": dump_recipe(shared_recipe(facts)),
    }


def write_comparison(found: Mapping[str, Any], file: Path) -> None:
    """Write the page of a `compare.Comparison`, as a dictionary.

    Raises:
        TrainingError: If it can't be written.
    """
    try:
        write_text(file, render_comparison(found))
    except OSError as error:
        raise TrainingError(f"{file}: can't be written: {error}") from error


def render_comparison(found: Mapping[str, Any]) -> str:
    """The page's text; `found` as for `write_comparison`."""
    short = _short_names([row["run"] for row in found["rows"]])
    rows = [
        {**row, "run": short[row["run"]], "metrics": {name: Measured(**one) for name, one in row["metrics"].items()}}
        for row in found["rows"]
    ]
    names = list(rows[0]["metrics"])
    first = headline([name for name in names if all(name in row["metrics"] for row in rows)] or names)
    compared = [{"name": row["run"], "value": row["metrics"][first]} for row in rows if first in row["metrics"]]
    compared.sort(key=lambda row: -row["value"].value)
    measured = [name for name in _RETENTION if any(row["retention"].get(name) is not None for row in rows)]
    return render(
        "compare.html",
        {
            "title": f"{len(rows)} runs side by side",
            "split": found["split"],
            "rows": rows,
            "names": names,
            "headline": spoken(first),
            "compared": [{**row, "is_own": row is compared[0]} for row in compared],
            "lowest": lowest_tick([row["value"] for row in compared]),
            "retention": {name: _RETENTION[name] for name in measured},
            "pair": None if found["pair"] is None else _pair(found["pair"], short),
            "notes": found["notes"],
        },
    )


def _short_names(runs: Sequence[str]) -> dict[str, str]:
    """Of each folder as many of its last names as tell it from the others."""
    parts = {run: Path(run).parts for run in runs}
    for count in range(1, max(map(len, parts.values())) + 1):
        ends = {run: "/".join(names[-count:]) for run, names in parts.items()}
        if len(set(ends.values())) == len(ends):
            return ends
    return {run: run for run in runs}


def _pair(pair: Mapping[str, Any], short: Mapping[str, str]) -> dict[str, Any]:
    rows = []
    for name, value in pair["differences"].items():
        is_known = value["low"] is not None
        is_clear = is_known and (value["low"] > 0 or value["high"] < 0)
        less_is_better = name.endswith("loss")  # as transformers has it
        better = pair["second" if (value["value"] > 0) != less_is_better else "first"]
        unclear = "no clear difference" if is_known else "too few images to say"
        words = f"{short[better]} is better" if is_clear else unclear
        rows.append({"name": spoken(name), "value": Measured(**value), "words": words})
    return {**pair, "first": short[pair["first"]], "second": short[pair["second"]], "rows": rows}


def render(template: str, context: dict[str, Any]) -> str:
    """A page; every value of the context is shown as text and never becomes part of the page's code.

    Its Content-Security-Policy lets no script run but the template's own, and nothing be loaded.
    """
    script = (_TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = {
        "css": Markup((_TEMPLATES / "page.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "script_hash": f"sha256-{digest}",
        "version": __version__,
    }
    return _environment().get_template(template).render({**page, **context})


def lowest_tick(values: Sequence[Measured]) -> float:
    """Where a track begins that shows shares with their intervals up to 1: a multiple of 0.1, 0.9 at most."""
    least = min(value.least for value in values)
    return min(math.floor(max(least - 0.02, 0) * 10) / 10, 0.9)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value, keep="\n\t") if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "classes_of": _classes_of,
        "counted": lambda split: f"{split.images:,} {split.name} images",
        "duration": time_in_words,
        "number": lambda value, digits=3: "-" if value is None else f"{value:.{digits}f}",
        "percent": _percent,
        "position": _position,
        "short": lambda value: f"{value:.2f}".rstrip("0").rstrip("."),
        "signed": lambda value: f"{value:+.3f}",
        "spoken": spoken,
        "whole": "{:,}".format,
    }
    return environment


def _percent(value: float, digits: int = 1, *, bare: bool = False) -> str:
    return f"{100 * value:.{digits}f}" + ("" if bare else " %")


def _position(value: float, low: float, high: float) -> str:
    """Where a value lies on its track, in percent of its length."""
    return f"{min(max(100 * (value - low) / (high - low), 0), 100):.2f}"


def _classes_of(matrix: Matrix) -> Markup:
    """What the script knows of the classes, as JSON that ends no script element."""
    rows = [
        {"name": printable(label), "images": images, "right": right}
        for label, images, right in zip(matrix.labels, matrix.images, matrix.right, strict=True)
    ]
    text = json.dumps(rows, ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
