import socket
import time
from types import SimpleNamespace

import httpx2
import hub_server
import pytest
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import _http, get_session, http_backoff

from hfft.errors import HubError, PushError
from hfft.hub.access import Destination, asked_wait, hub_errors, reach, tidy_client
from hfft.recipe.spec import HubSpec


@pytest.mark.parametrize(("repo_id", "found"), [("cells", "me/cells"), ("club/cells", "club/cells")])
def test_a_repository_is_made_private(repo_id, found, hub):
    assert reach(HubSpec(repo_id=repo_id)) == Destination(found, True, None)
    assert hub.repositories[found].private
    assert reach(HubSpec(repo_id=repo_id)) == Destination(found, True, None)  # that it is there now is no matter


def test_nothing_is_made_before_it_is_known_to_be_needed(hub):
    assert reach(HubSpec(repo_id="me/cells", revision="v2"), make=False).repo_id == "me/cells"
    assert hub.repositories == {}


def test_a_branch_is_made(hub):
    reach(HubSpec(repo_id="me/cells", revision="v2"))
    assert set(hub.repositories["me/cells"].branches) == {"main", "v2"}
    assert reach(HubSpec(repo_id="me/cells", revision="v2")).revision == "v2"


def test_a_public_repository_is_pushed_to_only_when_that_is_meant(hub):
    hub.add_repository("me/cells")
    with pytest.raises(HubError, match="me/cells is there"):
        reach(HubSpec(repo_id="me/cells"))
    assert not reach(HubSpec(repo_id="me/cells", private=False)).private
    hub.add_repository("me/secret", private=True)
    assert reach(HubSpec(repo_id="me/secret", private=False)).private  # and is never made public


@pytest.mark.parametrize("make", [True, False])
def test_a_name_that_is_somebody_elses(make, hub):
    hub.add_repository("other/cells")
    with pytest.raises(HubError, match="other/cells: me has") as got:
        reach(HubSpec(repo_id="other/cells", private=False), make=make)
    assert got.value.exit_code == 2
    assert reach(HubSpec(repo_id="other/cells", private=False, create_pr=True), make=make).repo_id == "other/cells"


def test_an_owner_that_is_somebody_else(hub):
    with pytest.raises(HubError, match="other/new: me has"):
        reach(HubSpec(repo_id="other/new"))
    with pytest.raises(HubError, match="other/new: there"):
        reach(HubSpec(repo_id="other/new", create_pr=True))


def test_a_pull_request_needs_its_branch(hub):
    hub.add_repository("me/cells", private=True)
    with pytest.raises(HubError, match="no branch v9"):
        reach(HubSpec(repo_id="me/cells", create_pr=True, revision="v9"))


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (None, "there is no token: `hf auth login`"),
        ("hf_wrong", r"the Hub answered 401 \(Invalid .*: it doesn't accept this token; `hf auth login --force`"),
        ("hf_reading", "the token of reader may only read; make one that may write at http"),
    ],
)
def test_a_token_that_does_not_do(token, words, hub, monkeypatch, tmp_path):
    hub.add_user("reader", "hf_reading", role="read")
    hub_server.connect(hub, monkeypatch, tmp_path, token)
    with pytest.raises(HubError, match=words) as caught:
        reach(HubSpec(repo_id="me/cells"))
    assert caught.value.exit_code == 2
    assert "hf_" not in str(caught.value)


def test_the_token_of_hf_auth_login_is_taken(hub, monkeypatch, tmp_path):
    hub_server.connect(hub, monkeypatch, tmp_path, token=None)
    (tmp_path / "token").write_text("hf_mine\n")
    assert reach(HubSpec(repo_id="cells")).repo_id == "me/cells"


def test_offline_mode_is_said(monkeypatch, hub):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        reach(HubSpec(repo_id="cells"))
    assert hub.requests == []


def test_a_hub_that_is_not_there(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PushError, match=r"reached \(http://127.0.0.1:9: .*refused\)") as caught:
        reach(HubSpec(repo_id="cells"))
    assert caught.value.exit_code == 1


def test_a_network_that_swallows_everything(hub, monkeypatch):
    """A full queue of connections: Linux drops what comes then, and the client would wait for minutes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        try:
            for one in waiting:
                one.setblocking(False)
                one.connect_ex(address)
            time.sleep(0.1)
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{address[1]}")
            with pytest.raises(PushError, match=r"for 1.5 s\)"):
                reach(HubSpec(repo_id="cells"))
        finally:
            for one in waiting:
                one.close()


@pytest.mark.parametrize(
    ("path", "how", "kind", "words"),
    [
        (
            "whoami",
            {"status": 500},
            PushError,
            r"cells: checking access: the Hub answered 500 \(no luck\); nothing here",
        ),
        (
            "whoami",
            {"status": 429, "headers": {"Retry-After": "77"}},
            PushError,
            r"answered 429 .*: rate limited: it asks to come back in 77 s; .* the same command finishes the job then",
        ),
        (
            "create",
            {"status": 429, "headers": {"ratelimit": '"api";r=0;t=55'}},
            PushError,
            "rate limited: it asks to come back in 55 s",
        ),
        (
            "create",
            {"status": 403, "message": "quota"},
            HubError,
            r"answered 403 \(quota\): refused; a token with write",
        ),
        ("create", {"cut": True}, PushError, "me/cells: checking access: the connection was lost"),
    ],
)
def test_answers_that_say_no(path, how, kind, words, hub):
    hub.fail("GET" if path == "whoami" else "POST", path, times=1, **how)
    with pytest.raises(kind, match=words) as caught:
        reach(HubSpec(repo_id="cells"))
    assert type(caught.value) is kind
    assert reach(HubSpec(repo_id="cells")).repo_id == "me/cells"  # the second try


def test_what_wraps_an_answer_is_looked_through():
    with pytest.raises(PushError, match=r"^sending: no reason given; nothing here was"), hub_errors("sending"):
        raise RuntimeError("no reason given.")
    with pytest.raises(KeyError), hub_errors("sending"):
        raise KeyError("a mistake of ours is none of the user's")


@pytest.fixture
def waited(monkeypatch):
    """Seconds that huggingface_hub would have waited."""
    seconds = []
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=seconds.append))
    return seconds


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "3600"}, 3600),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),  # nor does huggingface_hub wait for that
        ({"RateLimit": '"api";r=0;t=55', "Retry-After": "7"}, 55),
        ({"RateLimit": '"api";r=3;t=55', "Retry-After": "7"}, 7),
        ({"RateLimit": '"api";r=3;t=55'}, None),
    ],
)
def test_what_an_answer_asks_for(headers, seconds):
    assert asked_wait(httpx2.Headers(headers)) == seconds


def test_a_minute_is_waited_for_and_more_is_not(hub, waited):
    address = f"{hub.url}/api/whoami-v2"
    failure = hub.fail("GET", "whoami", status=429, headers={"Retry-After": "60"}, times=1)
    with tidy_client():
        http_backoff("GET", address)
        assert (failure.hits, waited) == (1, [61.0])
        failure = hub.fail("GET", "whoami", status=429, headers={"Retry-After": "61"})
        with pytest.raises(HfHubHTTPError):
            http_backoff("GET", address)
    assert (failure.hits, waited) == (1, [61.0])


def test_nor_by_the_client_that_comes_after_a_lost_connection(hub, monkeypatch):
    """Another request, made while the one that lost its connection waits to try again."""
    failure = hub.fail("GET", "whoami", status=429, headers={"Retry-After": "3600"})
    clients, waited = [], []

    def sleep(seconds):
        waited.append(seconds)
        clients.append(get_session())
        with pytest.raises(HfHubHTTPError):
            http_backoff("GET", f"{hub.url}/api/whoami-v2")

    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=sleep))
    with tidy_client():
        clients.append(get_session())
        with pytest.raises(httpx2.ConnectError):
            http_backoff("GET", "http://127.0.0.1:9/", max_retries=1)
    assert clients[0] is not clients[1]
    assert (failure.hits, waited) == (1, [1])


def test_others_are_left_as_patient_as_they_are(hub, waited):
    with tidy_client():
        pass
    hub.fail("GET", "whoami", status=429, headers={"Retry-After": "3600"}, times=1)
    http_backoff("GET", f"{hub.url}/api/whoami-v2")
    assert waited == [3601.0]


def test_threads_that_an_interruption_leaves_log_no_signature(hub, waited, caplog):
    with pytest.raises(KeyboardInterrupt), tidy_client():
        raise KeyboardInterrupt
    hub.fail("GET", "storage", status=500, times=1)
    http_backoff("GET", f"{hub.url}/storage/x?X-Signature=signed")
    assert "500 thrown while requesting GET" in caplog.text
    assert "signed" not in caplog.text
    with tidy_client():
        pass
