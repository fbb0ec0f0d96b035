"""Workers that die, clients that hang up, a Redis that stops, dies, forgets: every accepted job ends, once."""

import asyncio
import dataclasses
import logging
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from service.queue.client import QueueClient
from service.queue.consumer import QueueConsumer
from service.queue.jobs import Answer, Lease, QueueLimits, QueueUnavailable, Refused
from service.queue.server import PrivateRedis
from tests.service.queue.conftest import Queue, done


@asynccontextmanager
async def serving(queue: Queue, *workers: QueueConsumer, pause_s: float = 0.0) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(queue.serve(worker, pause_s=pause_s)) for worker in workers]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_two_workers_one_dies_in_the_middle(queue: Queue) -> None:
    """300 jobs; all are answered, none twice, and the dead worker's answers, sent late, count for nothing."""
    client = await queue.client()
    survivor, victim = await queue.worker("survivor"), await queue.worker("victim")
    delivered: Counter[str] = Counter()
    hand_over = client._hand_over

    def count(entry, fields, payload):  # type: ignore[no-untyped-def]
        delivered[entry.job.id] += 1
        hand_over(entry, fields, payload)

    client._hand_over = count  # type: ignore[method-assign]
    jobs = {queue.job().id: os.urandom(random.choice([10, 1000, 30_000])) for _ in range(300)}
    held: list[Lease] = []

    async def die_in_the_middle() -> None:
        for _ in range(10):
            leases = await victim.start_jobs(await victim.fetch(80, 8))
            for lease in leases[:-1]:
                await victim.commit(lease, done(lease, (await victim.load(lease))[::-1]))
            held.extend(leases[-1:])
            await victim.beat(held)
        held.extend(await victim.start_jobs(await victim.fetch(80, 8)))  # ... and no more heartbeats

    async def ask(job_id: str, payload: bytes) -> Answer:
        await client.submit(queue.job(id=job_id), payload)
        return await client.wait(job_id)

    async with serving(queue, survivor):
        dying = asyncio.create_task(die_in_the_middle())
        answers = await asyncio.gather(*(ask(*item) for item in jobs.items()))
        await dying
    late = [await victim.commit(lease, done(lease, b"late")) for lease in held]
    assert len(held) > 5
    assert not any(late)
    assert all(a.status == "done" and a.payload == jobs[a.id][::-1] for a in answers)
    assert {a.id for a in answers} == set(jobs)
    assert set(delivered.values()) == {1}
    assert len(delivered) == 300
    assert sum(a.tries == 2 for a in answers) >= len(held) - 1
    await asyncio.sleep(0.05)
    await queue.assert_empty()
    assert client._entries == {}


async def test_who_inherits_a_name_takes_what_the_dead_one_held_at_once(queue: Queue) -> None:
    client = await queue.client()
    dead, other = await queue.worker("one", lease_s=3600), await queue.worker("other", lease_s=3600)
    jobs = [queue.job() for _ in range(5)]
    for job in jobs:
        await client.submit(job, b"abc")
    started = await dead.start_jobs((await dead.fetch(10**6, 3))[:1])
    theirs = await other.fetch(10**6, 9)
    await dead.commit(started[0], done(started[0]))

    heir = await queue.worker("one", lease_s=3600, inherits=True)
    taken = await heir.fetch(10**6, 1, block_s=0)
    assert {lease.job.id for lease in taken} == {job.id for job in jobs} - {each.job.id for each in (*started, *theirs)}
    assert len(taken) == 2
    assert not await heir.beat(taken)
    for worker, leases in ((heir, taken), (other, theirs)):
        for lease in await worker.start_jobs(leases):
            assert await worker.commit(lease, done(lease))
    assert await heir.fetch(10**6, 9, block_s=0) == []
    for job in jobs:
        assert (await client.wait(job.id)).status == "done"
    await queue.assert_empty()


async def test_cancel_storm(queue: Queue) -> None:
    """200 requests are cancelled at random moments of submit and wait: counters return to zero, nothing is left."""
    client, worker = await queue.client(), await queue.worker()
    rng = random.Random(5)

    async def request(number: int) -> str:
        job = queue.job(tenant=f"t{number % 3}", cost=1)
        payload = bytes([number % 256]) * rng.choice([10, 20_000, 200_000])
        await client.submit(job, payload)
        try:
            answer = await client.wait(job.id)
        except asyncio.CancelledError:
            await client.cancel(job.id)
            raise
        assert answer.status == "done"
        assert answer.payload == payload[::-1]  # never somebody else's
        return "answered"

    async with serving(queue, worker):
        tasks = []
        for number in range(300):
            task = asyncio.create_task(request(number))
            tasks.append(task)
            if number % 3:
                asyncio.get_running_loop().call_later(rng.uniform(0, 0.1), task.cancel)
            if number % 20 == 0:
                await asyncio.sleep(0.01)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [r for r in results if not isinstance(r, asyncio.CancelledError | str)] == []
        assert results.count("answered") >= 100
        async with asyncio.timeout(5):
            while queue.counters() or queue.blobs() or client._entries or len(client._tasks._tasks) > 2:
                await asyncio.sleep(0.02)  # two tasks stay: the reader and the housekeeping
    await queue.assert_empty()


async def test_a_wait_that_is_cancelled_leaks_no_future(queue: Queue) -> None:
    client, worker = await queue.client(), await queue.worker()
    answered, unanswered = queue.job(), queue.job(seconds=0.2)
    for job in (answered, unanswered):
        await client.submit(job, b"x")
        waiting = asyncio.create_task(client.wait(job.id))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    lease = await queue.take(worker)
    assert lease.job.id == answered.id
    [lease] = await worker.start_jobs([lease])
    await worker.commit(lease, done(lease))
    await asyncio.sleep(0.05)
    assert set(client._entries) == {unanswered.id}
    entry = client._entries[unanswered.id]
    entry.job = dataclasses.replace(entry.job, deadline=time.time() - 10)  # long past
    await asyncio.sleep(0.3)
    assert client._entries == {}


async def test_no_redis_is_said_at_once_and_comes_back(own_server: PrivateRedis) -> None:
    queue = Queue(own_server.url)
    own_server.process.kill()
    own_server.process.wait()
    client = await queue.client()  # starts anyway
    began = time.monotonic()
    with pytest.raises(QueueUnavailable):
        await client.submit(queue.job(), b"x")
    with pytest.raises(QueueUnavailable, match=r"does not answer: Error \d+ connecting to /.*/sock") as error:
        await client.ping()
    assert str(own_server.url).split("@")[0].rpartition(":")[2] not in str(error.value), "the password"
    with pytest.raises(QueueUnavailable):
        await client.stats()
    assert time.monotonic() - began < 1
    own_server.restart()
    worker = await queue.worker()
    async with serving(queue, worker):
        job = queue.job()
        await client.submit(job, b"abc")
        assert (await client.wait(job.id)).payload == b"cba"
    await queue.close()


async def test_a_frozen_redis_is_said_within_the_timeout(own_server: PrivateRedis) -> None:
    queue = Queue(own_server.url)
    worker = await queue.worker()
    client = QueueClient(own_server.url, QueueLimits(lease_s=0.1), timeout_s=0.3)
    await client.start()
    own_server.process.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(QueueUnavailable):
            await client.submit(queue.job(), b"x" * 200_000)
        assert time.monotonic() - began < 2
    finally:
        own_server.process.send_signal(signal.SIGCONT)
    async with serving(queue, worker):
        job = queue.job()
        async with asyncio.timeout(5):
            while True:
                try:
                    await client.submit(job, b"abc")
                    break
                except QueueUnavailable:
                    await asyncio.sleep(0.05)
            assert (await client.wait(job.id)).payload == b"cba"
    await client.close()
    await queue.close()


async def test_a_redis_that_restarts_empty_loses_nobody(fragile: Queue, own_server: PrivateRedis) -> None:
    """Queued, held and running jobs are answered `lost` soon; workers join again and serve."""
    client, worker = await fragile.client(check_every_s=0.2), await fragile.worker()
    jobs = [fragile.job() for _ in range(6)]
    for job in jobs:
        await client.submit(job, b"x" * 100_000)
    leases = await worker.fetch(30, 3)
    running = await worker.start_jobs(leases[:1])
    waiting = [asyncio.create_task(client.wait(job.id)) for job in jobs]
    await asyncio.sleep(0.05)
    own_server.restart()
    began = time.monotonic()
    answers = await asyncio.gather(*waiting)
    assert {(a.status, a.code, a.detail) for a in answers} == {("lost", "job_lost", "Redis no longer knows the job")}
    assert time.monotonic() - began < 3
    assert await worker.beat(leases) == leases
    assert not await worker.commit(running[0], done(running[0], b"z" * 50_000))
    assert await worker.start_jobs(leases[1:]) == []
    async with serving(fragile, worker):
        job = fragile.job()
        await client.submit(job, b"abc")
        assert (await client.wait(job.id)).payload == b"cba"
    await fragile.assert_empty()


async def test_a_flushed_redis_is_noticed_without_a_lost_connection(queue: Queue) -> None:
    client, _ = await queue.client(), await queue.worker()
    job = queue.job()
    await client.submit(job, b"x")
    queue.raw.flushall()
    assert (await client.wait(job.id)).status == "lost"


async def test_a_trimmed_answer_is_noticed(queue: Queue) -> None:
    client, worker = await queue.client(), await queue.worker()
    job = queue.job()
    await client.submit(job, b"x")
    client._readers[queue.pool].cancel()  # this process reads nothing while the answer's time runs out
    [lease] = await worker.start_jobs([await queue.take(worker)])
    await worker.commit(lease, done(lease))
    answer = await client.wait(job.id)
    assert (answer.status, answer.code) == ("lost", "job_lost")


async def test_answers_wait_for_redis(fragile: Queue, own_server: PrivateRedis) -> None:
    """A commit while Redis is away is kept; it is delivered when Redis is back with its data (here: only frozen)."""
    client = await fragile.client()
    worker = await fragile.worker(timeout_s=0.2)
    job = fragile.job()
    await client.submit(job, b"x")
    [lease] = await worker.start_jobs([await fragile.take(worker)])
    own_server.process.send_signal(signal.SIGSTOP)
    try:
        commit = asyncio.create_task(worker.commit(lease, done(lease, b"z" * 50_000)))
        fetch = asyncio.create_task(worker.fetch(10, 1))
        assert await worker.beat([lease]) == []
        await asyncio.sleep(0.3)
        assert not commit.done()
    finally:
        own_server.process.send_signal(signal.SIGCONT)
    assert await commit
    assert await fetch == []
    assert (await client.wait(job.id)).payload == b"z" * 50_000
    await fragile.assert_empty()


async def test_killed_connections_are_replaced(queue: Queue) -> None:
    client, worker = await queue.client(), await queue.worker()
    async with serving(queue, worker):
        for round_ in range(5):
            jobs = [queue.job() for _ in range(10)]
            asked = []
            for job in jobs:
                try:
                    await client.submit(job, b"abc" * 1000)
                    asked.append(job)
                except QueueUnavailable:
                    pass
            if round_ < 4:
                queue.raw.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            answers = await asyncio.gather(*(client.wait(job.id) for job in asked))
            assert {a.status for a in answers} == {"done"}
        assert len(asked) == 10
    async with asyncio.timeout(5):
        while queue.counters():
            await worker.fetch(1000, 8, block_s=0.02)
            await asyncio.sleep(0.05)


async def test_overload_refuses_and_answers_what_it_took(queue: Queue) -> None:
    client, worker = await queue.client(tokens=100), await queue.worker()
    results: Counter[str] = Counter()

    async def ask() -> None:
        job = queue.job()
        try:
            await client.submit(job, b"x" * 100)
        except Refused as refusal:
            results[refusal.code] += 1
        else:
            results[(await client.wait(job.id)).status] += 1

    async with serving(queue, worker, pause_s=0.002):
        await asyncio.gather(*(ask() for _ in range(200)))
    assert set(results) == {"done", "queue_full"}
    assert results["done"] >= 10
    await queue.assert_empty()


async def test_close_ends_open_waits_and_says_why(queue: Queue) -> None:
    client, _ = await queue.client(), await queue.worker()
    job = queue.job()
    await client.submit(job, b"x")
    waiting = asyncio.create_task(client.wait(job.id))
    await asyncio.sleep(0.02)
    await client.close()
    assert (await waiting).code == "shutting_down"
    with pytest.raises(QueueUnavailable, match="closed"):
        await client.submit(queue.job(), b"x")


async def test_a_worker_waits_for_its_redis(own_server: PrivateRedis, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    queue = Queue(own_server.url)
    own_server.process.kill()
    own_server.process.wait()
    starting = asyncio.create_task(queue.worker())
    await asyncio.sleep(0.2)
    assert not starting.done()
    own_server.restart()
    await starting
    assert "does not answer" in caplog.text
    await queue.close()


async def test_a_replayed_answer_is_read_once(queue: Queue) -> None:
    """After a reconnect the reader starts again: what it sees twice must not end as a lost answer."""
    client, worker = await queue.client(), await queue.worker()
    job = queue.job()
    await client.submit(job, b"x")
    arrive = client._arrive

    def twice(pool: str, fields: dict[str, bytes]) -> None:
        arrive(pool, fields)
        arrive(pool, fields)

    client._arrive = twice  # type: ignore[method-assign]
    [lease] = await worker.start_jobs([await queue.take(worker)])
    await worker.commit(lease, done(lease, b"z" * 5_000_000))
    assert (await client.wait(job.id)).payload == b"z" * 5_000_000


async def test_an_unreadable_answer_stops_no_other(queue: Queue) -> None:
    client, worker = await queue.client(), await queue.worker()
    async with serving(queue, worker):
        job = queue.job()
        await client.submit(job, b"abc")
        await client.wait(job.id)
        queue.raw.xadd(queue.keys.results(client._api), {"nonsense": 1})
        job = queue.job()
        await client.submit(job, b"abc")
        assert (await client.wait(job.id)).payload == b"cba"
