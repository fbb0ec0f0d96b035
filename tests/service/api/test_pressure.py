"""Overload, deadlines, clients that leave, workers and a Redis that are not there."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from service.queue.client import QueueClient
from service.queue.server import PrivateRedis
from tests.service.api.block_worker import BlockWorker
from tests.service.api.conftest import blocks, png, problem
from tests.service.api.rig import Api

PICTURE = png(blocks(64, 64))  # 16 tokens
BIG = png(blocks(512, 512))  # 1024 tokens


@pytest.fixture
def held(worker: BlockWorker) -> Iterator[BlockWorker]:
    """The worker, which takes nothing until the test ends or lets it."""
    worker.running.clear()
    time.sleep(0.1)  # a fetch may be under way; a job that it takes is answered at once
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


def send_without_waiting(api: Api, body: bytes = PICTURE, headers: str = "") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", api.port), timeout=20.0)
    head = (
        f"POST /encode HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    )
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
