"""Clients that leave and clients that are too many. A frozen worker makes the queue as long as a test wants it."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest

from media.image import encode_image
from tests.system.deployment import Atoken, frozen, metric, wait_for

PICTURE = encode_image(np.full((256, 256, 3), 77, np.uint8))
TOKENS = 256


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Atoken]:
    settings = {"queue_tokens": 10 * TOKENS, "log_level": "debug", "models": "tiny-continuous"}
    with Atoken(tmp_path_factory.mktemp("pressure"), "serve", "serve", "--port", "0", **settings) as atoken:
        yield atoken.wait_ready()


def computed(served: Atoken) -> int:
    return sum(int(event["items"]) for event in served.events("batch"))


def queued(client: httpx.Client) -> float:
    return metric(client, "atoken_queue_items")


def hang_up(url: str) -> http.client.HTTPConnection:
    """Send a whole request and keep the connection, for the caller to close without reading."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    connection.request("POST", "/encode", body=PICTURE, headers={"Content-Type": "image/png"})
    return connection


def test_work_of_clients_that_left_is_dropped(served: Atoken, client: httpx.Client) -> None:
    before = computed(served)
    with frozen(served.child("service.worker.main")):
        connections = [hang_up(served.url()) for _ in range(8)]
        wait_for(lambda: queued(client) == 8, "eight jobs in the queue", 10)
        for connection in connections:
            connection.close()
        # What the frozen worker had fetched is marked; what still waits is gone at once.
        wait_for(lambda: metric(client, "atoken_http_requests_total", code="client_closed") == 8, "eight left", 10)
    wait_for(lambda: queued(client) == 0, "an empty queue", 20)
    assert client.post("/encode", content=PICTURE, headers={"Content-Type": "image/png"}).status_code == 200
    wait_for(lambda: computed(served) == before + 1, "one computed job", 10)


def test_overload_is_refused_with_a_time_to_come_back_and_passes(served: Atoken, client: httpx.Client) -> None:
    answers: list[httpx.Response] = []

    def send() -> None:
        answers.append(
            httpx.post(f"{served.url()}/encode", content=PICTURE, headers={"Content-Type": "image/png"}, timeout=90)
        )

    threads = [threading.Thread(target=send) for _ in range(25)]
    with frozen(served.child("service.worker.main")):
        for thread in threads:
            thread.start()
        wait_for(lambda: len(answers) == 15, "fifteen refusals", 20)
        assert {answer.status_code for answer in answers} == {429}
        for answer in answers:
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert answer.json()["code"] == "queue_full"
            assert 1 <= int(answer.headers["Retry-After"]) <= 73
        # The gauges may be a quarter of a second old.
        wait_for(lambda: queued(client) == 10, "ten jobs in the queue", 10)
        assert metric(client, "atoken_queue_tokens") == 10 * TOKENS
    for thread in threads:
        thread.join(60)
    assert sorted(answer.status_code for answer in answers) == [200] * 10 + [429] * 15
    wait_for(lambda: queued(client) == 0, "an empty queue")
    assert client.post("/encode", content=PICTURE, headers={"Content-Type": "image/png"}).status_code == 200


def test_a_deadline_is_kept_while_the_worker_is_away(served: Atoken, client: httpx.Client) -> None:
    wait_for(lambda: queued(client) == 0, "an empty queue")
    before = computed(served)
    with frozen(served.child("service.worker.main")):
        answer = client.post("/encode", content=PICTURE, headers={"Content-Type": "image/png", "Request-Timeout": "1"})
    assert (answer.status_code, answer.json()["code"]) == (504, "deadline_exceeded")
    wait_for(lambda: queued(client) == 0, "an empty queue")
    assert client.post("/encode", content=PICTURE, headers={"Content-Type": "image/png"}).status_code == 200
    wait_for(lambda: computed(served) == before + 1, "one computed job", 10)
