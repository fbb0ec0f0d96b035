"""Overload, deadlines, clients that leave, workers and a Redis that are not there."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import replace

import httpx
import numpy as np
import pytest

from media.sniff import probe
from service.api import items
from service.api.models import Card
from service.queue.client import QueueClient
from service.queue.estimate import effort_of
from service.queue.server import PrivateRedis
from tests.service.api.block_worker import CONTINUOUS, BlockWorker
from tests.service.api.conftest import blocks, mp4, png, problem
from tests.service.api.rig import Api

PICTURE = png(blocks(64, 64))  # 16 tokens
BIG = png(blocks(512, 512))  # 1024 tokens


@pytest.fixture
def held(worker: BlockWorker) -> Iterator[BlockWorker]:
    """The worker, which takes nothing until the test ends or lets it."""
    worker.hold()
    try:
        yield worker
    finally:
        worker.running.set()


def wait_for(condition: object, what: str, seconds: float = 10.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < give_up, what
        time.sleep(0.02)


def queued(api: Api) -> int:
    text = api.client.get("/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("atoken_queue_items{")]
    return sum(int(float(line.rpartition(" ")[2])) for line in lines)


def send_without_waiting(api: Api, body: bytes = PICTURE, headers: str = "", path: str = "/encode") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", api.port), timeout=20.0)
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("headers", [{"Request-Timeout": "0.4"}, {"Prefer": "respond-async, wait=1"}])
def test_deadline(api: Api, held: BlockWorker, headers: dict[str, str]) -> None:
    begun = time.monotonic()
    found = problem(api.client.post("/encode", content=PICTURE, headers=headers), 504, "deadline_exceeded")
    assert f"within {found['limit']:g} s" in found["detail"]
    assert "`Request-Timeout: N` (seconds, at most 300)" in found["detail"]
    assert 0.3 < time.monotonic() - begun < 5.0
    wait_for(lambda: queued(api) == 0, "the expired job stays in the queue")


def test_client_that_leaves_takes_its_job_along(api: Api, held: BlockWorker) -> None:
    wait_for(lambda: queued(api) == 0, "the queue is not empty")
    with send_without_waiting(api, headers="X-Request-Id: leaver\r\n"):
        wait_for(lambda: queued(api) == 1, "the job is not queued")
    wait_for(lambda: queued(api) == 0, "the job is still queued")
    held.running.set()
    assert api.client.post("/encode", content=PICTURE).status_code == 200
    assert "leaver" not in held.seen


def test_full_queue_is_429_with_retry_after(redis_url: str, held: BlockWorker) -> None:
    with Api(redis_url, queue_tokens=1500) as api:
        with send_without_waiting(api, BIG):
            wait_for(lambda: queued(api) == 1, "the job is not queued")
            response = api.client.post("/encode", content=BIG)
            found = problem(response, 429, "queue_full")
            assert 1 <= int(response.headers["retry-after"]) <= 72
            assert found["limit"] == 1500
            assert found["actual"] == 2048
            assert 'atoken_rejected_total{reason="queue_full"} 1.0' in api.client.get("/metrics").text
            held.running.set()
            wait_for(lambda: queued(api) == 0, "the queue does not drain")
        assert api.client.post("/encode", content=BIG).status_code == 200


def test_what_no_worker_does_in_time_is_refused_at_once(api: Api, held: BlockWorker) -> None:
    """1024 tokens take 1 s to decode and a fiftieth of that to encode, says the worker."""
    tokens = {
        "codes": {"dtype": "int16", "shape": [1024, 8], "data": base64.b64encode(bytes(16_384)).decode()},
        "coords": [[0, x, y, 0] for x in range(32) for y in range(32)],
    }
    begun = time.monotonic()
    response = api.client.post("/decode", json=tokens, headers={"Request-Timeout": "0.6"})
    found = problem(response, 422, "deadline_too_short")
    assert time.monotonic() - begun < 0.5
    assert (found["limit"], found["actual"]) == (0.6, 1.02)
    assert "this takes about 1.02 s on an idle worker, the request allows 0.6 s" in found["detail"]
    assert "`Request-Timeout: 2` (at most 300)" in found["detail"]
    assert "retry-after" not in response.headers
    for path, headers, body in (
        ("/decode", {"Request-Timeout": "0.8"}, {"json": tokens}),  # an estimate may be wrong by half
        ("/encode", {"Request-Timeout": "0.6"}, {"content": BIG}),
    ):
        problem(api.client.post(path, headers=headers, **body), 504, "deadline_exceeded")
    both = {"content": BIG, "params": {"outputs": "reconstruction"}, "headers": {"Request-Timeout": "0.6"}}
    assert problem(api.client.post("/encode", **both), 422, "deadline_too_short")["actual"] == 1.04
    wait_for(lambda: queued(api) == 0, "the expired jobs stay in the queue")


def test_an_item_of_many_tokens_is_reckoned_with_what_they_look_at(
    api: Api, held: BlockWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Card, "effort", lambda self, tokens, steps: effort_of(tokens, 768))
    query, headers = {"outputs": "reconstruction"}, {"Request-Timeout": "1"}
    response = api.client.post("/encode", content=BIG, params=query, headers=headers)
    # 1024 tokens count as 1024 (768 + 1024) / (768 + 256) = 1792.
    assert problem(response, 422, "deadline_too_short")["actual"] == 1.83
    four = [("file", (f"{number}.png", png(blocks(256, 256)), "image/png")) for number in range(4)]
    response = api.client.post("/encode", files=four, params=query, headers={"Request-Timeout": "0.6"})
    assert problem(response, 422, "deadline_too_short")["actual"] == 1.04, "as many tokens, but in pictures of 256"


def test_a_model_s_card_says_what_an_item_counts() -> None:
    card = Card(**{**CONTINUOUS, "attention_tokens": 864, "window": 4})
    assert card.effort(256, 1) == 256
    assert card.effort(64 * 64, 16) == round(64 * 64 * (864 + 1024) / (864 + 256)), "16 latent frames are four windows"
    assert card.effort(24_000, 0) == round(24_000 * (864 + 24_000) / (864 + 256))
    assert Card(**CONTINUOUS).effort(24_000, 0) == 24_000, "a worker that does not say"


def test_a_clip_whose_header_hides_its_length_is_reckoned_when_it_is_known(
    api: Api, held: BlockWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(items, "probe", lambda *args, **options: replace(probe(*args, **options), frames=None))
    clip = mp4(np.zeros((40, 256, 256, 3), np.uint8))  # 2560 tokens
    query, headers = {"outputs": "reconstruction"}, {"Request-Timeout": "1.5"}
    response = api.client.post("/encode", content=clip, params=query, headers=headers)
    assert problem(response, 422, "deadline_too_short")["actual"] == 2.61


def test_a_decode_ahead_is_reckoned_at_its_own_speed(api: Api, held: BlockWorker) -> None:
    wait_for(lambda: queued(api) == 0, "the queue is not empty")
    picture = png(blocks(768, 768))  # 2304 tokens: 2.3 s of decoding
    query = "/encode?outputs=reconstruction"
    with send_without_waiting(api, picture, path=query):
        wait_for(lambda: queued(api) == 1, "the job is not queued")
        time.sleep(0.3)  # the load may be a quarter of a second old
        response = api.client.post("/encode", content=PICTURE, headers={"Request-Timeout": "2"})
        found = problem(response, 429, "would_miss_deadline")
        assert 1.5 < found["limit"] <= 2.0
        assert 2.3 <= found["actual"] <= 2.4
        assert "it takes about 2.4 s, the request allows" in found["detail"] or "2.3 s" in found["detail"]
        assert response.headers["retry-after"] in ("1", "2")
        held.running.set()
        wait_for(lambda: queued(api) == 0, "the queue does not drain")


@pytest.mark.parametrize("seconds", ["0.000001", "0.01", "0.05"])
def test_a_tiny_timeout_on_an_idle_queue_is_a_deadline_that_passed(api: Api, seconds: str) -> None:
    wait_for(lambda: queued(api) == 0, "the queue is not empty")
    for _ in range(5):
        response = api.client.post("/encode", content=PICTURE, headers={"Request-Timeout": seconds})
        code = response.json().get("code")
        assert (response.status_code, code) in ((200, None), (504, "deadline_exceeded"), (422, "deadline_too_short"))


def test_too_many_requests_at_once(redis_url: str, held: BlockWorker) -> None:
    with Api(redis_url, in_flight=2) as api, send_without_waiting(api), send_without_waiting(api):
        wait_for(lambda: queued(api) == 2, "the jobs are not queued")
        response = api.client.post("/encode", content=PICTURE)
        problem(response, 429, "service_busy")
        assert response.headers["retry-after"] == "1"
        assert api.client.get("/health/live").status_code == 200
        held.running.set()
        wait_for(lambda: api.client.post("/encode", content=PICTURE).status_code == 200, "still busy")


def test_sixteen_clients_at_once_are_all_answered(api: Api) -> None:
    async def all_of_them() -> list[int]:
        limits = httpx.Limits(max_connections=16)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{api.port}", timeout=60.0, limits=limits) as client:
            responses = await asyncio.gather(*(client.post("/encode", content=PICTURE) for _ in range(48)))
        return [response.status_code for response in responses]

    assert asyncio.run(all_of_them()) == [200] * 48


def test_no_worker() -> None:
    with PrivateRedis(maxmemory_bytes=64 << 20) as redis, Api(redis.url) as api:
        response = api.client.post("/encode", content=PICTURE)
        problem(response, 503, "no_worker")
        assert int(response.headers["retry-after"]) >= 1
        problem(api.client.post("/decode", json={"codes": [[1] * 8], "coords": [[0, 0, 0, 0]]}), 503, "no_worker")
        assert 'atoken_rejected_total{reason="no_worker"} 2.0' in api.client.get("/metrics").text
        problem(api.client.get("/health/ready"), 503, "no_worker")
        head = api.client.head("/health/ready")
        assert (head.status_code, head.content) == (503, b"")
        assert 'atoken_rejected_total{reason="no_worker"} 2.0' in api.client.get("/metrics").text, "probes do not count"
        assert api.client.get("/health").json()["status"] == "no_worker"
        assert api.client.get("/v1/models").json()["data"] == []
        with BlockWorker(redis.url):
            wait_for(lambda: api.healthy, "the worker is not seen")
            assert api.client.post("/encode", content=PICTURE).status_code == 200


def test_redis_that_goes_away_and_comes_back() -> None:
    with PrivateRedis(maxmemory_bytes=64 << 20) as redis, Api(redis.url) as api, BlockWorker(redis.url):
        assert api.client.post("/encode", content=PICTURE).status_code == 200
        os.kill(redis.process.pid, signal.SIGSTOP)
        try:
            problem(api.client.get("/health/ready"), 503, "queue_unavailable")
            assert api.client.get("/health/live").status_code == 200
            assert api.client.get("/health").json()["status"] == "queue_unavailable"
        finally:
            os.kill(redis.process.pid, signal.SIGCONT)
        wait_for(lambda: api.healthy, "not ready again")
        redis.restart()
        wait_for(lambda: api.healthy, "not ready after a restart", 30.0)
        assert api.client.post("/encode", content=PICTURE).status_code == 200


def test_redis_that_is_gone_is_503() -> None:
    with PrivateRedis(maxmemory_bytes=64 << 20) as redis, Api(redis.url) as api:
        redis.process.kill()
        redis.process.wait()
        response = api.client.post("/encode", content=PICTURE)
        problem(response, 503, "queue_unavailable")
        assert response.headers["retry-after"] == "2"
        assert api.client.get("/metrics").status_code == 200


def test_fault_of_ours_is_a_problem_without_details(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(self: QueueClient, job: object, payload: object) -> None:
        raise ZeroDivisionError("a secret of ours")

    monkeypatch.setattr(QueueClient, "submit", fail)
    response = api.client.post("/encode", content=PICTURE)
    problem(response, 500, "internal")
    assert "secret" not in response.text
    several = api.client.post("/encode", files=[("file", ("a", PICTURE)), ("file", ("b", PICTURE))])
    problem(several, 500, "internal")
    monkeypatch.undo()
    assert api.client.post("/encode", content=PICTURE).status_code == 200
