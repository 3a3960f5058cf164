"""What can go wrong, as one exception per cause, and the word that was perhaps meant; the lowest layer."""

import difflib
from collections.abc import Iterable


class HfftError(Exception):
    """A problem that the user can understand and act on; the command line prints it without a traceback.

    Attributes:
        exit_code: Exit status of the command line: 2 for a bad request, 1 for a run that failed.
    """

    exit_code = 2


class RecipeError(HfftError):
    """A recipe that can't be read, or that asks for something impossible."""


class DataError(HfftError):
    """Images, labels or splits that can't be used."""


class ModelError(HfftError):
    """A checkpoint that can't be loaded, or whose architecture can't do what was asked."""


class MissingPackageError(HfftError):
    """An optional package that was asked for in effect, and is not installed."""


class RunError(HfftError):
    """A run folder that can't be opened, continued or overwritten."""


class TrainingError(RunError):
    """A run that started and failed, or broke one of its promises."""

    exit_code = 1


class HubError(HfftError):
    """Something that can't be pushed as asked: a bad name, no token, no access."""


class PushError(HubError):
    """A push that failed on its way; the run is as it was, and may be pushed again."""

    exit_code = 1


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is most like another one; None where none is like it."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def first_line(error: Exception) -> str:
    """The first line of what an error says, with the next where it ends in a colon; its kind where it says nothing."""
    text = f"no {error}" if isinstance(error, KeyError) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
