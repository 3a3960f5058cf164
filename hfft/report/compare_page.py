"""Finished runs side by side, as a page of one file in the style of report.html."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfft.errors import TrainingError
from hfft.report.rendering import lowest_tick, render
from hfft.report.words import headline, spoken
from hfft.runs.facts import Measured
from hfft.system.files import write_text

_RETENTION = {
    "agreement": "same answers of the old head",
    "drift": "drift of features",
    "cka": "similarity (CKA)",
    "nearest": "right by nearest neighbours",
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
