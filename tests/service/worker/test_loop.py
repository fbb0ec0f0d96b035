"""The loop against a real Redis and the real queue, with a real network behind a runner that tests can hold still."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest

from media import wire
from model import Tokenizer
from service.queue.client import QueueClient
from service.queue.consumer import QueueConsumer
from service.queue.jobs import Answer, Job, Lease
from service.queue.keys import PoolKeys, pool_of
from service.queue.server import PrivateRedis
from service.worker.budget import Budget
from service.worker.loop import EXIT_DEVICE, EXIT_OK, LINGER_S, LoopSettings, WorkerLoop
from service.worker.model_thread import Abandoned, ModelThread
from service.worker.runner import DeviceLostError, Result, Runner
from service.worker.selftest import pattern
from service.worker.speed import Speed

PAYLOAD = wire.dumps({"pixels": pattern(32, 32)[None]}, {"kind": "image", "fps": None, "notes": []})
LEASE_S = 1.0


class HeldRunner(Runner):
    """Runs batches when `go` is set, and remembers them."""

    def __init__(self, tokenizer: Tokenizer, pool: str, budget: Budget, speed: Speed) -> None:
        super().__init__({pool: tokenizer}, budget, speed)
        self.go = threading.Event()
        self.go.set()
        self.batches: list[list[str]] = []
        self.ended: list[tuple[str, type[BaseException] | None]] = []
        self.fault: Exception | None = None

    def run(self, pool: str, jobs: Sequence[Job], payloads: Sequence[bytes]) -> list[Result]:
        self.batches.append([job.id for job in jobs])
        assert self.go.wait(20)
        if self.fault is not None:
            raise self.fault
        try:
            return super().run(pool, jobs, payloads)
        finally:
            self.ended.append((jobs[0].id, sys.exc_info()[0]))


class Rig:
    """One client and one worker loop that meet at a Redis of their own."""

    def __init__(self, redis: PrivateRedis, tokenizer: Tokenizer, client: QueueClient, name: str = "w1") -> None:
        self.redis = redis
        self.tokenizer = tokenizer
        self.card = tokenizer.card()
        self.pool = pool_of(self.card)
        self.client = client
        self.budget = Budget(1024)
        self.speed = Speed(large_tokens=1)
        self.runner = HeldRunner(tokenizer, self.pool, self.budget, self.speed)
        self.consumer = QueueConsumer(redis.url, name, [self.pool], lease_s=LEASE_S)
        self.model = ModelThread()
        self.loop = WorkerLoop(
            self.consumer,
            self.runner,
            self.budget,
            self.speed,
            self.model,
            LoopSettings(lease_s=LEASE_S, batch_items=32, stop_s=5.0),
        )
        self.task: asyncio.Task[int] | None = None

    async def start(self) -> None:
        self.task = asyncio.create_task(self.loop.run([self.card]))
        await until(lambda: self.client.models())

    async def stop(self) -> int:
        assert self.task is not None
        self.loop.stop()
        self.runner.go.set()
        try:
            return await asyncio.wait_for(self.task, 20)
        finally:
            await self.consumer.close()
            self.model.close()

    async def submit(self, name: str, *, cost: int = 4, timeout_s: float = 30.0, payload: bytes = PAYLOAD) -> None:
        job = Job(id=name, op="encode", pool=self.pool, cost=cost, deadline=time.time() + timeout_s)
        await self.client.submit(job, payload)

    async def answers(self, names: Sequence[str]) -> list[Answer]:
        return await asyncio.wait_for(asyncio.gather(*(self.client.wait(name) for name in names)), 30)


async def until(check: Callable[[], Awaitable[Any] | Any], timeout_s: float = 15.0) -> None:
    async with asyncio.timeout(timeout_s):
        while True:
            found = check()
            if await found if isinstance(found, Awaitable) else found:
                return
            await asyncio.sleep(0.02)


@asynccontextmanager
async def rig_at(redis: PrivateRedis, tokenizer: Tokenizer) -> AsyncIterator[Rig]:
    client = QueueClient(redis.url)
    await client.start()
    rig = Rig(redis, tokenizer, client)
    try:
        await rig.start()
        yield rig
    finally:
        if rig.task is not None and not rig.task.done():
            await rig.stop()
        await client.close()


async def test_jobs_are_packed_while_the_model_is_busy(redis: PrivateRedis, continuous: Tokenizer) -> None:
    async with rig_at(redis, continuous) as rig:
        names = [f"j{i}" for i in range(40)]
        rig.runner.go.clear()
        await rig.submit(names[0])
        await until(lambda: rig.runner.batches)
        for name in names[1:]:
            await rig.submit(name)
        await until(lambda: len(rig.loop._waiting) == 32)
        rig.runner.go.set()
        answers = await rig.answers(names)
        assert {answer.status for answer in answers} == {"done"}
        assert all(answer.tries == 1 and answer.timings["model"] > 0 for answer in answers)
        assert wire.loads(answers[7].payload or b"")[0]["latents"].shape == (4, 48)
        # The first alone, for it found an idle model; then a full batch, then the rest.
        assert [len(batch) for batch in rig.runner.batches] == [1, 32, 7]
        assert await rig.stop() == EXIT_OK


async def test_fetches_are_apart_while_the_model_computes(
    redis: PrivateRedis, continuous: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with rig_at(redis, continuous) as rig:
        fetch, begun = rig.consumer.fetch, list[float]()

        async def noted(budget_tokens: int, max_items: int) -> list[Lease]:
            begun.append(time.monotonic())
            return await fetch(budget_tokens, max_items)

        monkeypatch.setattr(rig.consumer, "fetch", noted)
        rig.runner.go.clear()
        rig.loop._batch_s = 10.0  # of the last batch
        await rig.submit("j0")
        await until(lambda: rig.runner.batches)
        for i in range(1, 21):
            await rig.submit(f"j{i}")
        await until(lambda: len(rig.loop._waiting) == 20)
        # The first of them may have begun before the model did.
        assert all(later - earlier >= 0.9 * LINGER_S for earlier, later in pairwise(begun[2:]))
        rig.runner.go.set()
        await rig.answers([f"j{i}" for i in range(21)])


async def test_prefetch_is_one_batch(redis: PrivateRedis, continuous: Tokenizer) -> None:
    async with rig_at(redis, continuous) as rig:
        rig.runner.go.clear()
        for i in range(40):
            await rig.submit(f"j{i}", cost=200)
        await until(lambda: rig.runner.batches)
        await asyncio.sleep(0.8)  # longer than a fetch waits
        held = [each.lease.job.cost for each in rig.loop._waiting.values()]
        # A read takes up to eight jobs at once, so it may go over by that many.
        assert sum(held) <= rig.budget.full + 8 * 200
        assert all(each.payload.done() for each in rig.loop._waiting.values())
        rig.runner.go.set()
        assert {answer.status for answer in await rig.answers([f"j{i}" for i in range(40)])} == {"done"}
        assert max(len(batch) for batch in rig.runner.batches) == 5


async def test_canceled_and_expired_jobs_never_reach_the_model(redis: PrivateRedis, continuous: Tokenizer) -> None:
    async with rig_at(redis, continuous) as rig:
        rig.runner.go.clear()
        await rig.submit("first")
        await until(lambda: rig.runner.batches)
        await rig.submit("left")
        await rig.submit("late", timeout_s=0.3)
        await rig.submit("last")
        await until(lambda: len(rig.loop._waiting) == 3)
        await rig.client.cancel("left")
        assert (await rig.answers(["late"]))[0].status == "expired"
        rig.runner.go.set()
        assert {answer.status for answer in await rig.answers(["first", "last"])} == {"done"}
        assert rig.runner.batches == [["first"], ["last"]]
        await until(lambda: is_empty(rig))


async def is_empty(rig: Rig) -> bool:
    stats = (await rig.client.stats())[rig.pool]
    return stats.tokens == stats.items == stats.bytes == 0


async def test_a_forward_that_nobody_waits_for_ends_at_the_next_layer(
    redis: PrivateRedis, continuous: Tokenizer
) -> None:
    async with rig_at(redis, continuous) as rig:
        rig.runner.go.clear()
        await rig.submit("left")
        await until(lambda: rig.runner.batches)
        await rig.submit("next")
        await rig.client.cancel("left")
        await until(lambda: rig.model._is_abandoned)
        rig.runner.go.set()
        assert [answer.status for answer in await rig.answers(["next"])] == ["done"]
        assert rig.runner.ended == [("left", Abandoned), ("next", None)]
        await until(lambda: is_empty(rig))


async def test_a_forward_that_one_still_waits_for_goes_on(redis: PrivateRedis, continuous: Tokenizer) -> None:
    async with rig_at(redis, continuous) as rig:
        rig.runner.go.clear()
        await rig.submit("first")
        await until(lambda: rig.runner.batches)
        for name in ("left", "stays"):
            await rig.submit(name)
        await until(lambda: len(rig.loop._waiting) == 2)
        first, rig.runner.go = rig.runner.go, threading.Event()
        first.set()
        await until(lambda: rig.runner.batches == [["first"], ["left", "stays"]])
        await rig.client.cancel("left")
        await asyncio.sleep(LEASE_S)  # three heartbeats
        rig.runner.go.set()
        assert [answer.status for answer in await rig.answers(["stays"])] == ["done"]
        assert rig.runner.ended[1] == ("left", None)
        await until(lambda: is_empty(rig))


async def test_jobs_of_a_dead_worker_run_alone(redis: PrivateRedis, continuous: Tokenizer) -> None:
    client = QueueClient(redis.url)
    await client.start()
    rig = Rig(redis, continuous, client)
    dead = QueueConsumer(redis.url, "dead", [rig.pool], lease_s=LEASE_S)
    await dead.start([rig.card])
    await dead.set_ready(True)
    for name in ("a", "b", "c"):
        await rig.submit(name)
    leases = await dead.fetch(1024, 32)
    assert len(await dead.start_jobs(leases[:2])) == 2  # and then nothing more is heard of it
    await asyncio.sleep(LEASE_S)
    await rig.start()
    answers = await rig.answers(["a", "b", "c"])
    assert [(answer.status, answer.tries) for answer in answers] == [("done", 2), ("done", 2), ("done", 1)]
    assert sorted(rig.runner.batches) == [["a"], ["b"], ["c"]]
    # The dead one comes back with an answer: too late.
    assert not await dead.commit(leases[0], Answer(id="a", status="done", payload=b"late"))
    await rig.stop()
    await dead.close()
    await client.close()


async def test_a_stopping_worker_finishes_its_batch_and_gives_the_rest_back(
    redis: PrivateRedis, continuous: Tokenizer
) -> None:
    async with rig_at(redis, continuous) as rig:
        rig.runner.go.clear()
        await rig.submit("in-hand")
        await until(lambda: rig.runner.batches)
        for name in ("x", "y", "z"):
            await rig.submit(name)
        await until(lambda: len(rig.loop._waiting) == 3)
        assert await rig.stop() == EXIT_OK
        assert rig.runner.batches == [["in-hand"]]
        assert (await rig.answers(["in-hand"]))[0].status == "done"

        successor = Rig(redis, continuous, rig.client, "w2")
        await successor.start()
        answers = await successor.answers(["x", "y", "z"])
        assert [(answer.status, answer.tries) for answer in answers] == [("done", 1)] * 3
        assert await successor.stop() == EXIT_OK


async def test_a_job_without_its_input_is_lost_not_stuck(redis: PrivateRedis, continuous: Tokenizer) -> None:
    async with rig_at(redis, continuous) as rig:
        rig.runner.go.clear()
        await rig.submit("busy")
        await until(lambda: rig.runner.batches)
        await rig.stop()
        for name in ("gone", "there"):
            await rig.submit(name)
        await rig.client._redis.delete(*PoolKeys(rig.pool).inputs("gone", len(PAYLOAD)))
        successor = Rig(redis, continuous, rig.client, "w2")
        await successor.start()
        gone, there = await successor.answers(["gone", "there"])
        assert (gone.status, there.status) == ("lost", "done")
        await successor.stop()


async def test_a_lost_device_gives_the_jobs_to_others(redis: PrivateRedis, continuous: Tokenizer) -> None:
    async with rig_at(redis, continuous) as rig:
        rig.runner.fault = DeviceLostError("CUDA error: unspecified launch failure")
        await rig.submit("job")
        assert rig.task is not None
        assert await asyncio.wait_for(asyncio.shield(rig.task), 10) == EXIT_DEVICE
        await rig.stop()
        successor = Rig(redis, continuous, rig.client, "w2")
        await successor.start()
        [answer] = await successor.answers(["job"])
        assert (answer.status, answer.tries) == ("done", 2)
        await successor.stop()


async def test_a_redis_that_forgot_everything_is_joined_again(redis: PrivateRedis, continuous: Tokenizer) -> None:
    async with rig_at(redis, continuous) as rig:
        await rig.submit("before")
        assert (await rig.answers(["before"]))[0].status == "done"
        await asyncio.to_thread(redis.restart)
        await until(lambda: tried(rig, "after"))
        assert (await rig.answers(["after"]))[0].status == "done"


async def tried(rig: Rig, name: str) -> bool:
    from service.queue.jobs import QueueUnavailable, Refused

    try:
        await rig.submit(name)
    except (Refused, QueueUnavailable):
        return False
    return True


async def test_a_worker_without_a_redis_can_be_stopped(continuous: Tokenizer) -> None:
    server = PrivateRedis()
    server.start()
    url = server.url
    server.close()
    pool = pool_of(continuous.card())
    consumer = QueueConsumer(url, "w1", [pool])
    budget, speed, model = Budget(1024), Speed(1), ModelThread()
    loop = WorkerLoop(consumer, Runner({pool: continuous}, budget, speed), budget, speed, model)
    task = asyncio.create_task(loop.run([continuous.card()]))
    await asyncio.sleep(0.3)
    assert not task.done()
    loop.stop()
    assert await asyncio.wait_for(task, 5) == EXIT_OK
    await consumer.close()
    model.close()


async def test_a_stop_does_not_wait_for_ever(redis: PrivateRedis, continuous: Tokenizer) -> None:
    async with rig_at(redis, continuous) as rig:
        rig.loop.settings = LoopSettings(lease_s=LEASE_S, stop_s=0.3)
        rig.runner.go.clear()
        await rig.submit("hangs")
        await until(lambda: rig.runner.batches)
        rig.loop.stop()
        assert rig.task is not None
        assert await asyncio.wait_for(asyncio.shield(rig.task), 5) == EXIT_OK
        rig.runner.go.set()
        await rig.stop()
        successor = Rig(redis, continuous, rig.client, "w2")
        await successor.start()
        assert (await successor.answers(["hangs"]))[0].status == "done"
        await successor.stop()


async def test_the_model_thread_tells_how_long_it_has_not_moved(continuous: Tokenizer) -> None:
    model = ModelThread()
    assert model.stalled_s == 0
    go = threading.Event()
    stuck = asyncio.create_task(model.run(go.wait, 10))
    await asyncio.sleep(0.3)
    assert model.stalled_s >= 0.25
    go.set()
    await stuck
    assert model.stalled_s == 0
    seen: list[float] = []

    def work() -> None:
        time.sleep(0.3)
        from media.types import Image

        continuous.encode([Image(pixels=pattern(16, 16))])  # layers begin
        seen.append(model.stalled_s)

    await model.run(work)
    assert seen[0] < 0.25
    model.close()


async def test_a_fault_of_the_helpers_ends_the_worker(redis: PrivateRedis, continuous: Tokenizer) -> None:
    async with rig_at(redis, continuous) as rig:

        async def broken(leases: object) -> list[Any]:
            raise RuntimeError("bug")

        rig.consumer.beat = broken  # type: ignore[method-assign]
        assert rig.task is not None
        with pytest.raises(RuntimeError, match="bug"):
            await asyncio.wait_for(asyncio.shield(rig.task), 5)
        await rig.consumer.close()
        rig.model.close()
