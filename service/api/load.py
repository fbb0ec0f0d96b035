"""A look at the queue before the work of decoding: an overloaded service refuses cheaply."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from service.queue.jobs import QueueLimits, Refused

STATS_LIFE_S = 0.25


class StatsSource(Protocol):
    """The part of the queue that knows its load."""

    async def stats(self) -> dict[str, dict[str, float]]:
        """Return tokens, bytes, items and tokens_per_s by pool."""
        ...


class QueueLoad:
    """The queue's counters, read at most four times a second. Only `submit` decides; this is the cheap first word."""

    def __init__(self, source: StatsSource, limits: QueueLimits) -> None:
        self._source = source
        self._limits = limits
        self._stats: dict[str, dict[str, float]] = {}
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()

    async def stats(self) -> dict[str, dict[str, float]]:
        """Return the load by pool. Raises QueueUnavailable."""
        async with self._reading:
            if time.monotonic() - self._read_at > STATS_LIFE_S:
                self._stats = await self._source.stats()
                self._read_at = time.monotonic()
            return self._stats

    async def check(self, pool: str, tokens: int) -> None:
        """Raise Refused queue_full when a pool has no room for so many tokens now. Raises QueueUnavailable."""
        load = (await self.stats()).get(pool)
        if load is None:
            return
        limits, rate = self._limits, load["tokens_per_s"]
        limit = limits.tokens or max(limits.floor_tokens, int(limits.queue_seconds * rate))
        # An empty queue takes a request of any size that the limits allow.
        if load["tokens"] > 0 and load["tokens"] + tokens > limit:
            over = load["tokens"] + tokens - 0.8 * limit
            wait = over / (rate or limit / limits.queue_seconds)
            raise Refused(
                "queue_full", retry_after=max(1.0, min(60.0, wait)), limit=limit, actual=load["tokens"] + tokens
            )
