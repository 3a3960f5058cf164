"""Kinds of arguments that several verbs take."""

import argparse


def whole(text: str) -> int:
    """A whole number, 0 included."""
    return 0 if text == "0" else count(text)


def count(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: a whole number above 0")
    return int(text)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """A recipe and its overrides."""
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example phases.head.learning_rate=5e-4")


def add_opening(parser: argparse.ArgumentParser) -> None:
    """Where in its place a model is, and whether the code that it brings may run."""
    parser.add_argument("--subfolder", help="where in the folder or the Hub's repository it is, for example adapter")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that the model brings; of a run, its recipe says so",
    )
