"""The Hub's client: may this user push there, asked quickly and before anything is trained; imports no torch."""

import logging
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import BadRequestError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import (
    build_hf_headers,
    disable_progress_bars,
    get_session,
    hf_raise_for_status,
    parse_ratelimit_headers,
)

from hfft._version import __version__
from hfft.errors import HubError, PushError
from hfft.recipe.spec import HubSpec
from hfft.system.signals import apart

_CONNECTING, _ANSWERING = 1.5, 10.0  # seconds
_LONGEST = 60  # seconds that the Hub may ask to wait before a request is tried again
_TRIED_AGAIN = (408, 429, 500, 502, 503, 504)  # by huggingface_hub 2.4, five times
_MOST_LETTERS = 300  # of what the Hub says of a card's metadata
_AGAIN = "nothing here was changed; the same command finishes the job"
_REFUSED = (
    "Change `license` or `widget` in the recipe and run its `hfft train` command again, which writes only the card of "
    "a finished run anew; what else is at the head of the card, model/README.md in the run folder, change there"
)
_NO_TOKEN = "there is no token: `hf auth login`, or put one that may write into HF_TOKEN"


@dataclass(frozen=True)
class Destination:
    """A repository that this user may write to: its id with the owner, and a branch of it, or None for `main`."""

    repo_id: str
    private: bool
    revision: str | None


class InterruptibleApi(HfApi):
    """The Hub's client; Ctrl-C doesn't wait for its threads that upload. The commit is made by the caller's thread."""

    def preupload_lfs_files(self, *args: Any, **kwargs: Any) -> None:
        """Called by `create_commit` before it makes a commit."""
        apart(lambda: super(InterruptibleApi, self).preupload_lfs_files(*args, **kwargs))


def connection() -> HfApi:
    """The Hub, with the user's token; a HubError in offline mode, or where there is no token."""
    if constants.HF_HUB_OFFLINE:
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
    token = get_token()
    if token is None:
        raise HubError(_NO_TOKEN)
    return InterruptibleApi(token=token, library_name="hfft", library_version=__version__)


def reach(spec: HubSpec, *, make: bool = True) -> Destination:
    """Check that this user may push to the repository of `spec`.

    `make` makes a missing repository or branch, the only way to know that this user may.

    Raises:
        HubError: If the user has no token or no access, or the repository isn't as the spec has it.
        PushError: If the Hub isn't reached, which is known within two seconds, or fails.
    """
    api, repo_id = connection(), str(spec.repo_id)
    with hub_errors(f"{repo_id}: checking access"):
        user = _whoami(api)
    repo_id = repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(
            f"{repo_id}: the token of {user['name']} may only read; make one that may write at "
            f"{api.endpoint}/settings/tokens"
        )
    with hub_errors(f"{repo_id}: checking access"), _refusal_explained(repo_id, user):
        try:
            private = bool(api.repo_info(repo_id, timeout=_ANSWERING).private)
        except RepositoryNotFoundError:
            if spec.create_pr:
                raise HubError(
                    f"{repo_id}: there is no such repository to open a pull request on, or this token may not see it"
                ) from None
            private = spec.private
            if make:
                api.create_repo(repo_id, private=private, exist_ok=True)
        else:
            if not spec.create_pr:
                api.auth_check(repo_id, write=True)
            if spec.private and not private:
                raise HubError(
                    f"{repo_id} is there and public, and a push is private unless told otherwise; --public "
                    "(hub.private=false) pushes there all the same"
                )
        if make and spec.revision is not None:
            _find_or_make_branch(api, repo_id, spec.revision, create_pr=spec.create_pr)
    return Destination(repo_id, private, spec.revision)


def _find_or_make_branch(api: HfApi, repo_id: str, branch: str, *, create_pr: bool) -> None:
    try:
        api.repo_info(repo_id, revision=branch, timeout=_ANSWERING)
    except RevisionNotFoundError:
        if create_pr:
            raise HubError(f"{repo_id}: there is no branch {branch} to open a pull request on") from None
        api.create_branch(repo_id, branch=branch, exist_ok=True)


@contextmanager
def _refusal_explained(repo_id: str, user: dict[str, Any]) -> Iterator[None]:
    """Raise an error that says who may write where, instead of a plain 403."""
    try:
        yield
    except HfHubHTTPError as error:
        owner, name = repo_id.split("/")
        owners = [user["name"], *(org["name"] for org in user.get("orgs", []))]
        if error.response.status_code != 403 or owner in owners:
            raise
        raise HubError(
            f"{repo_id}: {user['name']} has no write access there; this token's names are {', '.join(owners)}: push "
            f"to {user['name']}/{name}, or open a pull request (--create-pr, hub.create_pr)"
        ) from error


def _whoami(api: HfApi) -> dict[str, Any]:
    """The user of the token; the first request, which also finds out soon whether the Hub is reached at all.

    From a thread: neither the look-up of the name nor the connection to one address after the other heeds a limit.
    """
    reached = threading.Event()
    answers: list[httpx2.Response | Exception] = []

    def note(event: str, _: Any) -> None:
        if event == "connection.connect_tcp.complete" or event.endswith("send_request_headers.started"):
            reached.set()

    def ask() -> None:
        headers = build_hf_headers(token=api.token, library_name="hfft", library_version=__version__)
        address, trace = f"{api.endpoint}/api/whoami-v2", {"trace": note}
        try:
            answers.append(get_session().get(address, headers=headers, timeout=_ANSWERING, extensions=trace))
        except Exception as error:  # handed over to the caller's thread
            answers.append(error)
        reached.set()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    if reached.wait(_CONNECTING):
        asking.join(_ANSWERING)
    if not answers:
        raise _unreachable(api, f"no answer for {_ANSWERING if reached.is_set() else _CONNECTING:g} s")
    answer = answers[0]
    if isinstance(answer, httpx2.TransportError):
        raise _unreachable(api, _words(answer)) from answer
    if isinstance(answer, Exception):
        raise answer
    hf_raise_for_status(answer)
    return answer.json()


def _unreachable(api: HfApi, reason: str) -> PushError:
    return PushError(
        f"the Hub can't be reached ({api.endpoint}: {reason}); without a network a recipe trains with "
        "hub.repo_id=null, and `hfft push` sends the run later"
    )


@contextmanager
def hub_errors(doing: str) -> Iterator[None]:
    """Raise an error that begins with `doing` and says what to do, instead of what huggingface_hub raises.

    Addresses are left out of the text, as those of a large file storage hold signatures.
    """
    try:
        yield
    except HubError:
        raise
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        cause = _cause(error)
        if isinstance(error, ValueError) and isinstance(cause, BadRequestError):
            words = _words(error)
            if len(words) > _MOST_LETTERS:  # the Hub names all licences that it knows
                words = f"{words[:_MOST_LETTERS].rpartition(' ')[0]} ..."
            raise HubError(f"{doing}: {words}; nothing was sent. {_REFUSED}") from error
        if isinstance(cause, HfHubHTTPError):
            raise _answer_error(doing, cause) from error
        if isinstance(cause, httpx2.TransportError):
            raise PushError(f"{doing}: the connection was lost ({_words(cause)}); {_AGAIN}") from error
        raise PushError(f"{doing}: {_words(error)}; {_AGAIN}") from error


def _cause(error: BaseException) -> BaseException:
    """What a request ended with; huggingface_hub wraps that of a large file into a RuntimeError, others more."""
    below: BaseException | None = error
    while below is not None and not isinstance(below, HfHubHTTPError | httpx2.TransportError):
        below = below.__cause__ or below.__context__
    return below or error


def _answer_error(doing: str, error: HfHubHTTPError) -> HubError:
    response = error.response
    status, said = response.status_code, (error.server_message or response.reason_phrase).splitlines()
    answer = f"{doing}: the Hub answered {status}" + (f" ({said[0].rstrip('.')})" if said else "")
    refusals = {
        401: "it doesn't accept this token; `hf auth login --force`, or another HF_TOKEN",
        403: "refused; a token with write access, or another repository, may do",
        404: "no such repository or branch, or this token may not see it",
    }
    if status in refusals:
        return HubError(f"{answer}: {refusals[status]}")
    if status in (409, 412):
        return PushError(f"{answer}: something else is changing this repository; {_AGAIN}")
    wait = asked_wait(response.headers)
    if status == 429 or wait is not None:
        limited = "rate limited: " if status == 429 else ""
        pause = "later" if wait is None else f"in {wait} s" if wait < 120 else f"in {-(-wait // 60)} minutes"
        return PushError(f"{answer}: {limited}it asks to come back {pause}; {_AGAIN} then")
    return PushError(f"{answer}; {_AGAIN}")


def _words(error: BaseException) -> str:
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3]) or type(error).__name__


@contextmanager
def tidy_client() -> Iterator[None]:
    """Let huggingface_hub wait a minute at most, draw bars on a terminal only, and log addresses without signatures.

    It would wait as long as the Hub asks, five times. The addresses of a large file storage grant access to it.
    """
    logger = logging.getLogger("huggingface_hub.utils._http")
    logger.addFilter(_before_retry)
    _refuse_long_waits()
    draws = sys.stderr.isatty() or constants.HF_HUB_DISABLE_PROGRESS_BARS is False
    is_interrupted = False
    try:
        with nullcontext() if draws else disable_progress_bars():
            yield
    except KeyboardInterrupt:
        is_interrupted = True  # threads are left behind, which go on to log
        raise
    finally:
        if not is_interrupted:
            logger.removeFilter(_before_retry)
            hooks = get_session().event_hooks["response"]
            if _refuse_long_wait in hooks:
                hooks.remove(_refuse_long_wait)


def asked_wait(headers: Mapping[str, str]) -> int | None:
    """Seconds to wait before the next request, as an answer's headers ask and huggingface_hub reads them; or None."""
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    text = headers.get("retry-after", "").strip()
    return int(text) if text.isdecimal() else None


def _before_retry(record: logging.LogRecord) -> bool:
    record.msg, record.args = re.sub(r"\?\S+", "", record.getMessage()), None
    _refuse_long_waits()  # of the client that replaces one whose connection failed
    return True


def _refuse_long_waits() -> None:
    hooks = get_session().event_hooks["response"]
    if _refuse_long_wait not in hooks:
        hooks.append(_refuse_long_wait)


def _refuse_long_wait(response: httpx2.Response) -> None:
    """Raise what huggingface_hub raises after its last try, instead of a long wait."""
    if response.status_code in _TRIED_AGAIN and (asked_wait(response.headers) or 0) > _LONGEST:
        response.read()
        hf_raise_for_status(response)
