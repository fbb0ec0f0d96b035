"""Which of the fetched jobs make the next batch: decisions on cost, age, lane and tenant, without any I/O."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence

from service.queue.jobs import Lease

BULK_SHARE = 8
"""One part in so many of the budget is kept for lane 1 while it waits, so that it never starves (serving.md 3.5)."""


def pack(waiting: Sequence[Lease], *, budget_tokens: int, max_items: int) -> list[Lease]:
    """Choose the next batch from what waits; empty only if nothing waits.

    The oldest job is always in it and decides the model: a batch is one forward pass of one model. A job that was
    tried before, and one that is larger than the budget, is a batch of its own. The others are taken while they fit
    into budget_tokens and max_items, the tenant with the fewest tokens in the batch first.
    """
    if not waiting:
        return []
    oldest = min(waiting, key=_age)
    if oldest.alone or oldest.job.cost > budget_tokens:
        return [oldest]
    batch = _Batch(budget_tokens, max_items)
    batch.take([oldest])
    others = [
        lease for lease in waiting if lease is not oldest and lease.job.pool == oldest.job.pool and not lease.alone
    ]
    interactive = [lease for lease in others if lease.job.lane == 0]
    bulk = [lease for lease in others if lease.job.lane != 0]
    reserved = min(budget_tokens // BULK_SHARE, sum(lease.job.cost for lease in bulk))
    left = batch.take(interactive, keep=reserved)
    batch.take(bulk)
    batch.take(left)
    return batch.leases


class _Batch:
    def __init__(self, budget_tokens: int, max_items: int) -> None:
        self.leases: list[Lease] = []
        self._tokens_left = budget_tokens
        self._max_items = max_items
        self._tokens_of: Counter[str] = Counter()

    def take(self, leases: Iterable[Lease], *, keep: int = 0) -> list[Lease]:
        """Add what fits while `keep` tokens stay free; return the rest."""
        queues: dict[str, deque[Lease]] = {}
        for lease in sorted(leases, key=_age):
            queues.setdefault(lease.job.tenant, deque()).append(lease)
        rest: list[Lease] = []
        while queues:
            tenant = min(queues, key=lambda name: (self._tokens_of[name], _age(queues[name][0])))
            lease = queues[tenant].popleft()
            if not queues[tenant]:
                del queues[tenant]
            if len(self.leases) < self._max_items and lease.job.cost <= self._tokens_left - keep:
                self.leases.append(lease)
                self._tokens_left -= lease.job.cost
                self._tokens_of[tenant] += lease.job.cost
            else:
                rest.append(lease)
        return rest


def _age(lease: Lease) -> tuple[float, str]:
    return lease.enqueued, lease.job.id
