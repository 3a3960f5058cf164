"""The verbs that use a finished model: predict, evaluate, export, demo."""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from hfft.cli.printing import (
    in_words,
    is_main_process,
    print_error,
    print_json,
    print_line,
    print_metrics,
    print_table,
    reader_may_leave,
    values_of,
)
from hfft.errors import DataError
from hfft.system.lazy_imports import quick_imports

_OPENING = ("trust_remote_code", "subfolder")


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
        **values_of(arguments, "device", "calibrated", "precision", "novelty", *_OPENING),
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
        **values_of(arguments, "data", "split", "batch_size", "workers", "bad_images", *_OPENING),
    )
    if not is_main_process():
        return
    if arguments.output is not None:
        table = scores.table(arguments.split or "test")
        write_output_file(arguments.output, lambda path: table.to_parquet(path, index=False))
    images = len(scores.labels)
    if arguments.json:
        print_json(images=images, metrics=scores.metrics, details=scores.details, by_class=scores.by_class)
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
        **values_of(arguments, "output", "images", "most", "overwrite", *_OPENING),
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
            **values_of(arguments, "host", "port", "device", *_OPENING),
        )
    except KeyboardInterrupt:
        print_error("stopped")
