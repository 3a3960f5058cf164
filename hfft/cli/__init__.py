"""The command line; nothing but argument handling and printing."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence

from hfft.cli.parser import build_parser
from hfft.cli.printing import open_console, print_error
from hfft.errors import HfftError
from hfft.system.signals import end_process, last_words, prompt_interruption, stop_signal
from hfft.system.text import printable

_BY_SIGNAL = 128  # plus its number, as shells have it
_CONTINUES = "a run continues with the same command, without --overwrite"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb.

    Args:
        argv: Arguments; those of the process when None, which ends here if it was interrupted or is one of a launch.

    Returns:
        0, 1 for a failed run or harmful data, 2 for a bad request, 130 after Ctrl-C, 143 after SIGTERM.
    """
    open_console()
    arguments = build_parser().parse_args(argv)
    _show_log()
    with last_words():
        code = _run(arguments)
    if argv is None and (stop_signal() is not None or "RANK" in os.environ):
        end_process(code)
    return code


def _run(arguments: argparse.Namespace) -> int:
    try:
        with prompt_interruption():
            code = arguments.run(arguments)
    except HfftError as error:
        _close_bars()
        print_error(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        _close_bars()
        number = stop_signal() or signal.SIGINT
        # A launcher ends its other processes with SIGTERM when one has died, often before they notice by themselves.
        by_launcher = number == signal.SIGTERM and "RANK" in os.environ
        cause = "interrupted, or another process of this launch has ended" if by_launcher else "interrupted"
        print_error(f"{cause}; {'the same command finishes the push' if arguments.verb == 'push' else _CONTINUES}")
        return _BY_SIGNAL + number
    if "RANK" in os.environ:
        from hfft.system.distributed import leave

        leave()
    return code or 0


def _close_bars() -> None:
    if "tqdm" in sys.modules:
        from hfft.system.progress import close_bars

        close_bars()


class _PlainFormatter(logging.Formatter):
    """The message alone, without the rank that Accelerate puts before every line, since only one rank speaks."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(record.getMessage().removeprefix("[RANK 0] "), keep="\n")


class _LinesAboveBars(logging.StreamHandler):
    """Lines for a standard error output that may hold progress bars, too."""

    def emit(self, record: logging.LogRecord) -> None:
        from hfft.system.progress import above_bars

        with above_bars():
            super().emit(record)


def _show_log() -> None:
    handler = _LinesAboveBars(sys.stderr)
    handler.setFormatter(_PlainFormatter())
    logger = logging.getLogger("hfft")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
