"""The verbs: each calls its function of `hfft.commands` or of a room below, and prints the result."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfft.cli.printing import (
    format_bounds,
    format_interval,
    in_words,
    print_error,
    print_line,
    print_metrics,
    print_table,
    reader_may_leave,
)
from hfft.errors import DataError, TrainingError
from hfft.system.lazy_imports import quick_imports

_OPENING = ("trust_remote_code", "subfolder")


def run_train(arguments: argparse.Namespace) -> None:
    """Run a recipe, or its folds."""
    from hfft.recipe.loading import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if recipe.folds is not None:
        _cross_validate(recipe, overwrite=arguments.overwrite)
        return
    if recipe.hub.repo_id is not None and _is_main_process():
        from hfft.hub.pushing import check_ahead

        check_ahead(recipe, overwrite=arguments.overwrite)  # before torch is imported
    with quick_imports():
        from hfft.commands.finetune import finetune

    run = finetune(recipe, overwrite=arguments.overwrite)
    if _is_main_process():
        print_metrics({split: run.metrics[split] for split in ("validation", "test") if split in run.metrics})
        if run.skipped:
            skipped = f"{len(run.skipped)} images that can't be read"
            print_line(f"left out: {skipped}; {run.folder / 'data.json'} lists them")
        print_line(f"model: {run.model_dir}")


def _values(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Options that are passed on under their names."""
    return {name: getattr(arguments, name) for name in names}


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _cross_validate(recipe: Any, *, overwrite: bool) -> None:
    with quick_imports():
        from hfft.commands.cross_validate import cross_validate

    found = cross_validate(recipe, overwrite=overwrite)
    if _is_main_process():
        rows = [
            (in_words(name), f"{row['value']:.4f}", format_bounds(row), f"{row['std']:.4f}")
            for name, row in found.metrics["test"].items()
        ]
        print_table((f"{len(found.runs)} folds", "all images", "95 % interval", "std over folds"), rows)
        print_line(f"runs: {found.folder}")


def run_plan(arguments: argparse.Namespace) -> None:
    """Check a recipe, and print the plan of each phase."""
    from hfft.recipe.loading import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    with quick_imports():
        from hfft.commands.plan import plan_recipe

    images, plans = plan_recipe(recipe, processes=arguments.processes)
    if arguments.json:
        counts = {split: images.counts(split) for split in images.splits}
        _print_json(splits=counts, shards=images.shards, phases=[dataclasses.asdict(plan) for plan in plans])
        return
    splits = ", ".join(f"{len(rows):,} {split}" for split, rows in images.splits.items())
    many = ", any number of them in an image" if images.is_multi_label else ""
    print_line(f"{recipe.name}: {splits} images, {len(images.labels)} classes{many}: {', '.join(images.labels[:12])}")
    if images.columns:
        print_line(f"columns: {images.columns}")
    if images.shards and arguments.processes > 1:
        print_line(f"shards: {images.shards}; each process reads its images from all of them")
    for number, one in enumerate(plans, start=1):
        _print_plan(one, f"phase {number}/{len(plans)} {one.phase}")


def _print_plan(plan: Any, title: str) -> None:
    print_line(f"\n{title}: trains {plan.trains}")
    print_line(f"  {plan.trainable:,} of {plan.total:,} parameters ({plan.trainable / plan.total:.2%})")
    epochs = ", 1 epoch" if plan.epochs == 1 else f", {plan.epochs:g} epochs"
    print_line(f"  {plan.steps_in_words}{epochs if plan.groups else ''}")
    if plan.processes > 1:
        least, most = plan.shares
        share = f"{least} to {most}" if most > least else f"{least}"
        print_line(f"  each process sees {share} of {plan.images:,} images per epoch")
    activations = ""
    if plan.activation_bytes is not None:
        activations = f" + about {plan.activation_bytes / 2**20:,.0f} of activations for {plan.device_batch} images"
    state = f"{plan.state_bytes / 2**20:,.0f} MiB of weights, gradients and AdamW"
    print_line(f"  memory in float32: {state}{activations}")
    rows = [
        (group.part, len(group.names), f"{group.learning_rate:.3g}", f"{group.weight_decay:g}")
        for group in plan.groups
    ]
    if rows:
        print_table(("part", "tensors", "learning rate", "weight decay"), rows)


def run_check_data(arguments: argparse.Namespace) -> int:
    """Look at the images, and print what is wrong with them."""
    with quick_imports():
        from hfft.commands.check_data import check_data
        from hfft.data.audit.findings import KINDS

    found = check_data(arguments.source, arguments.overrides)
    if arguments.json:
        _print_json(**found.to_dict())
        return found.exit_code
    print_table(("split", "images", "classes", "smallest", "median", "largest"), found.summary())
    print_line()
    print_table(("class", *found.splits), found.class_counts())
    for kind, findings in found.by_kind().items():
        print_line(f"\n{kind} ({KINDS[kind][0]}): {KINDS[kind][1]}: {len(findings)}")
        shown = findings[: arguments.max_shown or None]
        rows = [
            (one.count or "", one.detail, ", ".join(one.files[:6]) + (", ..." if one.count > 6 else ""))
            for one in shown
        ]
        print_table(("images", "what", "files"), rows)
        if len(findings) > len(shown):
            print_line(f"and {len(findings) - len(shown)} more; --max-shown 0 shows all")
    print_line(f"\n{found.conclusion}")
    return found.exit_code


def run_predict(arguments: argparse.Namespace) -> None:
    """Label images."""
    with quick_imports():
        from hfft.inference.images import find_input_images

        found = find_input_images(arguments.images, allow_url=arguments.allow_url, listed=sys.stdin)
        from hfft.inference.classifier import Classifier
        from hfft.inference.outputs import Columns, WithoutSkipped, choose_format, save_predictions, write_lines

    output, form = arguments.output, choose_format(arguments.format, arguments.output)
    holds_all = form in ("csv", "parquet")
    if holds_all and arguments.top is not None:
        raise DataError(f"--top {arguments.top}: {form} holds all classes; leave --top out")
    if holds_all and arguments.novelty:
        raise DataError(f"--novelty: {form} has no column for it; leave it out, or choose --format jsonl")
    classifier = Classifier.from_pretrained(
        arguments.model,
        **_values(arguments, "device", "calibrated", "precision", "novelty", *_OPENING),
    )
    results = classifier.predict(
        found.images,
        top=len(classifier.classes) if holds_all else arguments.top or 1,
        batch_size=arguments.batch_size,
        on_error=arguments.on_error,
    )
    columns = Columns(classifier.classes, classifier.is_multi_label)
    predictions = WithoutSkipped(_with_bar(results, found.count, among_lines=output is None and form != "table"))
    if output is not None:
        save_predictions(predictions, output, form, columns)
    elif form == "table":
        print_table(("file", "label and probability"), [(one.file, _prediction_cell(one)) for one in predictions])
    else:
        with reader_may_leave():
            write_lines(predictions, sys.stdout, form, columns)
    predictions.raise_for_skipped()


def _with_bar(results: Iterator[Any], count: int | None, *, among_lines: bool) -> Iterator[Any]:
    """A progress bar on a terminal, after three seconds, unless lines appear there meanwhile."""
    from hfft.system.progress import SOON, bar

    shown = False if among_lines and sys.stdout.isatty() else None
    yield from bar("predicting", count, results, delay=SOON, shown=shown)


def _prediction_cell(prediction: Any) -> str:
    """Classes with their probabilities, in brackets behind `unsure`; of a multi-label model all labels."""
    top = ", ".join(f"{label} {probability:.4f}" for label, probability in prediction.top.items())
    if prediction.labels is not None:
        labels = ", ".join(f"{label} {probability:.4f}" for label, probability in prediction.labels.items()) or "none"
        shows_more = len(prediction.top) > 1 and prediction.top != prediction.labels
        answer = f"{labels} (most probable: {top})" if shows_more else labels
    else:
        answer = top if prediction.label in prediction.top else f"{prediction.label} ({top})"
    return answer if prediction.novelty is None else f"{answer}; novelty {prediction.novelty:.2f}"


def run_evaluate(arguments: argparse.Namespace) -> None:
    """Score a model."""
    with quick_imports():
        from hfft.commands.evaluate import evaluate
        from hfft.inference.outputs import check_output_file, write_output_file

    if arguments.output is not None:
        check_output_file(arguments.output, endings=(".parquet",))
    scores = evaluate(
        arguments.model,
        **_values(arguments, "data", "split", "batch_size", "workers", "bad_images", *_OPENING),
    )
    if not _is_main_process():
        return
    if arguments.output is not None:
        table = scores.table(arguments.split or "test")
        write_output_file(arguments.output, lambda path: table.to_parquet(path, index=False))
    images = len(scores.labels)
    if arguments.json:
        _print_json(images=images, metrics=scores.metrics, details=scores.details, by_class=scores.by_class)
        return
    print_metrics({f"{images} images": scores.metrics})
    print_table(("more", ""), [(in_words(name), f"{value:.4f}") for name, value in scores.details.items()])
    more = ("AP", "threshold") if scores.labels.ndim == 2 else ()
    rows = [(name, *_class_cells(row)) for name, row in scores.by_class.items()]
    print_table(("class", "precision", "recall", "F1", "images", *more), rows)


def _class_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Precision, recall, F1 and images, of a multi-label model also average precision and threshold."""
    recall = f"{row['recall']:.4f}" if row["images"] else "-"
    cells = (f"{row['precision']:.4f}", recall, f"{row['f1']:.4f}", str(row["images"]))
    if "threshold" not in row:
        return cells
    precision = "-" if row["average_precision"] is None else f"{row['average_precision']:.4f}"
    return *cells, precision, f"{row['threshold']:.4f}"


def run_export(arguments: argparse.Namespace) -> None:
    """Write a model as ONNX."""
    with quick_imports():
        from hfft.commands.export import export_onnx

    found = export_onnx(
        arguments.model,
        **_values(arguments, "output", "images", "most", "overwrite", *_OPENING),
    )
    print_line("\n".join((found.parity.in_words, *found.missing, f"exported: {found.folder}")))


def run_demo(arguments: argparse.Namespace) -> None:
    """Serve the page of a model, or write it as a Space."""
    if arguments.space is not None and arguments.subfolder is not None:
        raise DataError("--subfolder: a Space opens what is at the top of a folder or repository; leave it out")
    with quick_imports():
        from hfft.inference.demo import serve_demo, write_space

    if arguments.space is not None:
        space = arguments.space
        write_space(arguments.model, space, overwrite=arguments.overwrite)
        print_line(f"written: {space}; it runs here with `python {space}/app.py`, and on the Hub after")
        print_line("  hf repos create OWNER/NAME --type space --sdk gradio")
        print_line(f"  hf upload OWNER/NAME {space} --type space")
        return
    try:
        serve_demo(
            arguments.model,
            on_start=lambda address: print_line(f"{address} until Ctrl-C"),
            **_values(arguments, "host", "port", "device", *_OPENING),
        )
    except KeyboardInterrupt:
        print_error("stopped")


def run_report(arguments: argparse.Namespace) -> None:
    """Render card, page and figures of a finished run anew."""
    with quick_imports():
        from hfft.commands.report import report_run

    for path in report_run(arguments.folder, trust_remote_code=arguments.trust_remote_code):
        print_line(str(path))


def run_push(arguments: argparse.Namespace) -> None:
    """Send a run to the Hub."""
    from hfft.hub.pushing import push

    pushed = push(
        arguments.run_folder,
        arguments.repo_id,
        trust_remote_code=arguments.trust_remote_code,
        what=arguments.what,
        private=not arguments.public,
        revision=arguments.revision,
        create_pr=arguments.create_pr,
        commit_message=arguments.message,
        base_model=arguments.base_model,
    )
    print_line(json.dumps(dataclasses.asdict(pushed)) if arguments.json else pushed.in_words)


def run_sweep(arguments: argparse.Namespace) -> None:
    """Run a recipe with each combination of some values, and compare the runs."""
    _check_html(arguments.html)
    with quick_imports():
        from hfft.commands.sweep import plan_sweep, sweep

    found = sweep(plan_sweep(arguments.recipe, arguments.values))
    if len(found.finished) > 1:
        from hfft.commands.compare import compare

        _show_comparison(compare(found.finished), arguments.html)
    elif arguments.html is not None:
        print_line(f"no page: {len(found.finished)} of the runs finished, and there is nothing to compare")
    if found.failed:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in found.failed.items())
        total = len(found.failed) + len(found.finished)
        raise TrainingError(
            f"{len(found.failed)} of {total} runs failed; the same command tries them again:\n{reasons}"
        )


def run_compare(arguments: argparse.Namespace) -> None:
    """Compare finished runs."""
    _check_html(arguments.html)
    from hfft.commands.compare import compare

    found = compare(arguments.runs, split=arguments.split)
    _show_comparison(found, arguments.html, as_json=arguments.json)


def _check_html(file: Path | None) -> None:
    if file is not None:
        from hfft.inference.outputs import check_output_file

        check_output_file(file, "--html", (".html", ".htm"))


def _show_comparison(found: Any, html: Path | None, *, as_json: bool = False) -> None:
    content = dataclasses.asdict(found)
    if html is not None:
        with quick_imports():
            from hfft.report.page import write_comparison

        write_comparison(content, html)
    if as_json:
        _print_json(**content)
        return
    names = list(dict.fromkeys(name for row in found.rows for name in row.metrics))
    header = (f"{found.split} of", "images", *map(in_words, names), "model of", "trainable", "seconds")
    rows = [
        (
            *(row.run, row.images),
            *(format_interval(row.metrics[name]) if name in row.metrics else "-" for name in names),
            *(row.phase, f"{row.trainable:,}", row.seconds),
        )
        for row in found.rows
    ]
    print_table(header, rows)
    if found.pair is not None:
        _print_pair(found.pair)
    for note in found.notes:
        print_line(f"note: {note}")
    if html is not None:
        print_line(f"page: {html}")


def _print_pair(pair: Any) -> None:
    print_line(f"\n{pair.second} minus {pair.first}, on the {pair.images:,} images of both:")
    rows = [
        (in_words(name), f"{row['value']:+.4f}", f"({format_bounds(row, '+')})")
        for name, row in pair.differences.items()
    ]
    print_table(("metric", "difference", "95 % interval"), rows)
    test = pair.mcnemar
    print_line(
        f"right on {test.only_second} images where {pair.first} is wrong, wrong on {test.only_first} where it is "
        f"right: McNemar's exact p = {test.p_value:.3g}"
    )


def _print_json(**content: Any) -> None:
    print_line(json.dumps(content))
