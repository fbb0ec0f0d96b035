"""The queue as a whole against a simple model: random orders of everything that clients and workers can do.

After every step: counters equal a recount of the jobs' records, an ended job stays as it ended, an answer comes once
and only to a job that was submitted, fences only grow, no blob is without a job. At the end everything is answered and
empty.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from service.queue.client import QueueClient
from service.queue.consumer import QueueConsumer
from service.queue.jobs import Answer, Lease, Refused
from tests.service.queue.conftest import Queue, done

T = TypeVar("T")

LEASE_S = 0.05
TENANTS = ["anonymous", "a", "b"]
SIZES = [0, 10, 20_000, 100_000]


class Machine(RuleBasedStateMachine):
    """Three workers and one client on a real server; only the clock of leases is short."""

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.queue = Queue(self.url)
        self.queue.lease_s = LEASE_S
        self.queue.raw.flushall()
        self.client: QueueClient = self.run(self.queue.client(check_every_s=0.2, tokens=200))
        self.workers: list[QueueConsumer] = [self.run(self.queue.worker()) for _ in range(3)]
        self.held: list[dict[str, Lease]] = [{}, {}, {}]
        self.waits: dict[str, asyncio.Task[Answer]] = {}
        self.answers: dict[str, Answer] = {}
        self.arrived: list[str] = []
        self.ended: dict[str, str] = {}
        self.fences: dict[str, int] = {}
        self.committed: dict[str, bytes] = {}
        self.canceled: set[str] = set()
        self.flushed: set[str] = set()
        arrive = self.client._arrive

        def note(pool: str, fields: dict[str, bytes]) -> None:
            self.arrived.append(fields["id"].decode())
            arrive(pool, fields)

        self.client._arrive = note  # type: ignore[method-assign]

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    @initialize(costs=st.lists(st.integers(1, 30), min_size=2, max_size=5), size=st.sampled_from(SIZES))
    def begin_with_some(self, costs: list[int], size: int) -> None:
        for cost in costs:
            self.submit(cost, size, "anonymous", 0)

    @rule(seed=st.integers(0, 2**32))
    def step(self, seed: int) -> None:
        """One action among those that are possible now.

        Rules of their own would mostly draw what is always possible, and what is possible depends on real time, so it
        cannot be Hypothesis that chooses.
        """
        rng = random.Random(seed)
        pick, worker = rng.randrange(50), rng.randrange(3)
        choices: list[Callable[[], None]] = [
            lambda: self.submit(rng.randint(1, 60), rng.choice(SIZES), rng.choice(TENANTS), rng.randrange(2)),
            lambda: self.fetch(worker, rng.randint(1, 100), rng.randint(1, 6)),
            lambda: self.fetch(worker, 1000, 50),
            lambda: self.reap(worker),
        ]
        if any(not wait.done() for wait in self.waits.values()):
            choices.append(lambda: self.cancel(pick))
        if any(self.held):
            choices += 2 * [
                lambda: self.start(pick),
                lambda: self.commit(pick, rng.choice(SIZES)),
                lambda: self.beat(pick),
                lambda: self.freeze(worker, pick),
            ]
            choices += [lambda: self.give_back(pick, rng.random() < 0.5), lambda: self.kill(pick)]
            if pick < 10:
                choices.append(self.flush)
        rng.choice(choices)()

    def submit(self, cost: int, size: int, tenant: str, lane: int) -> None:
        job = self.queue.job(cost=cost, tenant=tenant, lane=lane)

        async def go() -> None:
            try:
                await self.client.submit(job, b"x" * size)
            except Refused:
                return
            self.waits[job.id] = asyncio.create_task(self.client.wait(job.id))

        self.run(go())

    def fetch(self, worker: int, budget: int, most: int) -> None:
        leases = self.run(self.workers[worker].fetch(budget, most, block_s=0.0))
        for lease in leases:
            assert lease.job.id in self.waits
            assert lease.fence > self.fences.get(lease.job.id, 0)
            self.fences[lease.job.id] = lease.fence
            self.held[worker][lease.job.id] = lease
        assert sum(lease.job.cost for lease in leases[:-16]) < budget  # the last read may go over

    def freeze(self, other: int, pick: int) -> None:
        """All leases run out and another worker comes first; the frozen one still believes in its own."""
        self.run(asyncio.sleep(LEASE_S * 1.3))
        if other != self.choose(pick)[0]:
            self.fetch(other, 1000, 50)

    def start(self, pick: int) -> None:
        worker, _ = self.choose(pick)
        started = self.run(self.workers[worker].start_jobs(list(self.held[worker].values())))
        for lease in started:
            assert self.fences[lease.job.id] == lease.fence  # whoever was overtaken may not run it
            assert lease.job.id not in self.canceled
        kept = {lease.job.id for lease in started}
        self.held[worker] = {job_id: lease for job_id, lease in self.held[worker].items() if job_id in kept}

    def commit(self, pick: int, size: int) -> None:
        worker, lease = self.choose(pick)
        payload = lease.job.id.encode() + b"y" * size
        if self.run(self.workers[worker].commit(lease, done(lease, payload))):
            assert lease.job.id not in self.committed
            assert self.fences[lease.job.id] == lease.fence
            assert lease.job.id not in self.canceled
            self.committed[lease.job.id] = payload
        del self.held[worker][lease.job.id]

    def give_back(self, pick: int, untry: bool) -> None:
        worker, lease = self.choose(pick)
        self.run(self.workers[worker].give_back([lease], untry=untry))
        del self.held[worker][lease.job.id]

    def beat(self, pick: int) -> None:
        worker, _ = self.choose(pick)
        lost = {lease.job.id for lease in self.run(self.workers[worker].beat(list(self.held[worker].values())))}
        for job_id in lost:
            del self.held[worker][job_id]
        for job_id, lease in self.held[worker].items():
            assert self.fences[job_id] == lease.fence
        for entry in self.pending_entries():  # a heartbeat keeps what is its own and steals nothing
            for owner, held in enumerate(self.held):
                if self.workers[owner]._me == entry["consumer"].decode():
                    mine = [lease for lease in held.values() if lease.stream_id == entry["message_id"].decode()]
                    assert all(self.fences[lease.job.id] == lease.fence for lease in mine)

    def cancel(self, pick: int) -> None:
        waiting = [job_id for job_id, wait in self.waits.items() if not wait.done()]
        job_id = waiting[pick % len(waiting)]
        self.canceled.add(job_id)
        self.run(self.client.cancel(job_id))

    def kill(self, pick: int) -> None:
        """It forgets everything; a new one takes its place. The old one's leases run out."""
        worker, _ = self.choose(pick)
        self.workers[worker] = self.run(self.queue.worker())
        self.held[worker] = {}

    def reap(self, worker: int) -> None:
        self.queue.raw.delete(self.queue.keys.reap_lock)
        self.run(self.workers[worker].reap())

    def flush(self) -> None:
        self.flushed |= {job_id for job_id in self.waits if job_id not in self.answers}
        self.queue.raw.flushall()
        self.ended.clear()
        self.arrived.clear()
        for worker in self.workers:
            self.run(worker.set_ready(True))

    @invariant()
    def counters_are_true(self) -> None:
        assert self.queue.counters() == self.queue.recount()

    @invariant()
    def an_end_is_final(self) -> None:
        for name in self.queue.raw.scan_iter(match=self.queue.keys.job("*"), count=1000):
            job = {k.decode(): v.decode() for k, v in self.queue.raw.hgetall(name).items()}
            if job["st"] not in ("queued", "running"):
                assert self.ended.setdefault(job["id"], job["st"]) == job["st"]
            else:
                assert job["id"] not in self.ended

    @invariant()
    def every_answer_comes_once_and_was_asked_for(self) -> None:
        self.run(asyncio.sleep(0))
        assert len(self.arrived) == len(set(self.arrived))
        assert set(self.arrived) <= set(self.waits)
        for job_id, wait in self.waits.items():
            if wait.done():
                answer = self.answers.setdefault(job_id, wait.result())
                assert answer.id == job_id
                if answer.status == "done" and job_id in self.committed:
                    assert answer.payload == self.committed[job_id]

    @invariant()
    def every_blob_has_a_job(self) -> None:
        for name in self.queue.blobs():
            job_id = name.rsplit(":", 2)[1] if ":i:" in name else name.rsplit(":", 3)[1]
            state = self.queue.raw.hget(self.queue.keys.job(job_id), "st")
            wanted = (b"queued", b"running") if ":i:" in name else (b"done",)
            assert state in wanted, name

    def choose(self, pick: int) -> tuple[int, Lease]:
        """A worker that holds something, and one of its leases."""
        held = [(worker, lease) for worker, leases in enumerate(self.held) for lease in leases.values()]
        return held[pick % len(held)]

    def pending_entries(self) -> list[dict[str, Any]]:
        streams = [self.queue.keys.queue(lane) for lane in (0, 1)]
        return [
            e for s in streams if self.queue.raw.exists(s) for e in self.queue.raw.xpending_range(s, "w", "-", "+", 99)
        ]

    def teardown(self) -> None:
        """A healthy worker takes over: all that was accepted is answered, once, and nothing is left."""
        try:
            self.run(self.drain())
            self.every_answer_comes_once_and_was_asked_for()
            for job_id, answer in self.answers.items():
                allowed = {"done", "failed"}
                allowed |= {"canceled"} if job_id in self.canceled else set()
                allowed |= {"lost"} if job_id in self.flushed else set()
                assert answer.status in allowed, answer
                assert answer.status != "failed" or answer.code == "item_failed_repeatedly"
            self.run(self.queue.assert_empty())
            assert self.client._entries == {}
        finally:
            self.run(self.queue.close())
            self.runner.close()

    async def drain(self) -> None:
        worker = await self.queue.worker()
        until = time.monotonic() + 10
        while self.queue.pending() or self.queue.blobs() or not all(wait.done() for wait in self.waits.values()):
            assert time.monotonic() < until, (self.queue.pending(), self.queue.blobs())
            for lease in await worker.start_jobs(await worker.fetch(1000, 50, block_s=0.02)):
                payload = lease.job.id.encode()
                if await worker.commit(lease, done(lease, payload)):
                    self.committed[lease.job.id] = payload


def run_machine(url: str, max_examples: int) -> None:
    Machine.url = url
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,  # the same orders every time
            database=None,
        ),
    )


def test_random_orders(url: str) -> None:
    run_machine(url, 25)


def test_random_orders_on_the_server_on_path(other_url: str) -> None:
    run_machine(other_url, 8)
