"""The verbs of the command line; nothing but argument handling and printing."""

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hfft._version import __version__
from hfft.errors import DataError, HfftError
from hfft.interruption import prompt_interruption, stop_signal
from hfft.startup import quick_imports

_BY_SIGNAL = 128  # plus its number, as shells have it
_UNBROKEN = 2**16  # columns of a table that no terminal shows


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb.

    Args:
        argv: Arguments; those of the process when None.

    Returns:
        0, 1 for a failed run or harmful data, 2 for a bad request, 130 after Ctrl-C, 143 after SIGTERM.
    """
    arguments = _parser().parse_args(argv)
    _show_log()
    try:
        with prompt_interruption():
            code = arguments.run(arguments)
    except HfftError as error:
        _say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        _say("interrupted; a run continues with the same command, without --overwrite")
        return _BY_SIGNAL + (stop_signal() or signal.SIGINT)
    if "RANK" in os.environ:
        from hfft.liveness import leave

        leave()
    return code or 0


def _say(line: str) -> None:
    """Print to stderr, in one of the processes of a launch."""
    if "RANK" in os.environ:
        from hfft.liveness import may_speak  # and torch with it

        if not may_speak():
            return
    print(line, file=sys.stderr)


class _PlainFormatter(logging.Formatter):
    """The message alone, without the rank that Accelerate puts before every line, since only one rank speaks."""

    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage().removeprefix("[RANK 0] ")


def _show_log() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PlainFormatter())
    logger = logging.getLogger("hfft")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hfft", description="Fine-tune image classifiers, in phases.")
    parser.add_argument("--version", action="version", version=f"hfft {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    train = verbs.add_parser("train", help="run a recipe, or finish an interrupted run of it")
    _add_recipe(train)
    train.add_argument("--overwrite", action="store_true", help="start anew where there is a run of that name")
    train.set_defaults(run=_train)

    plan = verbs.add_parser("plan", help="check a recipe and show what each phase would do")
    _add_recipe(plan)
    plan.add_argument("--processes", type=_count, default=1, help="processes that would share the images")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(run=_plan)

    _add_check(verbs.add_parser("check-data", help="look for broken, repeated and leaking images"))
    _add_predict(verbs.add_parser("predict", help="label images"))
    _add_evaluate(verbs.add_parser("evaluate", help="score a model on labelled images"))

    report = verbs.add_parser("report", help="render the model card and the figures of a finished run anew")
    report.add_argument("folder", metavar="run", help="run folder")
    report.set_defaults(run=_report)
    _add_push(verbs.add_parser("push", help="send a run to the Hugging Face Hub, read it back and compare"))
    _add_export(verbs.add_parser("export", help="write a model as ONNX, checked against torch"))
    _add_demo(verbs.add_parser("demo", help="show a page that labels the images dropped on it"))
    _add_compare(verbs.add_parser("compare", help="set finished runs side by side"))
    return parser


def _add_check(check: argparse.ArgumentParser) -> None:
    check.add_argument("source", help="folder, table, shards, Hub id or recipe")
    check.add_argument(
        "overrides", nargs="*", metavar="key=value", help="as for train: data.label_column=..., data.audit=quick"
    )
    check.add_argument("--max-shown", type=_whole, default=10, metavar="N", help="findings of a kind; 0 shows all")
    check.add_argument("--json", action="store_true", help="print JSON, all findings included")
    check.set_defaults(run=_check)


def _add_predict(predict: argparse.ArgumentParser) -> None:
    predict.add_argument("model", help="run folder, model folder, adapter folder or Hub id")
    predict.add_argument(
        "images", nargs="+", help="image files, folders of them, quoted globs, URLs, or - for a list on standard input"
    )
    predict.add_argument("--top", type=_count, help="classes to show for each image; 1 when left out")
    form = predict.add_mutually_exclusive_group()
    formats = ("table", "jsonl", "csv", "parquet")
    form.add_argument("--format", choices=formats, help="CSV and Parquet hold all classes")
    form.add_argument("--json", action="store_const", dest="format", const="jsonl", help="the same as --format jsonl")
    predict.add_argument("--output", type=Path, metavar="FILE", help="write there; its ending tells the format")
    predict.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="what to do at an image that can't be read"
    )
    predict.add_argument("--allow-url", action="store_true", help="fetch images from the web")
    predict.add_argument("--batch-size", type=_count, default=32, help="images per forward pass")
    predict.add_argument("--device", help="for example cpu or cuda:1; the accelerator, if there is one, when left out")
    predict.add_argument("--calibrated", action="store_true", help="probabilities at the temperature kept by the run")
    precision = "'unsure' below the calibrated probability kept for this precision: 0.9, 0.95 or 0.99"
    predict.add_argument("--precision", type=float, help=precision)
    predict.add_argument(
        "--novelty",
        action="store_true",
        help="how unlike all training images each one is, from 0 to 1; not in CSV or Parquet",
    )
    predict.set_defaults(run=_predict)


def _add_evaluate(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("model", help="run folder, model folder, adapter folder or Hub id")
    evaluate.add_argument("--data", help="folder or Hub id of labelled images; a run's own data when left out")
    evaluate.add_argument("--split", help="split to score; test of a run's own data when left out")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.add_argument("--output", type=Path, metavar="FILE.parquet", help="write the prediction for every image")
    evaluate.add_argument("--batch-size", type=_count, default=32, help="images per forward pass and process")
    evaluate.add_argument("--workers", type=_whole, help="processes that read images; one per core when left out")
    evaluate.add_argument(
        "--bad-images", choices=("skip", "stop"), default="skip", help="what to do about images that can't be read"
    )
    evaluate.set_defaults(run=_evaluate)


def _add_push(push: argparse.ArgumentParser) -> None:
    push.add_argument("run_folder", metavar="run", help="run folder")
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
    push.set_defaults(run=_push)


def _add_export(export: argparse.ArgumentParser) -> None:
    export.add_argument("model", help="run folder, model folder, adapter folder or Hub id")
    export.add_argument("--to", choices=("onnx",), default="onnx", help="the format")
    export.add_argument("--output", type=Path, metavar="FOLDER", help="write there; into onnx in the model's folder")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    export.add_argument(
        "--images", type=Path, metavar="FOLDER", help="compare with torch on these; a run's own images when left out"
    )
    export.add_argument("--most", type=_count, default=1000, help="images to compare on, at most; evenly spread")
    export.set_defaults(run=_export)


def _add_demo(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("model", help="run folder, model folder, adapter folder or Hub id")
    demo.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in")
    demo.add_argument("--port", type=_count, help="the first free one from 7860 on when left out")
    demo.add_argument("--device", help="for example cpu or cuda:1; the accelerator, if there is one, when left out")
    demo.add_argument("--space", type=Path, metavar="FOLDER", help="show nothing, and write a Space there")
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier Space")
    demo.set_defaults(run=_demo)


def _add_compare(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("runs", nargs="+", metavar="RUN", help="run folder; of two, the differences are shown too")
    compare.add_argument("--split", choices=("test", "validation"), help="test where all have it, when left out")
    compare.add_argument("--json", action="store_true", help="print JSON")
    compare.set_defaults(run=_compare)


def _whole(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: a whole number above 0")
    return int(text)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example phases.head.learning_rate=5e-4")


def _train(arguments: argparse.Namespace) -> None:
    from hfft.recipe.loading import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if recipe.folds is not None:
        _cross_validate(recipe, overwrite=arguments.overwrite)
        return
    if recipe.hub.repo_id is not None and os.environ.get("RANK", "0") == "0":
        from hfft.hub.pushing import check_ahead

        check_ahead(recipe, overwrite=arguments.overwrite)  # said before torch is imported
    with quick_imports():
        from hfft.run import finetune

    run = finetune(recipe, overwrite=arguments.overwrite)
    if os.environ.get("RANK", "0") == "0":
        _print_metrics({split: run.metrics[split] for split in ("validation", "test") if split in run.metrics})
        if run.skipped:
            print(f"left out: {len(run.skipped)} images that can't be read; {run.folder / 'data.json'} lists them")
        print(f"model: {run.model_dir}")


def _cross_validate(recipe: Any, *, overwrite: bool) -> None:
    with quick_imports():
        from hfft.folds import cross_validate

    found = cross_validate(recipe, overwrite=overwrite)
    if os.environ.get("RANK", "0") == "0":
        rows = [
            (name.replace("_", " "), f"{v['value']:.4f}", f"{v['low']:.4f} to {v['high']:.4f}", f"{v['std']:.4f}")
            for name, v in found.metrics["test"].items()
        ]
        _print_table((f"{len(found.runs)} folds", "all images", "95 % interval", "std over folds"), rows)
        print(f"runs: {found.folder}")


def _plan(arguments: argparse.Namespace) -> None:
    from hfft.recipe.loading import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    with quick_imports():
        from hfft.planning import plan_recipe

    images, plans = plan_recipe(recipe, processes=arguments.processes)
    if arguments.json:
        counts = {split: images.counts(split) for split in images.splits}
        print(json.dumps({"splits": counts, "phases": [dataclasses.asdict(plan) for plan in plans]}))
        return
    splits = ", ".join(f"{len(rows):,} {split}" for split, rows in images.splits.items())
    print(f"{recipe.name}: {splits} images, {len(images.labels)} classes: {', '.join(images.labels[:12])}")
    if images.columns:
        print(f"columns: {images.columns}")
    for number, plan in enumerate(plans, start=1):
        _print_plan(plan, f"phase {number}/{len(plans)} {plan.phase}")


def _print_plan(plan: Any, title: str) -> None:
    print(f"\n{title}: trains {plan.trains}")
    print(f"  {plan.trainable:,} of {plan.total:,} parameters ({plan.trainable / plan.total:.2%})")
    print(f"  {plan.steps:,} steps of {plan.batch_in_words}, {plan.epochs:g} epochs")
    if plan.processes > 1:
        least, most = plan.images // plan.processes, -(-plan.images // plan.processes)
        share = f"{least} or {most}" if most > least else f"{least}"
        print(f"  each process sees {share} of {plan.images:,} images per epoch")
    activations = ""
    if plan.activation_bytes is not None:
        activations = f" + about {plan.activation_bytes / 2**20:,.0f} of activations for {plan.device_batch} images"
    print(f"  memory in float32: {plan.state_bytes / 2**20:,.0f} MiB of weights, gradients and AdamW{activations}")
    rows = [
        (
            group.part,
            len(group.names),
            "auto" if group.learning_rate is None else f"{group.learning_rate:.3g}",
            f"{group.weight_decay:g}",
        )
        for group in plan.groups
    ]
    _print_table(("part", "tensors", "learning rate", "weight decay"), rows)


def _check(arguments: argparse.Namespace) -> int:
    with quick_imports():
        from hfft.data.findings import KINDS, described
        from hfft.data.inspection import inspect

    found = inspect(arguments.source, arguments.overrides)
    if arguments.json:
        content = {"splits": found.splits, "findings": [described(finding) for finding in found.findings]}
        print(json.dumps(content))
        return found.exit_code
    _print_table(("split", "images", "classes", "smallest", "median", "largest"), found.summary())
    print()
    _print_table(("class", *found.splits), found.class_counts())
    for kind, findings in found.by_kind().items():
        print(f"\n{kind} ({KINDS[kind][0]}): {KINDS[kind][1]}: {len(findings)}")
        shown = findings[: arguments.max_shown or None]
        _print_table(("images", "what", "files"), [_finding_cells(finding) for finding in shown])
        if len(findings) > len(shown):
            print(f"and {len(findings) - len(shown)} more; --max-shown 0 shows all")
    print(f"\n{found.conclusion}")
    return found.exit_code


def _finding_cells(finding: Any) -> tuple[str, ...]:
    files = ", ".join(finding.files[:6]) + (", ..." if finding.count > 6 else "")
    return str(finding.count or ""), finding.detail, files


def _predict(arguments: argparse.Namespace) -> None:
    with quick_imports():
        from hfft.inference.images import find_images

        found = find_images(arguments.images, allow_url=arguments.allow_url, listed=sys.stdin)
        from hfft.inference.classifier import Classifier
        from hfft.inference.writing import Kept, choose_format, save_predictions, write_lines

    output, form = arguments.output, choose_format(arguments.format, arguments.output)
    holds_all = form in ("csv", "parquet")
    if holds_all and arguments.top is not None:
        raise DataError(f"--top {arguments.top}: {form} holds all classes; leave --top out")
    if holds_all and arguments.novelty:
        raise DataError(f"--novelty: {form} has no column for it; leave it out, or choose --format jsonl")
    classifier = Classifier.from_pretrained(
        arguments.model,
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
    kept = Kept(_with_bar(answers, found.count, beside_lines=output is None and form != "table"))
    if output is not None:
        save_predictions(kept, output, form, classifier.classes)
    elif form == "table":
        _print_predictions(kept)
    else:
        with _reader_may_leave():
            write_lines(kept, sys.stdout, form, classifier.classes)
    kept.raise_for_skipped()


def _with_bar(answers: Iterator[Any], count: int | None, *, beside_lines: bool) -> Iterator[Any]:
    """A progress bar on a terminal, after three seconds; not among lines that appear there as they come."""
    from tqdm import tqdm

    disable = True if beside_lines and sys.stdout.isatty() else None
    yield from tqdm(answers, "predicting", count, unit=" images", delay=3, disable=disable)


@contextmanager
def _reader_may_leave() -> Iterator[None]:
    """End quietly when whoever reads the standard output has enough, as `head` does."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at the end


def _print_predictions(predictions: Iterable[Any]) -> None:
    rows = [(p.file, _in_words(p)) for p in predictions]
    _print_table(("file", "label and probability"), rows)


def _in_words(prediction: Any) -> str:
    """The classes with their probabilities, in brackets where the classifier is unsure."""
    classes = ", ".join(f"{label} {probability:.4f}" for label, probability in prediction.top.items())
    answer = classes if prediction.label in prediction.top else f"{prediction.label} ({classes})"
    return answer if prediction.novelty is None else f"{answer}; novelty {prediction.novelty:.2f}"


def _evaluate(arguments: argparse.Namespace) -> None:
    with quick_imports():
        from hfft.inference.writing import check_table_file, save_table
        from hfft.run import evaluate

    if arguments.output is not None:
        check_table_file(arguments.output)
    scores = evaluate(
        arguments.model,
        data=arguments.data,
        split=arguments.split,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        bad_images=arguments.bad_images,
    )
    if os.environ.get("RANK", "0") != "0":
        return
    if arguments.output is not None:
        save_table(scores.table(arguments.split or "test"), arguments.output)
    if arguments.json:
        found = {"metrics": scores.metrics, "details": scores.details, "by_class": scores.by_class}
        print(json.dumps({"images": len(scores.labels), **found}))
        return
    _print_metrics({f"{len(scores.labels)} images": scores.metrics})
    _print_table(("more", ""), [(*_spaced([name]), f"{value:.4f}") for name, value in scores.details.items()])
    rows = [(name, *_class_cells(row)) for name, row in scores.by_class.items()]
    _print_table(("class", "precision", "recall", "F1", "images"), rows)


def _report(arguments: argparse.Namespace) -> None:
    with quick_imports():
        from hfft.report.card import write_report

    for path in write_report(arguments.folder):
        print(path)


def _export(arguments: argparse.Namespace) -> None:
    with quick_imports():
        from hfft.inference.export import export_onnx

    export = export_onnx(
        arguments.model,
        output=arguments.output,
        images=arguments.images,
        most=arguments.most,
        overwrite=arguments.overwrite,
    )
    print(f"{export.parity.in_words}\nexported: {export.folder}")


def _demo(arguments: argparse.Namespace) -> None:
    if arguments.space is not None:
        with quick_imports():
            from hfft.inference.space import write_space

        write_space(arguments.model, arguments.space, overwrite=arguments.overwrite)
        print(f"written: {arguments.space}; it runs here with `python {arguments.space}/app.py`, and on the Hub after")
        print("  hf repos create OWNER/NAME --type space --sdk gradio")
        print(f"  hf upload OWNER/NAME {arguments.space} --type space")
        return
    with quick_imports():
        from hfft.inference.demo import serve_demo

    try:
        serve_demo(
            arguments.model,
            host=arguments.host,
            port=arguments.port,
            device=arguments.device,
            tell=lambda address: print(f"{address} until Ctrl-C", flush=True),
        )
    except KeyboardInterrupt:
        _say("stopped")


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
    pushed = push_run(Path(arguments.run_folder), spec)
    print(json.dumps(dataclasses.asdict(pushed)) if arguments.json else pushed.in_words)


def _compare(arguments: argparse.Namespace) -> None:
    from hfft.comparison import compare

    found = compare(arguments.runs, split=arguments.split)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(found)))
        return
    names = list(found.rows[0].metrics)
    header = (f"{found.split} of", "images", *_spaced(names), "model of", "trainable", "seconds")
    rows = [
        (row.run, row.images, *map(_interval, row.metrics.values()), row.phase, f"{row.trainable:,}", row.seconds)
        for row in found.rows
    ]
    _print_table(header, rows)
    pair = found.pair
    if pair is not None:
        print(f"\n{pair.second} minus {pair.first}, on the {pair.images:,} images of both:")
        _print_table(
            ("metric", "difference", "95 % interval"),
            [(*_spaced([name]), *_interval(row, "+").split(" ", 1)) for name, row in pair.differences.items()],
        )
        test = pair.mcnemar
        print(
            f"right on {test.only_second} images where {pair.first} is wrong, wrong on {test.only_first} where it is "
            f"right: McNemar's exact p = {test.p_value:.3g}"
        )
    for note in found.notes:
        print(f"note: {note}")


def _spaced(names: Iterable[str]) -> list[str]:
    return [name.replace("_", " ") for name in names]


def _interval(row: dict[str, float], sign: str = "") -> str:
    return f"{row['value']:{sign}.4f} ({row['low']:{sign}.4f} to {row['high']:{sign}.4f})"


def _class_cells(row: dict[str, float]) -> tuple[str, ...]:
    """Precision, recall, F1 and images; a class without images has no recall."""
    recall = f"{row['recall']:.4f}" if row["images"] else "-"
    return f"{row['precision']:.4f}", recall, f"{row['f1']:.4f}", str(row["images"])


def _print_metrics(metrics: dict[str, dict[str, dict[str, float]]]) -> None:
    rows = [
        (split, name.replace("_", " "), f"{values['value']:.4f}", f"{values['low']:.4f} to {values['high']:.4f}")
        for split, by_name in metrics.items()
        for name, values in by_name.items()
    ]
    _print_table(("", "metric", "value", "95 % interval"), rows)


def _print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console = Console()
    if not console.is_terminal:  # whoever reads it cuts lines as they like
        console = Console(width=_UNBROKEN)
    console.print(table)
