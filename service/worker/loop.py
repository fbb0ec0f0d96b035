"""The worker's asyncio side: fetch, pack, start, load, run, commit; and the beat that keeps what is held alive."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog

from service.queue.estimate import Rates
from service.queue.jobs import Answer, Lease, PayloadLost
from service.queue.keys import pool_of
from service.worker.batcher import pack
from service.worker.budget import Budget
from service.worker.model_thread import Abandoned, ModelThread
from service.worker.runner import DeviceLostError, Failure, Result, Runner
from service.worker.speed import Speed

EXIT_OK = 0
EXIT_STALLED = 70
"""The model's thread did not move: the beat must not keep a hung worker alive. Source: serving.md 3.5."""
EXIT_DEVICE = 71
"""The accelerator is lost: a worker that can only fail must not eat the queue."""

REAP_S = 5.0
REPORT_S = 2.0
"""The API admits by the speed that a heartbeat tells, so heartbeats are not rarer than this, however long the lease."""

LINGER_S = 0.02
"""While the model computes, fetches are this far apart, or a quarter of the last batch if that is shorter."""

log = structlog.get_logger(__name__)


class Consumer(Protocol):
    """What the loop needs of the queue; `service.queue.consumer.QueueConsumer` is it and says more.

    While Redis is away, calls go on trying (or give nothing) instead of raising.
    """

    async def start(self, cards: Sequence[Mapping[str, Any]]) -> None:
        """Register this worker and its models."""
        ...

    async def fetch(self, budget_tokens: int, max_items: int) -> list[Lease]:
        """Take up to so much work, waiting a moment for the first job."""
        ...

    async def start_jobs(self, leases: Sequence[Lease]) -> list[Lease]:
        """Count a try for each and return those that still have somebody waiting."""
        ...

    async def load(self, lease: Lease) -> bytes:
        """Return the payload. Raises PayloadLost."""
        ...

    async def beat(self, leases: Sequence[Lease]) -> list[Lease]:
        """Prolong the leases and the worker's own entry; return the leases that are lost or canceled."""
        ...

    async def commit_all(self, pairs: Sequence[tuple[Lease, Answer]]) -> list[bool]:
        """Answer jobs, unless they are another worker's by now; whether each answer counted."""
        ...

    async def give_back(self, leases: Sequence[Lease]) -> None:
        """Return jobs that have no answer."""
        ...

    async def set_ready(self, ready: bool) -> None:
        """Say whether new work is wanted."""
        ...

    async def report(self, pool: str, rates: Rates) -> None:
        """Tell the measured speed of a pool's model."""
        ...

    async def reap(self) -> None:
        """Clean up after the dead."""
        ...


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """lease_s: how long a silent worker keeps its jobs. watchdog_s: how long a layer of the model may take.

    batch_items: most jobs of one batch. stop_s: how long a stopping worker may take to finish its batch and to reach
    a Redis that is away. parent: process id whose end ends this worker at once, None to live alone.
    """

    lease_s: float = 15.0
    watchdog_s: float = 60.0
    batch_items: int = 64
    stop_s: float = 50.0
    parent: int | None = None


@dataclass
class WorkerLoop:
    """Runs until it is told to stop, then finishes the batch in hand and gives the rest back.

    Greedy: an idle model gets what is there, at once. While it computes, at most one further batch is fetched, its
    payloads load, and at most one finished batch is being answered: so memory is bounded by three batches.
    """

    consumer: Consumer
    runner: Runner
    budget: Budget
    speed: Speed
    model: ModelThread
    settings: LoopSettings = field(default_factory=LoopSettings)

    def __post_init__(self) -> None:
        # A lease that was lost and taken anew has another fence.
        self._waiting: dict[tuple[str, int], _Held] = {}
        self._begun: dict[tuple[str, int], Lease] = {}
        self._changed = asyncio.Event()
        self._stop = asyncio.Event()
        self._is_registered = False
        self._computing: frozenset[tuple[str, int]] = frozenset()
        self._batch_s = 0.0
        self._pools: list[str] = []

    def stop(self) -> None:
        """Ask the loop to end: take nothing more, finish the batch in hand, give the rest back."""
        self._stop.set()
        self._changed.set()

    async def run(self, cards: Sequence[Mapping[str, Any]]) -> int:
        """Register the models that the cards describe and work until `stop`; return the exit status.

        Raises QueueUnavailable for a Redis that the queue cannot use at all.
        """
        parts = [asyncio.create_task(part) for part in (self._work(cards), self._beat(), self._reap(), self._overdue())]
        try:
            # The others end only by a fault of ours, or when the worker is overdue: it must not go on without them.
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            statuses = [part.result() for part in parts if part.done()]
            await self._leave()
            return next(status for status in statuses if status is not None)
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)

    async def _work(self, cards: Sequence[Mapping[str, Any]]) -> int:
        await self.consumer.start(cards)
        self._is_registered = True
        self._pools = [pool_of(card) for card in cards]
        await self._report()
        await self.consumer.set_ready(True)
        log.info("worker_ready")
        async with asyncio.TaskGroup() as group:
            group.create_task(self._intake())
            drive = group.create_task(self._drive())
        return drive.result()

    async def _intake(self) -> None:
        """Keep up to one batch waiting, its payloads on their way."""
        while not self._stop.is_set():
            tokens = self.budget.tokens - sum(held.lease.job.cost for held in self._waiting.values())
            items = self.settings.batch_items - len(self._waiting)
            if tokens <= 0 or items <= 0:
                await self._wait_for_change()
                continue
            leases = await self.consumer.fetch(tokens, items)
            for lease in leases:
                self._waiting[_key(lease)] = _Held(lease, asyncio.create_task(self.consumer.load(lease)))
            if leases:
                self._changed.set()
            if self._computing and self._waiting:
                # Nobody is kept waiting by it, and one trip to Redis brings what came meanwhile.
                await asyncio.sleep(min(LINGER_S, self._batch_s / 4))
        await self.consumer.set_ready(False)

    async def _drive(self) -> int:
        """Run batch after batch; while one computes, the last one is answered."""
        answering: asyncio.Task[None] | None = None
        try:
            while not self._stop.is_set():
                leases = pack(
                    [held.lease for held in self._waiting.values()],
                    budget_tokens=self.budget.tokens,
                    max_items=self.settings.batch_items,
                )
                if not leases:
                    await self._wait_for_change()
                    continue
                finished = await self._compute(await self._begin(leases))
                if answering is not None:
                    await answering
                answering = asyncio.create_task(self._answer(finished))
            return EXIT_OK
        except DeviceLostError as error:
            log.critical("device_lost", detail=str(error), status=EXIT_DEVICE)
            self.stop()
            return EXIT_DEVICE
        finally:
            if answering is not None:
                await answering

    async def _begin(self, leases: Sequence[Lease]) -> list[tuple[Lease, bytes | None]]:
        """Wait for the payloads, then count the tries, directly before the forward; leave out what nobody wants.

        A payload is None when it is gone from Redis.
        """
        loads = [self._waiting[_key(lease)].payload for lease in leases]
        await asyncio.wait(loads)
        payloads = {_key(lease): _loaded(load) for lease, load in zip(leases, loads, strict=True)}
        started = await self.consumer.start_jobs(leases)
        for lease in leases:
            del self._waiting[_key(lease)]
        self._begun |= {_key(lease): lease for lease in started}
        self._changed.set()
        return [(lease, payloads[_key(lease)]) for lease in started]

    async def _compute(self, batch: Sequence[tuple[Lease, bytes | None]]) -> list[_Finished]:
        """Run one batch in the model's thread."""
        whole = [(lease, payload) for lease, payload in batch if payload is not None]
        lost = [_Finished(lease, None, {}) for lease, payload in batch if payload is None]
        if not whole:
            return lost
        jobs = [lease.job for lease, _ in whole]
        log.debug("batch_begins", pool=jobs[0].pool, items=len(jobs))
        begin = time.perf_counter()
        self._computing = frozenset(_key(lease) for lease, _ in whole)
        results: Sequence[Result]
        try:
            results = await self.model.run(self.runner.run, jobs[0].pool, jobs, [payload for _, payload in whole])
        except Abandoned:
            log.info("batch_abandoned", pool=jobs[0].pool, items=len(jobs))
            results = [Failure(code="canceled", detail="nobody waits for it")] * len(jobs)  # the commit drops it
        finally:
            self._computing = frozenset()
        seconds = self._batch_s = time.perf_counter() - begin
        tokens = sum(job.cost for job in jobs)
        timings = {"model": round(seconds * 1e3, 3)}
        log.debug("batch", pool=jobs[0].pool, items=len(jobs), tokens=tokens, ms=timings["model"])
        return lost + [_Finished(lease, result, timings) for (lease, _), result in zip(whole, results, strict=True)]

    async def _answer(self, finished: Sequence[_Finished]) -> None:
        """Serialise and commit the results of a batch."""
        answers = await asyncio.to_thread(lambda: [each.answer() for each in finished])
        await self.consumer.commit_all([(each.lease, answer) for each, answer in zip(finished, answers, strict=True)])
        for each in finished:
            del self._begun[_key(each.lease)]

    async def _beat(self) -> None:
        """Prolong what is held; leave at once when the model hangs or the parent is gone."""
        last = time.monotonic()
        while True:
            if self.model.stalled_s > self.settings.watchdog_s:
                log.critical("model_stalled", seconds=round(self.model.stalled_s, 1), status=EXIT_STALLED)
                os._exit(EXIT_STALLED)  # a hung thread cannot be joined
            if self.settings.parent is not None and os.getppid() != self.settings.parent:
                os._exit(EXIT_OK)  # the private Redis and the API are gone with it: nobody to answer
            if time.monotonic() - last > min(self.settings.lease_s / 3, REPORT_S):
                last = time.monotonic()
                await self._report()
                held = [held.lease for held in self._waiting.values()] + list(self._begun.values())
                unwanted = {_key(lease) for lease in await self.consumer.beat(held)}
                # One that waits needs nothing here: start_jobs leaves it out. Of one that is computed commit refuses
                # the answer; if nobody wants any of the batch, its forward ends at the next layer.
                if self._computing and self._computing <= unwanted:
                    self.model.abandon()
            await asyncio.sleep(min(0.5, self.settings.lease_s / 6, self.settings.watchdog_s / 4))

    async def _report(self) -> None:
        for pool in self._pools:
            await self.consumer.report(pool, self.speed.rates(pool))

    async def _reap(self) -> None:
        """Clean up after dead workers every few seconds; whichever worker comes first does it."""
        while True:
            await asyncio.sleep(REAP_S)
            await self.consumer.reap()

    async def _overdue(self) -> int:
        await self._stop.wait()
        if self._is_registered:  # else nothing can be in hand
            await asyncio.sleep(self.settings.stop_s)
            log.error("stop_overdue", items=len(self._begun), detail="not everything in hand could be answered")
        return EXIT_OK

    async def _leave(self) -> None:
        """Give back what was fetched but not begun, and what was begun and not answered."""
        loads = [held.payload for held in self._waiting.values()]
        for load in loads:
            load.cancel()
        await asyncio.gather(*loads, return_exceptions=True)
        back = [held.lease for held in self._waiting.values()] + list(self._begun.values())
        if back:
            await self.consumer.give_back(back)
            log.info("gave_back", items=len(back))

    async def _wait_for_change(self) -> None:
        # No await lies between a caller's look at the state and this clear, so no change is missed.
        self._changed.clear()
        await self._changed.wait()


@dataclass(frozen=True)
class _Held:
    """A job that was fetched, and its payload, which loads while other jobs compute."""

    lease: Lease
    payload: asyncio.Task[bytes]


@dataclass(frozen=True)
class _Finished:
    """A job with its result; None when its input was gone."""

    lease: Lease
    result: Result | None
    timings: dict[str, float]

    def answer(self) -> Answer:
        """Return what goes back to the API."""
        job, tries, result = self.lease.job, self.lease.tries, self.result
        if result is None:
            return Answer(id=job.id, status="lost", code="job_lost", detail="the input is no longer there", tries=tries)
        if not isinstance(result, Failure):
            try:
                return Answer(id=job.id, status="done", payload=result.dump(), timings=self.timings, tries=tries)
            except Exception as error:
                log.error("result_not_sendable", job=job.id, request_id=job.request_id, exc_info=error)
                result = Failure(code="internal", detail="the result cannot be sent; the worker's log has the reason")
        return Answer(
            id=job.id, status="failed", code=result.code, detail=result.detail, timings=self.timings, tries=tries
        )


def _key(lease: Lease) -> tuple[str, int]:
    return lease.job.id, lease.fence


def _loaded(load: asyncio.Task[bytes]) -> bytes | None:
    error = load.exception()
    if error is None:
        return load.result()
    if not isinstance(error, PayloadLost):
        log.error("payload_not_readable", exc_info=error)
    return None
