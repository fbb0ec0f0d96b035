"""The traps of Redis Streams that the serving design lists (section 3.6), and what guards against each."""

import asyncio

import pytest

from service.queue.jobs import QueueUnavailable
from tests.service.queue.conftest import Queue, done


async def test_a_late_commit_is_refused_and_takes_its_output_along(queue: Queue) -> None:
    client, late, worker = await queue.client(), await queue.worker(), await queue.worker()
    job = queue.job()
    await client.submit(job, b"x")
    [old] = await late.start_jobs([await queue.take(late)])
    [new] = await worker.start_jobs([await queue.take(worker)])
    assert (old.fence, new.fence, new.tries) == (1, 2, 2)
    assert not await late.commit(old, done(old, b"late" * 10_000))  # while the new owner runs
    assert queue.blobs() == queue.keys.inputs(job.id, 1)
    assert await worker.commit(new, done(new, b"new!" * 10_000))
    assert not await late.commit(old, done(old, b"late" * 10_000))  # and after it is done
    assert (await client.wait(job.id)).payload == b"new!" * 10_000
    await queue.assert_empty()


async def test_a_late_commit_leaves_the_winners_unread_answer_alone(queue: Queue) -> None:
    client, late, worker = await queue.client(check_every_s=30.0), await queue.worker(), await queue.worker()
    job = queue.job()
    await client.submit(job, b"x")
    arrive, arrived = client._arrive, []
    client._arrive = lambda *entry: arrived.append(entry)  # type: ignore[method-assign] # a slow reader
    [old] = await late.start_jobs([await queue.take(late)])
    [new] = await worker.start_jobs([await queue.take(worker)])
    assert await worker.commit(new, done(new, b"new!" * 10_000))
    assert not await late.commit(old, done(old, b"late" * 10_000))
    async with asyncio.timeout(2):
        while not arrived:
            await asyncio.sleep(0.01)
    arrive(*arrived[0])
    assert (await client.wait(job.id)).payload == b"new!" * 10_000


async def test_a_late_worker_cannot_ack_the_new_owners_entry(queue: Queue) -> None:
    client, late, worker = await queue.client(), await queue.worker(), await queue.worker()
    job = queue.job()
    await client.submit(job, b"x")
    [old] = await late.start_jobs([await queue.take(late)])
    new = await queue.take(worker)
    await late.commit(old, done(old))
    assert await late.start_jobs([old]) == []
    await late.give_back([old])
    [entry] = queue.raw.xpending_range(queue.keys.queue(0), "w", "-", "+", 10)
    assert entry["consumer"].decode() == worker._me
    assert await worker.beat([new]) == []


async def test_a_late_heartbeat_does_not_steal_the_entry_back(queue: Queue) -> None:
    client, late, worker = await queue.client(), await queue.worker(), await queue.worker()
    await client.submit(queue.job(), b"x")
    old = await queue.take(late)
    new = await queue.take(worker)
    assert await late.beat([old]) == [old]
    [entry] = queue.raw.xpending_range(queue.keys.queue(0), "w", "-", "+", 10)
    assert entry["consumer"].decode() == worker._me
    assert await worker.beat([new]) == []


async def test_heartbeats_keep_a_long_job(queue: Queue) -> None:
    client, busy, idle = await queue.client(), await queue.worker(), await queue.worker()
    job = queue.job()
    await client.submit(job, b"x")
    [lease] = await busy.start_jobs([await queue.take(busy)])
    for _ in range(12):  # more than three leases
        await asyncio.sleep(queue.lease_s / 3)
        assert await busy.beat([lease]) == []
        assert await idle.fetch(100, 8, block_s=0) == []
    assert await busy.commit(lease, done(lease))
    assert (await client.wait(job.id)).tries == 1


async def test_an_ended_job_leaves_nothing_pending(queue: Queue) -> None:
    client, worker = await queue.client(), await queue.worker()
    for _ in range(3):
        await client.submit(queue.job(), b"x")
    leases = await worker.start_jobs(await worker.fetch(100, 8))
    await worker.commit(leases[0], done(leases[0]))
    assert queue.raw.xpending(queue.keys.queue(0), "w")["pending"] == 2
    await client.cancel(leases[1].job.id)
    await worker.commit(leases[1], done(leases[1]))
    await worker.commit(leases[2], done(leases[2]))
    await queue.assert_empty()


async def test_a_deleted_pending_entry_is_passed_over(queue: Queue) -> None:
    client, dead, worker = await queue.client(), await queue.worker(), await queue.worker()
    jobs = [queue.job(), queue.job()]
    for job in jobs:
        await client.submit(job, b"x")
    leases = [await queue.take(dead), await queue.take(dead)]
    queue.raw.xdel(queue.keys.queue(0), leases[0].stream_id)  # without XACK: pending until XAUTOCLAIM sees it
    assert (await queue.take(worker)).job.id == leases[1].job.id
    assert queue.raw.xpending(queue.keys.queue(0), "w")["pending"] == 1


async def test_the_job_stream_is_never_trimmed(queue: Queue) -> None:
    client = await queue.client()
    await queue.worker()
    for _ in range(300):
        await client.submit(queue.job(cost=1), b"")
    assert queue.raw.xlen(queue.keys.queue(0)) == 300


async def test_no_group_is_repaired_and_nothing_is_skipped(queue: Queue) -> None:
    client, worker = await queue.client(), await queue.worker()
    job = queue.job()
    await client.submit(job, b"x")
    queue.raw.xgroup_destroy(queue.keys.queue(0), "w")
    lease = await queue.take(worker)
    assert lease.job.id == job.id
    # Destroyed while the job is held: it comes again, with a new fence, and the old lease is worth nothing.
    queue.raw.xgroup_destroy(queue.keys.queue(0), "w")
    assert await worker.beat([lease]) == []
    again = await queue.take(worker)
    assert (again.job.id, again.fence) == (job.id, lease.fence + 1)
    assert not await worker.commit(lease, done(lease))
    [again] = await worker.start_jobs([again])
    assert await worker.commit(again, done(again))
    assert (await client.wait(job.id)).status == "done"
    await queue.assert_empty()


async def test_flushed_while_a_worker_blocks(queue: Queue) -> None:
    client, worker = await queue.client(), await queue.worker()
    fetching = asyncio.create_task(worker.fetch(100, 8, block_s=1.0))
    await asyncio.sleep(0.05)
    queue.raw.flushall()
    await fetching
    await asyncio.sleep(0.05)
    job = queue.job()
    await client.submit(job, b"x")
    assert (await queue.take(worker)).job.id == job.id


async def test_a_stale_entry_from_before_a_give_back_is_dropped(queue: Queue) -> None:
    client, worker = await queue.client(), await queue.worker()
    job = queue.job()
    await client.submit(job, b"x")
    fields = queue.raw.xrange(queue.keys.queue(0))[0][1]
    queue.raw.xadd(queue.keys.queue(0), fields)  # as a second delivery of the same job
    leases = await worker.fetch(100, 8)
    assert [lease.job.id for lease in leases] == [job.id]
    assert queue.raw.xlen(queue.keys.queue(0)) == 1


async def test_reap_repairs_counters_and_forgets_the_dead(queue: Queue) -> None:
    client, worker = await queue.client(), await queue.worker("alive")
    dead, holding = await queue.worker("dead"), await queue.worker("holding")
    await client.submit(queue.job(tenant="t", cost=7), b"x" * 100)
    await client.submit(queue.job(tenant="u", cost=5), b"x" * 100)
    await client.submit(queue.job(tenant="u", cost=5), b"x" * 100)
    await queue.take(holding)
    await dead.fetch(0, 1, block_s=0)
    queue.raw.xgroup_createconsumer(queue.keys.queue(0), "w", "dead")
    queue.raw.hset(queue.keys.counters, mapping={"tokens": 999, "bytes": -4, "items": 0, "t:nobody": 50})
    queue.raw.zadd(queue.keys.workers, {"dead": 1, "holding": 1})
    gone = queue.raw.xrange(queue.keys.queue(0))[-1][1][b"id"].decode()
    queue.raw.delete(queue.keys.job(gone))  # evicted by hand, long past its time
    queue.raw.hset(queue.keys.active, gone, "5 5 0 125 1 u")
    await worker.reap()
    assert (
        queue.counters()
        == queue.recount()
        == {
            **{"tokens": 12, "encode": 12, "bytes": 250, "items": 2},
            **{"t:t": 7, "t:u": 5},
        }
    )
    names = {c["name"].decode() for c in queue.raw.xinfo_consumers(queue.keys.queue(0), "w")}
    assert "dead" not in names
    assert "holding" in names  # its pending entry would be lost with it
    assert queue.raw.zrange(queue.keys.workers, 0, -1) == [b"alive"]
    queue.raw.hset(queue.keys.counters, "tokens", 999)
    await worker.reap()  # the lock holds for a while...
    assert queue.counters()["tokens"] == 999
    assert 0 < queue.raw.pttl(queue.keys.reap_lock) <= 4000  # ... and never for ever


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random"])
async def test_an_evicting_server_is_refused(queue: Queue, policy: str) -> None:
    queue.raw.config_set("maxmemory-policy", policy)
    with pytest.raises(QueueUnavailable, match="set it to noeviction"):
        await queue.client()
    with pytest.raises(QueueUnavailable, match="set it to noeviction"):
        await queue.worker()


async def test_a_server_that_may_evict_is_warned_about(queue: Queue, caplog: pytest.LogCaptureFixture) -> None:
    queue.raw.config_set("maxmemory-policy", "volatile-lru")
    await queue.client()
    assert "a full server drops accepted jobs" in caplog.text
