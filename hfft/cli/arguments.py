"""How a verb reads its words and options, and kinds of arguments that several verbs take."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hfft.errors import nearest
from hfft.system.files import expanded
from hfft.system.text import printable


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
        if left:
            self._take(found, left)
        return found, []

    def _take(self, found: argparse.Namespace, left: Sequence[str]) -> None:
        words = next((action for action in self._get_positional_actions() if action.nargs in ("*", "+")), None)
        assigns = words is not None and str(words.metavar).startswith("key=")
        left = [word for word in left if word != "--"]
        for word in left:
            if word.startswith("-") and word != "-":
                self.error(self._unknown(word, assigns=assigns))
            if words is None:
                self.error(f"found {word!r}; `{self.prog}` takes no more words")
            if assigns and "=" not in word:
                self.error(f"found {word!r}; allowed: {words.metavar}")
        if words is not None:
            taken: Any = [self._get_value(words, word) for word in left]
            setattr(found, words.dest, [*getattr(found, words.dest), *taken])

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the words, and end."""
        super().error(printable(message))

    def _unknown(self, word: str, *, assigns: bool) -> str:
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


def whole(text: str) -> int:
    """A whole number, 0 included."""
    return 0 if text == "0" else count(text)


def count(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: a whole number above 0")
    return int(text)


def place(text: str) -> Path:
    """A file or folder; a shell leaves `~` as it is behind `=` and in quotes."""
    return Path(expanded(text))


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """A recipe and its overrides."""
    parser.add_argument("recipe", type=expanded, help="YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="for example phases.head.learning_rate=5e-4"
    )


def add_opening(parser: argparse.ArgumentParser) -> None:
    """Where in its place a model is, and whether the code that it brings may run."""
    parser.add_argument("--subfolder", help="where in the folder or the Hub's repository it is, for example adapter")
    add_trust(parser)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Whether the code that a model brings may run."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that the model brings",
    )
