"""What is refused, with which numbers, and that a refusal leaves nothing behind."""

import os
from dataclasses import replace
from typing import Any

import pytest

from service.queue.client import QueueClient
from service.queue.consumer import QueueConsumer
from service.queue.estimate import Load, Rates, Work
from service.queue.jobs import Refused
from tests.service.queue.conftest import MAXMEMORY, Queue, done


async def refused(client: Any, job: Any, payload: bytes = b"x") -> Refused:
    with pytest.raises(Refused) as caught:
        await client.submit(job, payload)
    assert caught.value.retry_after >= 1
    return caught.value


async def report(client: QueueClient, worker: QueueConsumer, rates: Rates) -> None:
    await worker.report(Queue.pool, rates)
    await worker.beat([])
    await client._registry.refresh()


@pytest.mark.parametrize("size", [10, 300_000])  # below and above the size that is looked at before it is sent
@pytest.mark.parametrize(
    ("limits", "limit", "actual"),
    [({"tokens": 25}, 25, 30), ({"items": 2}, 2, 3), ({"payload_bytes": 1_000_000}, 1_000_000, None)],
)
async def test_each_limit(queue: Queue, size: int, limits: dict[str, int], limit: int, actual: int | None) -> None:
    if "payload_bytes" in limits:
        size = 300_000
    client = await queue.client(**limits)
    await queue.worker()
    admitted = [queue.job(), queue.job()]
    for job in admitted:
        await client.submit(job, b"x" * size)
    refusal = await refused(client, queue.job(), b"x" * size)
    assert (refusal.code, refusal.limit) == ("queue_full", limit)
    assert refusal.actual == (actual or 3 * 375_000)
    assert queue.counters()["items"] == 2
    assert len(queue.blobs()) == 2
    for job in admitted:
        await client.cancel(job.id)
    await queue.assert_empty()


async def test_a_limit_follows_the_workers_rate(queue: Queue) -> None:
    client = await queue.client(floor_tokens=50, queue_seconds=2.0)
    worker = await queue.worker()
    await client.submit(queue.job(cost=199), b"x")  # an empty queue takes anything
    assert (await refused(client, queue.job(cost=1))).limit == 50
    await report(client, worker, Rates(encode=100.0))
    refusal = await refused(client, queue.job(cost=199))
    assert (refusal.limit, refusal.actual) == (200, 398)
    # (199 + 199 - 0.8 * 200) tokens at 100 a second, and up to 20 % more.
    assert 2.38 <= refusal.retry_after <= 2.38 * 1.2


async def test_a_wait_longer_than_the_deadline_is_refused_at_once(queue: Queue) -> None:
    client = await queue.client(tokens=10_000)
    worker = await queue.worker()
    await report(client, worker, Rates(encode=100.0))
    await client.submit(queue.job(cost=1000, seconds=1.0), b"x")  # an empty queue takes anything
    refusal = await refused(client, queue.job(seconds=5.0))
    assert (refusal.code, refusal.limit, refusal.actual) == ("would_miss_deadline", 5.0, 10.1)
    assert 5.0 <= refusal.retry_after <= 5.2 * 1.2
    await client.submit(queue.job(seconds=20.0), b"x")
    # Its own time counts, too: 10.1 s of others and at least 1500 / 100 / 1.5 of its own.
    assert (await refused(client, queue.job(cost=1500, seconds=20.0))).code == "would_miss_deadline"
    await client.submit(queue.job(cost=1500, seconds=21.0), b"x")


async def test_each_operation_counts_at_its_own_speed(queue: Queue) -> None:
    """A decode of few tokens may be most of the queue."""
    client = await queue.client(floor_tokens=10, queue_seconds=60.0)
    worker = await queue.worker()
    await report(client, worker, Rates(encode=1000.0, decode=10.0))
    encode, decode = queue.job(cost=1000), queue.job(op="decode", cost=100)
    both = queue.job(cost=50, options={"outputs": ["reconstruction"]})
    for job in (encode, decode, both):
        await client.submit(job, b"x")
    load = (await client.stats())[queue.pool]
    assert (load.tokens, load.work) == (1150, Work(encode=1050, decode=150))
    assert load.wait_s == pytest.approx(1.05 + 15.0)
    refusal = await refused(client, queue.job(seconds=16.0))
    assert (refusal.code, refusal.actual) == ("would_miss_deadline", 16.1)
    await client.submit(queue.job(seconds=17.0), b"x")
    # 60 s at the mix that would then wait: 1060 tokens to encode, 650 to decode.
    refusal = await refused(client, queue.job(op="decode", cost=500, seconds=100.0))
    assert (refusal.code, refusal.limit, refusal.actual) == ("queue_full", int(1660 * 60 / 66.06), 1660)
    await client.submit(queue.job(op="decode", cost=430, seconds=100.0), b"x")
    await worker.reap()  # counts anew
    assert (await client.stats())[queue.pool].work == Work(encode=1060, decode=580)
    queue.raw.delete(queue.keys.reap_lock)
    for job in (encode, decode, both):
        await client.cancel(job.id)
    assert (await client.stats())[queue.pool].work == Work(encode=10, decode=430)


async def test_two_workers_halve_the_wait_but_not_the_job(queue: Queue) -> None:
    client = await queue.client()
    for name in ("one", "two"):
        await report(client, await queue.worker(name), Rates(encode=100.0))
    await client.submit(queue.job(cost=1000), b"x")
    load = (await client.stats())[queue.pool]
    assert (load.wait_s, load.fastest) == (5.0, Rates(encode=100.0))
    # 5 s of others by both, then at least 900 / 100 / 1.5 s by one.
    refusal = await refused(client, queue.job(cost=900, seconds=10.5))
    assert (refusal.code, refusal.actual) == ("would_miss_deadline", 11.0)
    await client.submit(queue.job(cost=900, seconds=11.5), b"x")


async def test_a_deadline_that_has_passed_is_an_answer_not_a_refusal(queue: Queue) -> None:
    client = await queue.client()
    await queue.worker()
    job = queue.job(seconds=-1.0)
    await client.submit(job, b"x")
    answer = await client.wait(job.id)
    assert (answer.status, answer.code) == ("expired", "deadline_exceeded")
    await queue.assert_empty()


async def test_tenants_share(queue: Queue) -> None:
    client = await queue.client(tokens=120, tenant_share=0.25)
    await queue.worker()

    async def fill(tenant: str) -> tuple[int, Refused]:
        for taken in range(100):
            try:
                await client.submit(queue.job(tenant=tenant), b"x")
            except Refused as refusal:
                return taken * 10, refusal
        raise AssertionError("never refused")

    # Alone: half, so that there is room for a newcomer. Then a third, and never less than a quarter.
    taken, refusal = await fill("a")
    assert (taken, refusal.code, refusal.limit, refusal.actual) == (60, "queue_full", 60, 70)
    taken, refusal = await fill("b")
    assert (taken, refusal.code, refusal.limit) == (40, "queue_full", 40)
    taken, refusal = await fill("c")
    assert (taken, refusal.code, refusal.limit) == (20, "queue_full", 120)


async def test_without_keys_nobody_has_a_share(queue: Queue) -> None:
    client = await queue.client(tokens=100)
    await queue.worker()
    for _ in range(10):
        await client.submit(queue.job(), b"x")
    assert (await refused(client, queue.job())).code == "queue_full"


async def test_no_worker_no_admission(queue: Queue) -> None:
    client = await queue.client(worker_silent_s=0.3)
    assert (await refused(client, queue.job())).code == "no_worker"
    worker = await queue.worker(ready=False)
    refusal = await refused(client, queue.job())
    assert (refusal.code, refusal.retry_after) == ("no_worker", 10.0)
    await worker.set_ready(True)
    job = queue.job()
    await client.submit(job, b"x")
    [lease] = await worker.start_jobs([await queue.take(worker)])
    await worker.commit(lease, done(lease))
    assert (await client.wait(job.id)).status == "done"
    await worker.close()  # says goodbye
    await client._registry.refresh()
    assert (await refused(client, queue.job())).code == "no_worker"


async def test_a_job_whose_last_worker_went_is_told_so_at_its_deadline(queue: Queue) -> None:
    client, worker = await queue.client(), await queue.worker()
    job = queue.job(seconds=1.0)
    await client.submit(job, b"x")
    await worker.close()  # says goodbye
    answer = await client.wait(job.id)
    assert (answer.status, answer.code) == ("failed", "no_worker")


async def test_a_full_server_refuses_and_drains(queue: Queue) -> None:
    """maxmemory: submit says so and leaves nothing; everything that empties the queue still works."""
    client, worker = await queue.client(), await queue.worker()
    jobs = [queue.job() for _ in range(3)]
    for job in jobs:
        await client.submit(job, os.urandom(1_000_000))
    queue.raw.config_set("maxmemory", 1_000_000)
    for size in (10, 300_000):
        refusal = await refused(client, queue.job(), b"x" * size)
        assert refusal.code == "queue_full_memory"
    assert len(queue.blobs()) == 3
    # cancel one, fail to store a large answer, commit a small one
    await client.cancel(jobs[0].id)
    [large] = await worker.start_jobs([await queue.take(worker)])
    await worker.set_ready(True)
    assert await worker.beat([large]) == []
    assert await worker.commit(large, done(large, b"z" * 300_000))
    answer = await client.wait(large.job.id)
    assert (answer.status, answer.code, answer.payload) == ("failed", "queue_full_memory", None)
    [small] = await worker.start_jobs([await queue.take(worker)])
    assert await worker.commit(small, done(small, b"z" * 100))
    assert (await client.wait(small.job.id)).payload == b"z" * 100
    queue.raw.config_set("maxmemory", MAXMEMORY)
    await queue.assert_empty()


async def test_freed_inputs_make_room_for_the_answer(queue: Queue) -> None:
    client, worker = await queue.client(), await queue.worker()
    job = queue.job()
    await client.submit(job, os.urandom(3_000_000))
    [lease] = await worker.start_jobs([await queue.take(worker)])
    queue.raw.config_set("maxmemory", int(queue.raw.info("memory")["used_memory"]) - 500_000)
    assert await worker.commit(lease, done(lease, b"z" * 1_000_000))
    assert (await client.wait(job.id)).payload == b"z" * 1_000_000
    await queue.assert_empty()


async def test_a_late_worker_cannot_free_the_inputs_of_the_new_one(queue: Queue) -> None:
    client, late, worker = await queue.client(), await queue.worker(), await queue.worker()
    await client.submit(queue.job(), b"x" * 3_000_000)
    [old] = await late.start_jobs([await queue.take(late)])
    lease = await queue.take(worker)
    assert lease.job.id == old.job.id
    queue.raw.config_set("maxmemory", 1_000_000)
    assert not await late.commit(old, done(old, b"z" * 100_000))
    queue.raw.config_set("maxmemory", MAXMEMORY)
    assert await worker.load(lease) == b"x" * 3_000_000
    assert len(queue.blobs()) == 1


async def test_the_servers_memory_bounds_the_payloads(queue: Queue) -> None:
    queue.raw.config_set("maxmemory", 20_000_000)
    client = await queue.client()
    await queue.worker()
    await client.submit(queue.job(), b"x" * 6_000_000)
    refusal = await refused(client, queue.job(), b"x" * 6_000_000)
    assert (refusal.code, refusal.limit, refusal.actual) == ("queue_full", 10_000_000, 15_000_000)


async def test_models_workers_and_stats(queue: Queue) -> None:
    client = await queue.client()
    assert await client.models() == []
    assert await client.stats() == {}
    first, second = await queue.worker("first"), await queue.worker("second", ready=False)
    assert await client.models() == [queue.card]
    await second.start([queue.card | {"max_item_tokens": 500}])
    await second.set_ready(True)
    await report(client, first, Rates(encode=100.0, decode=40.0))
    assert await client.models() == [queue.card | {"max_item_tokens": 500}]
    assert [(w.id, w.ready, w.rates, w.pool) for w in await client.workers()] == [
        ("first", True, Rates(encode=100.0, decode=40.0), queue.pool),
        ("second", True, Rates(), queue.pool),
    ]
    await client.submit(queue.job(cost=30), b"x" * 100)
    load = (await client.stats())[queue.pool]
    assert 0 <= load.oldest_s < 5
    rates = Rates(encode=100.0, decode=40.0)
    assert replace(load, oldest_s=0.0) == Load(
        tokens=30, bytes=125, items=1, work=Work(encode=30), workers=2, rates=rates, fastest=rates
    )
    assert 0 < await client.ping() < 1000


async def test_cards_must_fit_the_pools(queue: Queue) -> None:
    worker = await queue.worker()
    with pytest.raises(ValueError, match="cards for the pools"):
        await worker.start([queue.card | {"name": "other"}])


async def test_a_worker_can_join_a_full_server(queue: Queue) -> None:
    """Else nobody would be there to empty it after a restart of the workers."""
    client, first = await queue.client(), await queue.worker()
    job = queue.job()
    await client.submit(job, b"x" * 3_000_000)
    await first.close()
    queue.raw.xgroup_destroy(queue.keys.queue(0), "w")
    queue.raw.config_set("maxmemory", 1_000_000)
    worker = await queue.worker()
    [lease] = await worker.start_jobs([await queue.take(worker)])
    assert await worker.commit(lease, done(lease))
    assert (await client.wait(job.id)).status == "done"
    queue.raw.config_set("maxmemory", MAXMEMORY)
    await queue.assert_empty()
