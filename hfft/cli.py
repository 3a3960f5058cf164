"""The verbs of the command line; nothing but argument handling and printing."""

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfft._version import __version__
from hfft.errors import DataError, HfftError
from hfft.interruption import prompt_interruption, stop_signal
from hfft.startup import quick_imports

_BY_SIGNAL = 128  # plus its number, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb.

    Args:
        argv: Arguments; those of the process when None.

    Returns:
        0, 1 for a failed run, 2 for a bad request, 130 after Ctrl-C, 143 after SIGTERM.
    """
    arguments = _parser().parse_args(argv)
    _show_log()
    try:
        with prompt_interruption():
            arguments.run(arguments)
    except HfftError as error:
        _say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        _say("interrupted; a run continues with the same command, without --overwrite")
        return _BY_SIGNAL + (stop_signal() or signal.SIGINT)
    if "RANK" in os.environ:
        from hfft.liveness import leave

        leave()
    return 0


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

    predict = verbs.add_parser("predict", help="label images")
    predict.add_argument("model", help="run folder, model folder, adapter folder or Hub id")
    predict.add_argument("images", nargs="+", help="image files or folders of them")
    predict.add_argument("--top", type=_count, default=1, help="classes to show for each image")
    predict.add_argument("--json", action="store_true", help="print one JSON object per line")
    predict.set_defaults(run=_predict)

    evaluate = verbs.add_parser("evaluate", help="score a model on labelled images")
    evaluate.add_argument("model", help="run folder, model folder or Hub id")
    evaluate.add_argument("--data", help="folder or Hub id of labelled images; a run's own data when left out")
    evaluate.add_argument("--split", help="split to score; test of a run's own data when left out")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.set_defaults(run=_evaluate)
    return parser


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
    with quick_imports():
        from hfft.run import finetune

    run = finetune(recipe, overwrite=arguments.overwrite)
    if os.environ.get("RANK", "0") == "0":
        _print_metrics({split: run.metrics[split] for split in ("validation", "test") if split in run.metrics})
        print(f"model: {run.model_dir}")


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


def _predict(arguments: argparse.Namespace) -> None:
    with quick_imports():
        files = [file for name in arguments.images for file in _image_files(Path(name))]
        from hfft.inference.classifier import Classifier

    predictions = Classifier.from_pretrained(arguments.model)(files, top=arguments.top)
    if arguments.json:
        for prediction in predictions:
            print(json.dumps(dataclasses.asdict(prediction), ensure_ascii=False))
        return
    rows = [
        (p.file, ", ".join(f"{label} {probability:.4f}" for label, probability in p.top.items())) for p in predictions
    ]
    _print_table(("file", "label and probability"), rows)


def _image_files(path: Path) -> list[Path]:
    if path.is_dir():
        from hfft.data.folders import image_files

        files = image_files(path)
        if not files:
            raise DataError(f"{path}: the folder holds no images")
        return files
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    return [path]


def _evaluate(arguments: argparse.Namespace) -> None:
    with quick_imports():
        from hfft.run import evaluate

    scores = evaluate(arguments.model, data=arguments.data, split=arguments.split)
    if arguments.json:
        print(json.dumps({"images": len(scores.labels), "metrics": scores.metrics, "by_class": scores.by_class}))
        return
    _print_metrics({f"{len(scores.labels)} images": scores.metrics})
    rows = [
        (name, f"{row['precision']:.4f}", f"{row['recall']:.4f}", f"{row['f1']:.4f}", row["images"])
        for name, row in scores.by_class.items()
    ]
    _print_table(("class", "precision", "recall", "F1", "images"), rows)


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
    console.print(table, soft_wrap=not console.is_terminal)
