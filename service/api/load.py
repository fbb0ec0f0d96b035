"""A look at the queue before the work of decoding: an overloaded service refuses cheaply."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

from service.errors import deadline_too_short
from service.queue.estimate import MARGIN, Load, Work
from service.queue.jobs import QueueLimits, Refused

STATS_LIFE_S = 0.25


class StatsSource(Protocol):
    """The part of the queue that knows its load."""

    async def stats(self) -> dict[str, Load]:
        """Return the load by pool."""
        ...


class QueueLoad:
    """The queue's counters, read at most four times a second. Only `submit` decides; this is the cheap first word."""

    def __init__(self, source: StatsSource, limits: QueueLimits, *, max_timeout_s: float) -> None:
        self._source = source
        self._limits = limits
        self._max_timeout_s = max_timeout_s
        self._stats: dict[str, Load] = {}
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()

    async def stats(self) -> dict[str, Load]:
        """Return the load by pool. Raises QueueUnavailable."""
        async with self._reading:
            if time.monotonic() - self._read_at > STATS_LIFE_S:
                self._stats = await self._source.stats()
                self._read_at = time.monotonic()
            return self._stats

    async def check(self, pool: str, works: Sequence[Work], tokens: int, *, timeout_s: float, deadline: float) -> None:
        """Refuse a request whose items would not be done in time, or for which a pool has no room now.

        works: of its items in this pool; tokens: of all of them. timeout_s: what the client allows; deadline: when that
        is over, in Unix time.
        Raises Problem deadline_too_short (even an idle pool could not do it), Refused queue_full or
        would_miss_deadline, QueueUnavailable.
        """
        load = (await self.stats()).get(pool)
        if load is None:
            return
        total = sum(works, Work())
        # The items of a request run side by side on several workers, one item never does.
        alone_s = max([load.rates.seconds(total), *(load.fastest.seconds(work) for work in works)])
        least_s = alone_s / MARGIN
        if least_s > timeout_s:
            raise deadline_too_short(alone_s, timeout_s, self._max_timeout_s)
        if load.tokens == 0:  # an empty queue takes a request of any size that the limits allow
            return
        tokens += load.tokens
        seconds = load.rates.seconds(load.work + total)
        limit, token_s = self._limits.room(tokens, seconds)
        if tokens > limit:
            raise Refused(
                "queue_full", retry_after=_clamp((tokens - 0.8 * limit) * token_s), limit=limit, actual=tokens
            )
        left_s, done_s = deadline - time.time(), load.wait_s + least_s
        if load.wait_s > 0 and done_s > left_s > 0:
            raise Refused(
                "would_miss_deadline",
                retry_after=_clamp(done_s - left_s),
                limit=round(left_s, 1),
                actual=round(done_s, 1),
            )


def _clamp(seconds: float) -> float:
    return max(1.0, min(60.0, seconds))
