"""Verbs for finished runs and several of them: report, push, sweep, compare."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from hfft.cli.arguments import add_trust, place
from hfft.cli.printing import interval, print_table, show, spaced
from hfft.errors import RunError, TrainingError
from hfft.system.lazy_imports import quick_imports
from hfft.system.paths import expanded


def add_verbs(verbs: Any) -> None:
    """Add the parsers of these verbs."""
    _add_report(verbs.add_parser("report", help="render card, report.html and figures of a finished run anew"))
    _add_push(verbs.add_parser("push", help="send a run to the Hugging Face Hub, read it back and compare"))
    _add_sweep(verbs.add_parser("sweep", help="run a recipe with each combination of some values, and compare"))
    _add_compare(verbs.add_parser("compare", help="set finished runs side by side"))


def _add_report(report: argparse.ArgumentParser) -> None:
    report.add_argument("folder", type=expanded, metavar="run", help="run folder")
    add_trust(report)
    report.set_defaults(run=_report)


def _add_push(push: argparse.ArgumentParser) -> None:
    push.add_argument("run_folder", type=expanded, metavar="run", help="run folder")
    push.add_argument("repo_id", help="owner/name, or the name of an own repository; made if it isn't there")
    push.add_argument("--what", choices=("model", "adapter", "both"), help="what the run ends with when left out")
    push.add_argument("--public", action="store_true", help="show a new repository to everybody; else it is private")
    push.add_argument("--revision", metavar="BRANCH", help="branch, made if it isn't there; main when left out")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of changing the branch")
    push.add_argument("--message", metavar="TEXT", help="title of the commit")
    push.add_argument(
        "--base-model", metavar="REPO_ID", help="Hub id of what the adapter sits on, if trained on a folder"
    )
    push.add_argument("--json", action="store_true", help="print JSON")
    add_trust(push)
    push.set_defaults(run=_push)


def _add_sweep(swept: argparse.ArgumentParser) -> None:
    swept.add_argument("recipe", type=expanded, help="YAML file")
    swept.add_argument("values", nargs="+", metavar="key=value1,value2", help="for example seed=0,1,2")
    _add_html(swept)
    swept.set_defaults(run=_sweep)


def _add_compare(compare: argparse.ArgumentParser) -> None:
    compare.add_argument(
        "runs", type=expanded, nargs="+", metavar="RUN", help="run folder; of two, the differences are shown too"
    )
    compare.add_argument("--split", choices=("test", "validation"), help="test where all have it, when left out")
    compare.add_argument("--json", action="store_true", help="print JSON")
    _add_html(compare)
    compare.set_defaults(run=_compare)


def _add_html(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--html", type=place, metavar="FILE", help="write the comparison as a page of one file, too")


def _report(arguments: argparse.Namespace) -> None:
    with quick_imports():
        from hfft.commands.report import report_run

    for path in report_run(arguments.folder, trust_remote_code=arguments.trust_remote_code):
        show(str(path))


def _push(arguments: argparse.Namespace) -> None:
    from pydantic import ValidationError

    from hfft.hub.pushing import bad_spec, push_run
    from hfft.recipe.spec import HubSpec

    try:
        spec = HubSpec(
            repo_id=arguments.repo_id,
            what=arguments.what,
            private=not arguments.public,
            revision=arguments.revision,
            create_pr=arguments.create_pr,
            commit_message=arguments.message,
            base_model=arguments.base_model,
        )
    except ValidationError as error:
        raise bad_spec(error) from error
    pushed = push_run(Path(arguments.run_folder), spec, trust_remote_code=arguments.trust_remote_code)
    show(json.dumps(dataclasses.asdict(pushed)) if arguments.json else pushed.in_words)


def _compare(arguments: argparse.Namespace) -> None:
    from hfft.commands.compare import compare

    _check_html(arguments.html)
    found = compare(arguments.runs, split=arguments.split)
    _write_html(found, arguments.html)
    if arguments.json:
        show(json.dumps(dataclasses.asdict(found)))
        return
    _print_comparison(found)
    if arguments.html is not None:
        show(f"page: {arguments.html}")


def _check_html(file: Path | None) -> None:
    """Before any work that would be lost."""
    if file is not None and file.suffix.lower() not in (".html", ".htm"):
        raise RunError(f"--html {file}: a page's name ends in .html")
    if file is not None and (not file.parent.is_dir() or file.is_dir()):
        raise RunError(f"--html {file}: {'it is a folder' if file.is_dir() else f'there is no folder {file.parent}'}")


def _write_html(found: Any, file: Path | None) -> None:
    if file is None:
        return
    with quick_imports():
        from hfft.report.compare_page import write_comparison

    write_comparison(dataclasses.asdict(found), file)


def _print_comparison(found: Any) -> None:
    names = list(dict.fromkeys(name for row in found.rows for name in row.metrics))
    header = (f"{found.split} of", "images", *spaced(names), "model of", "trainable", "seconds")
    rows = [
        (row.run, row.images, *_cells(row.metrics, names), row.phase, f"{row.trainable:,}", row.seconds)
        for row in found.rows
    ]
    print_table(header, rows)
    pair = found.pair
    if pair is not None:
        show(f"\n{pair.second} minus {pair.first}, on the {pair.images:,} images of both:")
        print_table(
            ("metric", "difference", "95 % interval"),
            [(*spaced([name]), *interval(row, "+").split(" ", 1)) for name, row in pair.differences.items()],
        )
        test = pair.mcnemar
        show(
            f"right on {test.only_second} images where {pair.first} is wrong, wrong on {test.only_first} where it is "
            f"right: McNemar's exact p = {test.p_value:.3g}"
        )
    for note in found.notes:
        show(f"note: {note}")


def _cells(metrics: dict[str, Any], names: list[str]) -> list[str]:
    return [interval(metrics[name]) if name in metrics else "-" for name in names]


def _sweep(arguments: argparse.Namespace) -> None:
    with quick_imports():
        from hfft.commands.sweep import plan_sweep, sweep

    _check_html(arguments.html)
    found = sweep(plan_sweep(arguments.recipe, arguments.values))
    if len(found.finished) > 1:
        from hfft.commands.compare import compare

        compared = compare(found.finished)
        _write_html(compared, arguments.html)
        _print_comparison(compared)
        if arguments.html is not None:
            show(f"page: {arguments.html}")
    elif arguments.html is not None:
        show(f"no page: {len(found.finished)} of the runs finished, and there is nothing to compare")
    if found.failed:
        told = "\n".join(f"  {name}: {reason}" for name, reason in found.failed.items())
        total = len(found.failed) + len(found.finished)
        raise TrainingError(f"{len(found.failed)} of {total} runs failed; the same command tries them again:\n{told}")
