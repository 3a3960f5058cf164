"""Verbs that use a model: predict, evaluate, export, demo."""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from hfft.cli.arguments import add_opening, count, place, whole
from hfft.cli.printing import print_metrics, print_table, reader_may_leave, say, show, spaced
from hfft.errors import DataError
from hfft.system.lazy_imports import quick_imports
from hfft.system.paths import expanded


def add_verbs(verbs: Any) -> None:
    """Add the parsers of these verbs."""
    _add_predict(verbs.add_parser("predict", help="label images"))
    _add_evaluate(verbs.add_parser("evaluate", help="score a model on labelled images"))
    _add_export(verbs.add_parser("export", help="write a model as ONNX, checked against torch"))
    _add_demo(verbs.add_parser("demo", help="show a page that labels the images dropped on it"))


def _add_predict(predict: argparse.ArgumentParser) -> None:
    predict.add_argument("model", type=expanded, help="run folder, model folder, adapter folder or Hub id")
    predict.add_argument(
        "images",
        type=expanded,
        nargs="+",
        help="image files, folders of them, quoted globs, URLs, or - for a list on standard input",
    )
    predict.add_argument("--top", type=count, help="classes to show for each image; 1 when left out")
    form = predict.add_mutually_exclusive_group()
    formats = ("table", "jsonl", "csv", "parquet")
    form.add_argument("--format", choices=formats, help="CSV and Parquet hold all classes")
    form.add_argument("--json", action="store_const", dest="format", const="jsonl", help="the same as --format jsonl")
    predict.add_argument("--output", type=place, metavar="FILE", help="write there; its ending tells the format")
    predict.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="what to do at an image that can't be read"
    )
    predict.add_argument("--allow-url", action="store_true", help="fetch images from the web")
    predict.add_argument("--batch-size", type=count, default=32, help="images per forward pass")
    predict.add_argument("--device", help="for example cpu or cuda:1; the accelerator, if there is one, when left out")
    predict.add_argument("--calibrated", action="store_true", help="probabilities at the temperature kept by the run")
    precision = "'unsure' below the calibrated probability kept for this precision: 0.9, 0.95 or 0.99"
    predict.add_argument("--precision", type=float, help=precision)
    predict.add_argument(
        "--novelty",
        action="store_true",
        help="how unlike all training images each one is, from 0 to 1; not in CSV or Parquet",
    )
    add_opening(predict)
    predict.set_defaults(run=_predict)


def _add_evaluate(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("model", type=expanded, help="run folder, model folder, adapter folder or Hub id")
    evaluate.add_argument(
        "--data", type=expanded, help="folder or Hub id of labelled images; a run's own data when left out"
    )
    evaluate.add_argument("--split", help="split to score; test of a run's own data when left out")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.add_argument("--output", type=place, metavar="FILE.parquet", help="write the prediction for every image")
    evaluate.add_argument("--batch-size", type=count, default=32, help="images per forward pass and process")
    evaluate.add_argument("--workers", type=whole, help="processes that read images; one per core when left out")
    evaluate.add_argument(
        "--bad-images", choices=("skip", "stop"), default="skip", help="what to do about images that can't be read"
    )
    add_opening(evaluate)
    evaluate.set_defaults(run=_evaluate)


def _add_export(export: argparse.ArgumentParser) -> None:
    export.add_argument("model", type=expanded, help="run folder, model folder, adapter folder or Hub id")
    export.add_argument("--to", choices=("onnx",), default="onnx", help="the format")
    export.add_argument("--output", type=place, metavar="FOLDER", help="write there; into onnx in the model's folder")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    export.add_argument(
        "--images", type=place, metavar="FOLDER", help="compare with torch on these; a run's own images when left out"
    )
    export.add_argument("--most", type=count, default=1000, help="images to compare on, at most; evenly spread")
    add_opening(export)
    export.set_defaults(run=_export)


def _add_demo(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("model", type=expanded, help="run folder, model folder, adapter folder or Hub id")
    demo.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in")
    demo.add_argument("--port", type=count, help="the first free one from 7860 on when left out")
    demo.add_argument("--device", help="for example cpu or cuda:1; the accelerator, if there is one, when left out")
    demo.add_argument("--space", type=place, metavar="FOLDER", help="show nothing, and write a Space there")
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier Space")
    add_opening(demo)
    demo.set_defaults(run=_demo)


def _predict(arguments: argparse.Namespace) -> None:
    with quick_imports():
        from hfft.inference.images import find_input_images

        found = find_input_images(arguments.images, allow_url=arguments.allow_url, listed=sys.stdin)
        from hfft.inference.classifier import Classifier
        from hfft.inference.predictions import Columns, WithoutSkipped, choose_format, save_predictions, write_lines

    output, form = arguments.output, choose_format(arguments.format, arguments.output)
    holds_all = form in ("csv", "parquet")
    if holds_all and arguments.top is not None:
        raise DataError(f"--top {arguments.top}: {form} holds all classes; leave --top out")
    if holds_all and arguments.novelty:
        raise DataError(f"--novelty: {form} has no column for it; leave it out, or choose --format jsonl")
    classifier = Classifier.from_pretrained(
        arguments.model,
        trust_remote_code=arguments.trust_remote_code,
        subfolder=arguments.subfolder,
        device=arguments.device,
        calibrated=arguments.calibrated,
        precision=arguments.precision,
        novelty=arguments.novelty,
    )
    answers = classifier.predict(
        found.images,
        top=len(classifier.classes) if holds_all else arguments.top or 1,
        batch_size=arguments.batch_size,
        on_error=arguments.on_error,
    )
    columns = Columns(classifier.classes, classifier.is_multi_label)
    kept = WithoutSkipped(_with_bar(answers, found.count, beside_lines=output is None and form != "table"))
    if output is not None:
        save_predictions(kept, output, form, columns)
    elif form == "table":
        _print_predictions(kept)
    else:
        with reader_may_leave():
            write_lines(kept, sys.stdout, form, columns)
    kept.raise_for_skipped()


def _with_bar(answers: Iterator[Any], count: int | None, *, beside_lines: bool) -> Iterator[Any]:
    """A progress bar on a terminal, after three seconds; not among lines that appear there as they come."""
    from hfft.system.progress import SOON, bar

    shown = False if beside_lines and sys.stdout.isatty() else None
    yield from bar("predicting", count, answers, delay=SOON, shown=shown)


def _print_predictions(predictions: Iterable[Any]) -> None:
    rows = [(p.file, _in_words(p)) for p in predictions]
    print_table(("file", "label and probability"), rows)


def _in_words(prediction: Any) -> str:
    """The classes with their probabilities, in brackets where the classifier is unsure; or all labels."""
    classes = ", ".join(f"{label} {probability:.4f}" for label, probability in prediction.top.items())
    if prediction.labels is not None:
        given = ", ".join(f"{label} {probability:.4f}" for label, probability in prediction.labels.items()) or "none"
        more = len(prediction.top) > 1 and prediction.top != prediction.labels
        answer = f"{given} (most probable: {classes})" if more else given
        return answer if prediction.novelty is None else f"{answer}; novelty {prediction.novelty:.2f}"
    answer = classes if prediction.label in prediction.top else f"{prediction.label} ({classes})"
    return answer if prediction.novelty is None else f"{answer}; novelty {prediction.novelty:.2f}"


def _evaluate(arguments: argparse.Namespace) -> None:
    with quick_imports():
        from hfft.commands.evaluate import evaluate
        from hfft.inference.outputs import check_output_file, write_output_file

    if arguments.output is not None:
        check_output_file(arguments.output, endings=(".parquet",))
    scores = evaluate(
        arguments.model,
        data=arguments.data,
        split=arguments.split,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        bad_images=arguments.bad_images,
        trust_remote_code=arguments.trust_remote_code,
        subfolder=arguments.subfolder,
    )
    if os.environ.get("RANK", "0") != "0":
        return
    if arguments.output is not None:
        table = scores.table(arguments.split or "test")
        write_output_file(arguments.output, lambda path: table.to_parquet(path, index=False))
    if arguments.json:
        found = {"metrics": scores.metrics, "details": scores.details, "by_class": scores.by_class}
        show(json.dumps({"images": len(scores.labels), **found}))
        return
    print_metrics({f"{len(scores.labels)} images": scores.metrics})
    print_table(("more", ""), [(*spaced([name]), f"{value:.4f}") for name, value in scores.details.items()])
    rows = [(name, *_class_cells(row)) for name, row in scores.by_class.items()]
    more = ("AP", "threshold") if scores.labels.ndim == 2 else ()
    print_table(("class", "precision", "recall", "F1", "images", *more), rows)


def _class_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Precision, recall, F1 and images; a class without images has no recall."""
    recall = f"{row['recall']:.4f}" if row["images"] else "-"
    cells = (f"{row['precision']:.4f}", recall, f"{row['f1']:.4f}", str(row["images"]))
    if "threshold" not in row:
        return cells
    precision = "-" if row["average_precision"] is None else f"{row['average_precision']:.4f}"
    return *cells, precision, f"{row['threshold']:.4f}"


def _export(arguments: argparse.Namespace) -> None:
    with quick_imports():
        from hfft.commands.export import export_onnx

    export = export_onnx(
        arguments.model,
        output=arguments.output,
        images=arguments.images,
        most=arguments.most,
        overwrite=arguments.overwrite,
        trust_remote_code=arguments.trust_remote_code,
        subfolder=arguments.subfolder,
    )
    show("\n".join((export.parity.in_words, *export.missing, f"exported: {export.folder}")))


def _demo(arguments: argparse.Namespace) -> None:
    if arguments.space is not None:
        if arguments.subfolder is not None:
            raise DataError("--subfolder: a Space opens what is at the top of a folder or repository; leave it out")
        with quick_imports():
            from hfft.inference.demo import write_space

        write_space(arguments.model, arguments.space, overwrite=arguments.overwrite)
        show(f"written: {arguments.space}; it runs here with `python {arguments.space}/app.py`, and on the Hub after")
        show("  hf repos create OWNER/NAME --type space --sdk gradio")
        show(f"  hf upload OWNER/NAME {arguments.space} --type space")
        return
    with quick_imports():
        from hfft.inference.demo import serve_demo

    try:
        serve_demo(
            arguments.model,
            host=arguments.host,
            port=arguments.port,
            device=arguments.device,
            trust_remote_code=arguments.trust_remote_code,
            subfolder=arguments.subfolder,
            on_start=lambda address: show(f"{address} until Ctrl-C"),
        )
    except KeyboardInterrupt:
        say("stopped")
