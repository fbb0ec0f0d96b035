"""A real server for all tests of the queue, and the two ends of it with short times."""

from __future__ import annotations

import asyncio
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from service.queue.client import QueueClient
from service.queue.consumer import QueueConsumer
from service.queue.jobs import Answer, Job, Lease, QueueLimits
from service.queue.keys import PoolKeys, pool_of
from service.queue.server import PrivateRedis

CARD: dict[str, Any] = {"name": "m", "revision": "0123456789abcdef", "outputs": ["latents"], "max_item_tokens": 1000}
MAXMEMORY = 256 << 20


class Queue:
    """Clients and workers of one test, the raw server below them, and what the counters ought to say."""

    pool = pool_of(CARD)
    card = CARD
    lease_s = 0.1

    def __init__(self, url: str) -> None:
        self.url = url
        self.keys = PoolKeys(self.pool)
        self.raw = redis.Redis.from_url(url, socket_timeout=5.0)
        self._open: list[QueueClient | QueueConsumer] = []

    async def client(self, **limits: Any) -> QueueClient:
        defaults: dict[str, Any] = {"lease_s": self.lease_s, "worker_silent_s": 30.0, "check_every_s": 0.1}
        client = QueueClient(self.url, QueueLimits(**(defaults | limits)), timeout_s=2.0)
        self._open.append(client)
        await client.start()
        return client

    async def worker(self, name: str = "", *, ready: bool = True, **options: Any) -> QueueConsumer:
        options = {"lease_s": self.lease_s, "timeout_s": 2.0} | options
        worker = QueueConsumer(self.url, name or f"w-{uuid.uuid4().hex[:8]}", [self.pool], **options)
        self._open.append(worker)
        await worker.start([self.card])
        if ready:
            await worker.set_ready(True)
        return worker

    def job(self, **changes: Any) -> Job:
        seconds = changes.pop("seconds", 30.0)
        fields: dict[str, Any] = {
            "id": uuid.uuid4().hex,
            "op": "encode",
            "pool": self.pool,
            "cost": 10,
            "deadline": time.time() + seconds,
        }
        return Job(**(fields | changes))

    async def take(self, worker: QueueConsumer, within_s: float = 5.0) -> Lease:
        """One lease, waited for."""
        async with asyncio.timeout(within_s):
            while True:
                leases = await worker.fetch(1, 1, block_s=0.05)
                if leases:
                    assert len(leases) == 1
                    return leases[0]

    async def serve(
        self, worker: QueueConsumer, answer: Callable[[Lease, bytes], Answer] | None = None, pause_s: float = 0.0
    ) -> None:
        """A worker's whole life, until it is cancelled."""
        while True:
            leases = await worker.fetch(200, 8, block_s=0.05)
            await worker.beat(leases)
            for lease in await worker.start_jobs(leases):
                payload = await worker.load(lease)
                if pause_s:
                    await asyncio.sleep(pause_s)
                await worker.commit(lease, answer(lease, payload) if answer else done(lease, payload[::-1]))

    def counters(self) -> dict[str, int]:
        """What the counters say, zeros left out."""
        found = {k.decode(): int(v) for k, v in self.raw.hgetall(self.keys.counters).items()}
        return {k: v for k, v in found.items() if v}

    def recount(self) -> dict[str, int]:
        """What the jobs' own records say."""
        sums: dict[str, int] = {}
        for name in self.raw.scan_iter(match=self.keys.job("*"), count=1000):
            job = {k.decode(): v.decode() for k, v in self.raw.hgetall(name).items()}
            if job.get("st") in ("queued", "running"):
                adds = {
                    "tokens": int(job["c"]),
                    direction(job): int(job["c"]),
                    "bytes": -(-int(job["b"]) * 5 // 4),
                    "items": 1,
                }
                adds["t:" + job["t"]] = int(job["c"])
                for key, value in adds.items():
                    sums[key] = sums.get(key, 0) + value
        return {k: v for k, v in sums.items() if v}

    def pending(self) -> int:
        """Entries that were delivered and not acknowledged, plus entries that are left in the streams."""
        total = 0
        for lane in (0, 1):
            if self.raw.exists(self.keys.queue(lane)):
                total += self.raw.xlen(self.keys.queue(lane))
                for group in self.raw.xinfo_groups(self.keys.queue(lane)):
                    total += group["pending"]
        return total

    def blobs(self) -> list[str]:
        return sorted(
            key.decode()
            for kind in ("i", "o")
            for key in self.raw.scan_iter(match=f"{self.keys.job('')[:-2]}{kind}:*", count=1000)
        )

    async def assert_empty(self) -> None:
        """Nothing is left of any job. An answer's payload may be deleted a moment after it was handed out."""
        until = time.monotonic() + 2
        while self.blobs() and time.monotonic() < until:
            await asyncio.sleep(0.01)
        assert self.blobs() == []
        assert self.counters() == {}
        assert {key.decode() for key in self.raw.hkeys(self.keys.counters)} <= {
            "tokens",
            "encode",
            "decode",
            "bytes",
            "items",
        }
        assert self.recount() == {}
        assert self.raw.hlen(self.keys.active) == 0
        assert self.pending() == 0

    async def close(self) -> None:
        for end in self._open:
            await end.close()
        self.raw.close()


def direction(job: dict[str, str]) -> str:
    return "decode" if job["op"] == "decode" else "encode"


def done(lease: Lease, payload: bytes = b"ok") -> Answer:
    return Answer(id=lease.job.id, status="done", payload=payload, timings={"model": 1.5})


@pytest.fixture(scope="session")
def shared_server() -> Iterator[PrivateRedis]:
    with PrivateRedis(maxmemory_bytes=MAXMEMORY) as server:
        yield server


@pytest.fixture
def url(shared_server: PrivateRedis) -> str:
    """An empty server with its first settings."""
    with redis.Redis.from_url(shared_server.url) as raw:
        raw.flushall()
        raw.script_flush()
        raw.config_set("maxmemory", MAXMEMORY)
        raw.config_set("maxmemory-policy", "noeviction")
    return shared_server.url


@pytest.fixture
def other_url() -> Iterator[str]:
    """The server on PATH, if there is one: often an older one than the packaged."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found is None:
        pytest.skip("no redis-server or valkey-server on PATH")
    with PrivateRedis(maxmemory_bytes=MAXMEMORY, binary=Path(found)) as server:
        yield server.url


@pytest.fixture
async def queue(url: str) -> AsyncIterator[Queue]:
    queue = Queue(url)
    yield queue
    await queue.close()


@pytest.fixture
async def own_server() -> AsyncIterator[PrivateRedis]:
    """A server that the test may kill."""
    with PrivateRedis(maxmemory_bytes=MAXMEMORY) as server:
        yield server


@pytest.fixture
async def fragile(own_server: PrivateRedis) -> AsyncIterator[Queue]:
    """A queue on that server."""
    queue = Queue(own_server.url)
    yield queue
    await queue.close()
