"""The verbs with their arguments and options."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import hfft.cli.model_verbs as model_verbs
import hfft.cli.verbs as verbs
from hfft._version import __version__
from hfft.errors import nearest
from hfft.system.files import expanded
from hfft.system.text import printable

_MODEL = "run folder, model folder, adapter folder or Hub id"
_DEVICE = "for example cpu or cuda:1; the accelerator, if there is one, when left out"


class VerbParser(argparse.ArgumentParser):
    """Arguments of a verb, whose words may stand before, between and after its options.

    argparse gives the last positional argument the words up to the next option and calls the others unrecognized;
    its `parse_intermixed_args` is not for parsers that have verbs.
    """

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride] of its three forms, one is made here
        self, args: Any = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse all arguments; what argparse left over goes to the verb's list of words, or is refused."""
        found, left = super().parse_known_args(args, namespace)
        words = next((action for action in self._get_positional_actions() if action.nargs in ("*", "+")), None)
        assigns = words is not None and str(words.metavar).startswith("key=")
        left = [word for word in left if word != "--"]
        for word in left:
            if word.startswith("-") and word != "-":
                self.error(self._unknown_option(word, assigns=assigns))
            if words is None:
                self.error(f"found {word!r}; `{self.prog}` takes no more words")
            if assigns and "=" not in word:
                self.error(f"found {word!r}; allowed: {words.metavar}")
        if words is not None and left:
            added: Any = [self._get_value(words, word) for word in left]
            setattr(found, words.dest, [*getattr(found, words.dest), *added])
        return found, []

    def error(self, message: str) -> NoReturn:
        """Print what is wrong with the words, and exit."""
        super().error(printable(message))

    def _unknown_option(self, word: str, *, assigns: bool) -> str:
        name = word.partition("=")[0]
        known = [option for option in self._option_string_actions if option.startswith("--") and option != "--help"]
        meant = nearest(name, known)
        if meant:
            hint = f"did you mean {meant}?"
        elif assigns and "=" in word:
            hint = f"an override has no dashes: {word.lstrip('-')}"
        else:
            hint = f"allowed: {', '.join(known)}" if known else "it takes none"
        return f"unknown option {name}; {hint}"


def build_parser() -> argparse.ArgumentParser:
    """The parser of `hfft`; a parsed verb has its function in `run`."""
    parser = argparse.ArgumentParser(prog="hfft", description="Fine-tune image classifiers, in phases.")
    parser.add_argument("--version", action="version", version=f"hfft {__version__}")
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=VerbParser)

    def verb(name: str, run: Callable[[argparse.Namespace], int | None], purpose: str) -> VerbParser:
        added = subparsers.add_parser(name, help=purpose)
        added.set_defaults(run=run)
        return added

    _add_train(verb("train", verbs.run_train, "run a recipe, or finish an interrupted run of it"))
    _add_plan(verb("plan", verbs.run_plan, "check a recipe and show what each phase would do"))
    _add_check_data(verb("check-data", verbs.run_check_data, "look for broken, repeated and leaking images"))
    _add_find_lr(verb("find-lr", verbs.run_find_lr, "try rising learning rates in a phase, and suggest one"))
    _add_choose(verb("choose", verbs.run_choose, "see which checkpoint suits some images, without training"))
    _add_predict(verb("predict", model_verbs.run_predict, "label images"))
    _add_evaluate(verb("evaluate", model_verbs.run_evaluate, "score a model on labelled images"))
    _add_export(verb("export", model_verbs.run_export, "write a model as ONNX, checked against torch"))
    _add_demo(verb("demo", model_verbs.run_demo, "show a page that labels the images dropped on it"))
    report = verb("report", verbs.run_report, "render card, report.html and figures of a finished run anew")
    report.add_argument("folder", type=expanded, metavar="run", help="run folder")
    _add_trust(report)
    _add_push(verb("push", verbs.run_push, "send a run to the Hugging Face Hub, read it back and compare"))
    sweep = verb("sweep", verbs.run_sweep, "run a recipe with each combination of some values, and compare")
    sweep.add_argument("recipe", type=expanded, help="YAML file")
    sweep.add_argument("values", nargs="+", metavar="key=value1,value2", help="for example seed=0,1,2")
    _add_html(sweep)
    _add_compare(verb("compare", verbs.run_compare, "set finished runs side by side"))
    return parser


def _add_train(train: VerbParser) -> None:
    _add_recipe(train)
    train.add_argument("--overwrite", action="store_true", help="start anew where there is a run of that name")


def _add_plan(plan: VerbParser) -> None:
    _add_recipe(plan)
    plan.add_argument("--processes", type=_positive, default=1, help="processes that would share the images")
    _add_json(plan)


def _add_check_data(check: VerbParser) -> None:
    check.add_argument("source", type=expanded, help="folder, table, shards, Hub id or recipe")
    _add_overrides(check, "as for train: data.label_column=..., data.audit=quick")
    check.add_argument("--max-shown", type=_natural, default=10, metavar="N", help="findings of a kind; 0 shows all")
    _add_json(check, "print JSON, all findings included")


def _add_find_lr(find_lr: VerbParser) -> None:
    _add_recipe(find_lr)
    find_lr.add_argument("--phase", metavar="NAME", help="phase whose rate is tried; the last one when left out")
    find_lr.add_argument("--steps", type=_positive, default=100, metavar="N", help="optimizer steps, 10 at least")
    find_lr.add_argument("--figure", type=_path, metavar="FILE", help="draw the losses there, as PNG, SVG or PDF")
    _add_json(find_lr)


def _add_choose(choose: VerbParser) -> None:
    choose.add_argument("source", type=expanded, help="folder, table, shards or Hub id")
    words = "folder or Hub id of a checkpoint; and overrides as for train: data.label_column=..."
    choose.add_argument("words", type=expanded, nargs="+", metavar="CHECKPOINT", help=words)
    choose.add_argument("--output", type=_path, metavar="FILE", help="write what --json prints there, too")
    _add_json(choose)
    _add_trust(choose)


def _add_predict(predict: VerbParser) -> None:
    predict.add_argument("model", type=expanded, help=_MODEL)
    predict.add_argument(
        "images",
        type=expanded,
        nargs="+",
        help="image files, folders of them, quoted globs, URLs, or - for a list on standard input",
    )
    predict.add_argument("--top", type=_positive, help="classes to show for each image; 1 when left out")
    form = predict.add_mutually_exclusive_group()
    formats = ("table", "jsonl", "csv", "parquet")
    form.add_argument("--format", choices=formats, help="CSV and Parquet hold all classes")
    form.add_argument("--json", action="store_const", dest="format", const="jsonl", help="the same as --format jsonl")
    predict.add_argument("--output", type=_path, metavar="FILE", help="write there; its ending tells the format")
    predict.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="what to do at an image that can't be read"
    )
    predict.add_argument("--allow-url", action="store_true", help="fetch images from the web")
    predict.add_argument("--batch-size", type=_positive, default=32, help="images per forward pass")
    predict.add_argument("--device", help=_DEVICE)
    predict.add_argument("--calibrated", action="store_true", help="probabilities at the temperature kept by the run")
    precision = "'unsure' below the calibrated probability kept for this precision: 0.9, 0.95 or 0.99"
    predict.add_argument("--precision", type=float, help=precision)
    novelty = "how unlike all training images each one is, from 0 to 1; not in CSV or Parquet"
    predict.add_argument("--novelty", action="store_true", help=novelty)
    _add_opening(predict)


def _add_evaluate(evaluate: VerbParser) -> None:
    evaluate.add_argument("model", type=expanded, help=_MODEL)
    evaluate.add_argument(
        "--data", type=expanded, help="folder or Hub id of labelled images; a run's own data when left out"
    )
    evaluate.add_argument("--split", help="split to score; test of a run's own data when left out")
    _add_json(evaluate)
    evaluate.add_argument("--output", type=_path, metavar="FILE.parquet", help="write the prediction for every image")
    evaluate.add_argument("--batch-size", type=_positive, default=32, help="images per forward pass and process")
    evaluate.add_argument("--workers", type=_natural, help="processes that read images; one per core when left out")
    evaluate.add_argument(
        "--bad-images", choices=("skip", "stop"), default="skip", help="what to do about images that can't be read"
    )
    _add_opening(evaluate)


def _add_export(export: VerbParser) -> None:
    export.add_argument("model", type=expanded, help=_MODEL)
    export.add_argument("--to", choices=("onnx",), default="onnx", help="the format")
    export.add_argument("--output", type=_path, metavar="FOLDER", help="write there; into onnx in the model's folder")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    export.add_argument(
        "--images", type=_path, metavar="FOLDER", help="compare with torch on these; a run's own images when left out"
    )
    export.add_argument("--most", type=_positive, default=1000, help="images to compare on, at most; evenly spread")
    _add_opening(export)


def _add_demo(demo: VerbParser) -> None:
    demo.add_argument("model", type=expanded, help=_MODEL)
    demo.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in")
    demo.add_argument("--port", type=_positive, help="the first free one from 7860 on when left out")
    demo.add_argument("--device", help=_DEVICE)
    demo.add_argument("--space", type=_path, metavar="FOLDER", help="show nothing, and write a Space there")
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier Space")
    _add_opening(demo)


def _add_push(push: VerbParser) -> None:
    push.add_argument("run_folder", type=expanded, metavar="run", help="run folder")
    push.add_argument("repo_id", help="owner/name, or the name of an own repository; made if it isn't there")
    push.add_argument("--what", choices=("model", "adapter", "both"), help="what the run ends with when left out")
    public = "show a new repository to everybody; else it is private"
    push.add_argument("--public", action="store_false", dest="private", help=public)
    push.add_argument("--revision", metavar="BRANCH", help="branch, made if it isn't there; main when left out")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of changing the branch")
    push.add_argument("--message", metavar="TEXT", dest="commit_message", help="title of the commit")
    base = "Hub id of the adapter's base model, if trained on a folder"
    push.add_argument("--base-model", metavar="REPO_ID", help=base)
    _add_json(push)
    _add_trust(push)


def _add_compare(compare: VerbParser) -> None:
    compare.add_argument(
        "runs", type=expanded, nargs="+", metavar="RUN", help="run folder; of two, the differences are shown too"
    )
    compare.add_argument("--split", choices=("test", "validation"), help="test where all have it, when left out")
    _add_json(compare)
    _add_html(compare)


def _add_recipe(parser: VerbParser) -> None:
    parser.add_argument("recipe", type=expanded, help="YAML file; or images, for which a recipe is chosen")
    _add_overrides(parser, "for example phases.head.learning_rate=5e-4")
    parser.add_argument("--checkpoint", type=expanded, help="of images: what to fine-tune; chosen when left out")
    parser.add_argument("--minutes", type=float, help="of images: what the run may take; 10 when left out")


def _add_overrides(parser: VerbParser, example: str) -> None:
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=example)


def _add_json(parser: VerbParser, purpose: str = "print JSON") -> None:
    parser.add_argument("--json", action="store_true", help=purpose)


def _add_html(parser: VerbParser) -> None:
    parser.add_argument("--html", type=_path, metavar="FILE", help="write the comparison as a page of one file, too")


def _add_opening(parser: VerbParser) -> None:
    parser.add_argument("--subfolder", help="where in the folder or the Hub's repository it is, for example adapter")
    _add_trust(parser)


def _add_trust(parser: VerbParser) -> None:
    parser.add_argument("--trust-remote-code", action="store_true", help="run the Python code that the model brings")


def _natural(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: a whole number above 0")
    return int(text)


def _path(text: str) -> Path:
    return Path(expanded(text))  # a shell leaves `~` as it is behind `=` and in quotes
