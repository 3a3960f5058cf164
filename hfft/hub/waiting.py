"""How huggingface_hub behaves in a push: what it says, how long it waits, and that its threads can be left."""

import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import disable_progress_bars, get_session, hf_raise_for_status, parse_ratelimit_headers

from hfft.system.signals import apart

_LONGEST = 60  # seconds that the Hub may ask to wait before a request is tried again
_TRIED_AGAIN = (408, 429, 500, 502, 503, 504)  # by huggingface_hub 2.4, five times


class InterruptibleApi(HfApi):
    """The Hub's client, whose threads that upload keep no interruption waiting; the commit is made by the caller's."""

    def preupload_lfs_files(self, *args: Any, **kwargs: Any) -> None:
        """As in the class above, which calls this before it makes a commit."""
        apart(lambda: super(InterruptibleApi, self).preupload_lfs_files(*args, **kwargs))


@contextmanager
def tidy_client() -> Iterator[None]:
    """Let huggingface_hub wait a minute at most, draw bars on a terminal alone, and log addresses without signatures.

    It would wait as long as the Hub asks it to, five times. The addresses of a large file storage grant access to
    whoever reads the log.
    """
    logger = logging.getLogger("huggingface_hub.utils._http")
    logger.addFilter(_before_retry)
    _refuse_long_waits()
    draws = sys.stderr.isatty() or constants.HF_HUB_DISABLE_PROGRESS_BARS is False
    is_left = False
    try:
        with nullcontext() if draws else disable_progress_bars():
            yield
    except KeyboardInterrupt:
        is_left = True  # threads, which go on to log
        raise
    finally:
        if not is_left:
            logger.removeFilter(_before_retry)
            hooks = get_session().event_hooks["response"]
            if _refuse_long_wait in hooks:
                hooks.remove(_refuse_long_wait)


def asked_wait(headers: Mapping[str, str]) -> int | None:
    """Seconds that an answer's headers ask to wait before the next request, as huggingface_hub reads them; or None."""
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    text = headers.get("retry-after", "").strip()
    return int(text) if text.isdecimal() else None


def _before_retry(record: logging.LogRecord) -> bool:
    record.msg, record.args = re.sub(r"\?\S+", "", record.getMessage()), None
    _refuse_long_waits()  # of the client that takes the place of one whose connection failed
    return True


def _refuse_long_waits() -> None:
    hooks = get_session().event_hooks["response"]
    if _refuse_long_wait not in hooks:
        hooks.append(_refuse_long_wait)


def _refuse_long_wait(response: httpx2.Response) -> None:
    """Raise what huggingface_hub raises after its last try, in the place of a long wait."""
    if response.status_code in _TRIED_AGAIN and (asked_wait(response.headers) or 0) > _LONGEST:
        response.read()
        hf_raise_for_status(response)
