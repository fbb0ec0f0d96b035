"""What the API knows about workers: who lives, who is ready, how fast they are, which models they have."""

import json
import time
from typing import Any

from redis.asyncio import Redis

from service.queue.connect import check_server, unavailable
from service.queue.estimate import Load, Rates, Work, fastest
from service.queue.jobs import Worker
from service.queue.keys import LANES, POOLS, PoolKeys


class Registry:
    """A view of the workers that is refreshed from time to time, and checks the server the first time.

    silent_s: a worker whose last heartbeat is older is not there.
    """

    def __init__(self, client: Redis, silent_s: float) -> None:
        self._redis = client
        self._silent_s = silent_s
        self._seen_at = float("-inf")  # monotonic
        self._workers: list[Worker] = []
        self.maxmemory_bytes: int | None = None  # None until the server has been checked, 0: no limit

    async def refresh(self) -> None:
        """Look now. Raises QueueUnavailable."""
        if self.maxmemory_bytes is None:
            self.maxmemory_bytes = await check_server(self._redis)
        with unavailable():
            workers = [worker for keys in await self._pools() for worker in await self._workers_of(keys)]
        self._seen_at, self._workers = time.monotonic(), workers

    async def workers(self) -> list[Worker]:
        """All workers that live, ready or not. Raises QueueUnavailable."""
        await self._refresh_if_old()
        return self._workers

    async def ready(self, pool: str | None = None) -> list[Worker]:
        """Workers that live and are ready, of one pool or all. Raises QueueUnavailable."""
        await self._refresh_if_old()
        found = self._choose(pool)
        if not found:  # bad news is looked at twice: a worker may just have come
            await self.refresh()
            found = self._choose(pool)
        return found

    async def models(self) -> list[dict[str, Any]]:
        """Model cards of the ready workers, one a pool, by name. Raises QueueUnavailable."""
        cards: dict[str, dict[str, Any]] = {}
        for worker in await self.ready():
            card = cards.setdefault(worker.pool, dict(worker.card))
            if "max_item_tokens" in card:  # any of them may get the item
                card["max_item_tokens"] = min(card["max_item_tokens"], worker.card["max_item_tokens"])
        return sorted(cards.values(), key=lambda card: str(card["name"]))

    async def stats(self) -> dict[str, Load]:
        """Load by pool. Raises QueueUnavailable."""
        result: dict[str, Load] = {}
        with unavailable():
            pools = await self._pools()
        for keys in pools:
            ready = [worker.rates for worker in await self.workers() if worker.ready and worker.pool == keys.pool]
            pipe = self._redis.pipeline(transaction=False)
            pipe.time()
            pipe.hmget(keys.counters, "tokens", "bytes", "items", "encode", "decode")
            for lane in LANES:
                pipe.xrange(keys.queue(lane), count=1)
            with unavailable():
                (seconds, micros), counters, *firsts = await pipe.execute()
            added = [int(first[0][0].split(b"-")[0]) / 1000 for first in firsts if first]
            tokens, size, items, encode, decode = (int(n or 0) for n in counters)
            result[keys.pool] = Load(
                tokens=tokens,
                bytes=size,
                items=items,
                work=Work(encode=encode, decode=decode),
                oldest_s=max(0.0, seconds + micros / 1e6 - min(added)) if added else 0.0,
                workers=len(ready),
                rates=sum(ready, Rates()),
                fastest=fastest(ready),
            )
        return result

    def _choose(self, pool: str | None) -> list[Worker]:
        return [worker for worker in self._workers if worker.ready and pool in (None, worker.pool)]

    async def _refresh_if_old(self) -> None:
        if time.monotonic() - self._seen_at > min(3.0, self._silent_s / 2):
            await self.refresh()

    async def _pools(self) -> list[PoolKeys]:
        names: Any = await self._redis.smembers(POOLS)
        return [PoolKeys(name.decode()) for name in sorted(names)]

    async def _workers_of(self, keys: PoolKeys) -> list[Worker]:
        pipe = self._redis.pipeline(transaction=False)
        pipe.time()
        pipe.zrange(keys.workers, 0, -1, withscores=True)
        (seconds, micros), beats = await pipe.execute()
        now = seconds + micros / 1e6
        ages = {name.decode(): max(0.0, now - ms / 1000) for name, ms in beats}
        alive = {name: age for name, age in ages.items() if age <= self._silent_s}
        for name in sorted(alive):
            pipe.hgetall(keys.worker(name))
        return [
            Worker(
                id=name,
                pool=keys.pool,
                ready=facts[b"ready"] == b"1",
                rates=Rates(encode=float(facts[b"encode"]), decode=float(facts[b"decode"])),
                silent_s=age,
                card=json.loads(facts[b"card"]),
            )
            for (name, age), facts in zip(sorted(alive.items()), await pipe.execute(), strict=True)
            if facts
        ]
