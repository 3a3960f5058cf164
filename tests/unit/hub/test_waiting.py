from types import SimpleNamespace

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import _http, get_session, http_backoff

from hfft.hub.waiting import asked_wait, tidy_client


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
    assert "HTTP Error 500 thrown while requesting GET" in caplog.text
    assert "signed" not in caplog.text
    with tidy_client():
        pass
