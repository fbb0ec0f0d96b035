"""An API alone and two workers that meet at a Redis, and the death of one of them in the middle of a batch."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest

from media.image import encode_image
from media.tokens import load_tokens
from service.queue.server import PrivateRedis
from tests.system.deployment import Atoken, metric, wait_for

REQUESTS = 300
TOKEN_FILE = "application/vnd.safetensors"


@dataclass
class Fleet:
    api: Atoken
    workers: list[Atoken]
    url: str


@pytest.fixture
def fleet(folder: Path) -> Iterator[Fleet]:
    settings = {"lease_s": 3, "log_level": "debug", "threads": 1, "models": "tiny-continuous"}
    with (
        PrivateRedis() as redis,
        Atoken(folder, "api", "serve", "--redis", redis.url, "--port", "0", in_flight=2 * REQUESTS, **settings) as api,
        Atoken(folder, "one", "worker", redis_url=redis.url, batch_tokens=1024, **settings) as one,
        Atoken(folder, "two", "worker", "--redis", redis.url, "--batch-tokens", "1024", **settings) as two,
    ):
        for worker in (one, two):
            worker.wait_until(partial(worker.events, "worker_ready"), "a ready worker")
        yield Fleet(api.wait_ready(), [one, two], api.url())


def picture(index: int) -> tuple[bytes, int, int]:
    """A picture whose size no other index has."""
    height, width = 100 + index % 20, 100 + index // 20
    return encode_image(np.full((height, width, 3), index % 251, np.uint8), "png"), height, width


async def send(client: httpx.AsyncClient, index: int) -> tuple[int, str]:
    data, height, width = picture(index)
    answer = await client.post("/encode", files={"file": ("a.png", data)}, headers={"Accept": TOKEN_FILE})
    if answer.status_code != 200:
        return answer.status_code, answer.json()["code"]
    [item] = load_tokens(answer.content)
    own = (item.layout.height, item.layout.width) == (height, width)
    return 200, "its own" if own else f"another's: {item.layout}"


def caught_in_a_batch(worker: Atoken) -> bool:
    """Whether it computes a batch that is not its first. It is stopped then, so that it still holds it when killed."""

    def computes() -> bool:
        return len(worker.events("batch_begins")) > max(1, len(worker.events("batch")))

    if not computes():
        return False
    worker.process.send_signal(signal.SIGSTOP)
    if not computes():
        worker.process.send_signal(signal.SIGCONT)
        return False
    return True


def test_a_worker_killed_in_the_middle_of_a_batch(fleet: Fleet) -> None:
    victim, survivor = fleet.workers

    async def run() -> Counter[tuple[int, str]]:
        limits = httpx.Limits(max_connections=REQUESTS, max_keepalive_connections=REQUESTS)
        async with httpx.AsyncClient(base_url=fleet.url, timeout=120, limits=limits, trust_env=False) as client:
            requests = [asyncio.create_task(send(client, index)) for index in range(REQUESTS)]
            while not caught_in_a_batch(victim):
                await asyncio.sleep(0.02)
            victim.process.kill()
            return Counter(await asyncio.gather(*requests))

    assert asyncio.run(run()) == {(200, "its own"): REQUESTS}
    claimed = [event for event in survivor.err.read_text().splitlines() if "claimed" in event]
    assert claimed, "the victim held jobs when it died"
    with httpx.Client(base_url=fleet.url, trust_env=False) as client:
        # One answer a request, one request an answer, and nothing left anywhere.
        assert metric(client, "atoken_items_total", result="ok") == REQUESTS
        assert metric(client, "atoken_items_total") == REQUESTS
        assert metric(client, "atoken_http_requests_total", op="encode") == REQUESTS
        for name in ("tokens", "bytes", "items"):
            assert metric(client, f"atoken_queue_{name}") == 0
        assert client.get("/health/ready").status_code == 200


def test_an_api_alone_is_not_ready_without_workers(fleet: Fleet) -> None:
    with httpx.Client(base_url=fleet.url, trust_env=False) as client:
        wait_for(lambda: metric(client, "atoken_workers_ready") == 2, "both workers", 10)
        for worker in fleet.workers:
            worker.process.terminate()
            assert worker.popen.wait(30) == 0
        wait_for(lambda: client.get("/health/ready").status_code == 503, "not ready", 10)
        answer = client.post("/encode", files={"file": ("a.png", picture(0)[0])})
        assert (answer.status_code, answer.json()["code"]) == (503, "no_worker")
        assert int(answer.headers["Retry-After"]) >= 1
        assert client.get("/health/live").status_code == 200
