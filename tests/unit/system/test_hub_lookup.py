import httpx2
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from hfft.system.hub_lookup import hub_problem

REQUEST = httpx2.Request("GET", "http://127.0.0.1/api/models/a/b")


def answered(kind, status):
    return kind("refused\nmore", response=httpx2.Response(status, request=REQUEST))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (answered(GatedRepoError, 403), "access to the model is restricted"),
        (answered(RevisionNotFoundError, 404), "has no revision 'v1'"),
        (answered(RepositoryNotFoundError, 404), "no model of that name, or it is private"),
        (answered(HfHubHTTPError, 500), "answered with an error: refused"),
        (ValueError("not a repo id"), "no Hub id either"),
        (httpx2.ConnectError(""), "can't be reached (ConnectError); HF_HUB_OFFLINE=1"),
        (httpx2.ReadTimeout("slow"), "can't be reached (slow)"),
        (OSError("no route"), "can't be reached (no route)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_why_a_repository_can_not_be_had(error, words, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "repo_info", refuse)
    problem = hub_problem("a/b", "model", "v1")
    assert problem is not None
    assert words in problem


def test_it_is_asked_once_with_kind_and_revision(monkeypatch):
    asked = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "repo_info", lambda self, name, **options: asked.append((name, options)))
    assert hub_problem("a/b", "dataset", "v1") is None
    ((name, options),) = asked
    assert (name, options["repo_type"], options["revision"]) == ("a/b", "dataset", "v1")
    assert options["timeout"] > 0


def test_nothing_is_asked_offline(monkeypatch):
    monkeypatch.setattr(HfApi, "repo_info", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    assert hub_problem("a/b", "model", None) is None
