"""The normal life of a job, from submit to its answer, and the ways in which it ends early."""

import asyncio
import os
import time

import pytest

from service.queue import blobs
from service.queue.jobs import Answer, PayloadLost
from tests.service.queue.conftest import Queue, done


@pytest.mark.parametrize("size_in", [0, 1, 200_000, blobs.PIECE_BYTES, 9_000_000])
@pytest.mark.parametrize("size_out", [0, blobs.INLINE_BYTES, blobs.INLINE_BYTES + 1, 9_000_000])
async def test_payloads_of_every_size_arrive(queue: Queue, size_in: int, size_out: int) -> None:
    client, worker = await queue.client(), await queue.worker()
    payload, result = os.urandom(size_in), os.urandom(size_out)
    job = queue.job(options={"outputs": ["latents"], "seed": None}, request_id="r-1", tenant="t1", lane=1, op="embed")
    await client.submit(job, memoryview(payload))
    lease = await queue.take(worker)
    assert (lease.job.id, lease.job.op, lease.job.cost, lease.job.tenant) == (job.id, "embed", 10, "t1")
    assert (lease.job.options, lease.job.request_id, lease.job.lane) == (job.options, "r-1", 1)
    assert (lease.fence, lease.tries, lease.alone, lease.payload_bytes) == (1, 0, False, size_in)
    assert lease.job.deadline == pytest.approx(job.deadline, abs=0.5)
    assert lease.enqueued == pytest.approx(time.time(), abs=5)
    [started] = await worker.start_jobs([lease])
    assert started.tries == 1
    assert await worker.load(started) == payload
    assert await worker.commit(started, done(started, result))
    answer = await client.wait(job.id)
    assert (answer.status, answer.payload, answer.tries) == ("done", result, 1)
    assert answer.timings["model"] == 1.5
    assert 0 <= answer.timings["queue"] < 5000
    await asyncio.sleep(0.02)
    await queue.assert_empty()


async def test_a_failed_job_tells_why(queue: Queue) -> None:
    client, worker = await queue.client(), await queue.worker()
    job = queue.job()
    await client.submit(job, b"x")
    [lease] = await worker.start_jobs([await queue.take(worker)])
    await worker.commit(lease, Answer(id=job.id, status="failed", code="internal", detail="out of paper"))
    answer = await client.wait(job.id)
    assert (answer.status, answer.code, answer.detail, answer.payload) == ("failed", "internal", "out of paper", None)
    await queue.assert_empty()


async def test_wait_knows_only_what_was_submitted_and_not_yet_taken(queue: Queue) -> None:
    client, worker = await queue.client(), await queue.worker()
    with pytest.raises(KeyError):
        await client.wait("nobody")
    job = queue.job()
    await client.submit(job, b"x")
    with pytest.raises(ValueError, match="already submitted"):
        await client.submit(job, b"x")
    [lease] = await worker.start_jobs([await queue.take(worker)])
    await worker.commit(lease, done(lease))
    assert (await client.wait(job.id)).status == "done"
    with pytest.raises(KeyError):
        await client.wait(job.id)


@pytest.mark.parametrize("bad", [{"cost": 0}, {"lane": 2}, {"tenant": "a b"}, {"id": "a:b"}, {"pool": "a{b}"}])
async def test_bad_jobs_are_refused_by_name(queue: Queue, bad: dict[str, object]) -> None:
    client = await queue.client()
    with pytest.raises(ValueError, match=r"lane in|must be 1 to 200"):
        await client.submit(queue.job(**bad), b"x")
    assert client._entries == {}


async def test_a_repeated_submit_is_one_job(queue: Queue) -> None:
    client, worker = await queue.client(), await queue.worker()
    job = queue.job()
    await client.submit(job, b"x" * 100_000)
    client._forget(client._entries[job.id])  # as if the reply had been lost
    await client.submit(job, b"x" * 100_000)
    assert queue.counters()["items"] == 1
    [lease] = await worker.start_jobs([await queue.take(worker)])
    assert await worker.fetch(1000, 8, block_s=0) == []
    await worker.commit(lease, done(lease))
    assert (await client.wait(job.id)).status == "done"
    # Also after its end, and then without leaving its input behind.
    task = asyncio.create_task(client.submit(job, b"x" * 100_000))
    await task
    await client.cancel(job.id)
    await queue.assert_empty()


async def test_cancel_while_queued(queue: Queue) -> None:
    client, worker = await queue.client(), await queue.worker()
    job = queue.job()
    await client.submit(job, b"x" * 100_000)
    waiting = asyncio.create_task(client.wait(job.id))
    await asyncio.sleep(0)
    await client.cancel(job.id)
    assert (await waiting).status == "canceled"
    await queue.assert_empty()
    assert await worker.fetch(1000, 8, block_s=0) == []
    await client.cancel(job.id)  # again, and unknown ids: nothing happens
    await client.cancel("nobody")


async def test_cancel_after_begin_leaves_the_job_out_of_the_forward(queue: Queue) -> None:
    client, worker = await queue.client(), await queue.worker()
    job, other = queue.job(), queue.job()
    await client.submit(job, b"x")
    await client.submit(other, b"y")
    leases = [await queue.take(worker), await queue.take(worker)]
    await client.cancel(job.id)
    assert [lease.job.id for lease in await worker.start_jobs(leases)] == [other.id]
    assert queue.counters()["items"] == 1


async def test_cancel_during_the_forward_drops_the_answer(queue: Queue) -> None:
    client, worker = await queue.client(), await queue.worker()
    job = queue.job()
    await client.submit(job, b"x")
    [lease] = await worker.start_jobs([await queue.take(worker)])
    await client.cancel(job.id)
    assert not await worker.commit(lease, done(lease, b"z" * 100_000))
    await queue.assert_empty()
    assert client._entries == {}


async def test_cancel_while_a_dead_worker_had_it(queue: Queue) -> None:
    client, dead, worker = await queue.client(), await queue.worker(), await queue.worker()
    job = queue.job()
    await client.submit(job, b"x")
    await queue.take(dead)
    await client.cancel(job.id)
    await asyncio.sleep(queue.lease_s * 1.2)
    assert await worker.fetch(1000, 8, block_s=0) == []
    await queue.assert_empty()


async def test_deadline_in_the_queue_with_no_worker_reading(queue: Queue) -> None:
    client = await queue.client()
    await queue.worker()
    job = queue.job(seconds=0.1)
    await client.submit(job, b"x" * 100_000)
    answer = await client.wait(job.id)
    assert (answer.status, answer.code) == ("expired", "deadline_exceeded")
    await queue.assert_empty()


async def test_deadline_at_begin_and_at_start(queue: Queue) -> None:
    client, worker = await queue.client(), await queue.worker()
    begun, queued = queue.job(seconds=0.15), queue.job(seconds=0.15)
    await client.submit(begun, b"x")
    lease = await queue.take(worker)
    await client.submit(queued, b"x")
    await asyncio.sleep(0.2)
    assert await worker.start_jobs([lease]) == []
    assert await worker.fetch(1000, 8, block_s=0) == []
    for job in (begun, queued):
        assert (await client.wait(job.id)).status == "expired"
    await queue.assert_empty()


async def test_deadline_during_the_forward_answers_in_time(queue: Queue) -> None:
    client, worker = await queue.client(), await queue.worker()
    job = queue.job(seconds=0.15)
    await client.submit(job, b"x")
    [lease] = await worker.start_jobs([await queue.take(worker)])
    began = time.monotonic()
    assert (await client.wait(job.id)).status == "expired"
    assert time.monotonic() - began < 1
    assert not await worker.commit(lease, done(lease))
    await queue.assert_empty()


async def test_an_answer_that_comes_at_the_deadline_is_taken(queue: Queue) -> None:
    client, worker = await queue.client(), await queue.worker()
    job = queue.job(seconds=0.15)
    await client.submit(job, b"x")
    [lease] = await worker.start_jobs([await queue.take(worker)])
    await worker.commit(lease, done(lease, b"z" * 50_000))
    await asyncio.sleep(0.2)
    assert (await client.wait(job.id)).payload == b"z" * 50_000


async def test_a_heartbeat_tells_of_canceled_jobs_and_keeps_them(queue: Queue) -> None:
    client, first, second = await queue.client(), await queue.worker(), await queue.worker()
    job, other = queue.job(), queue.job()
    await client.submit(job, b"x")
    [lease] = await first.start_jobs([await queue.take(first)])
    await client.submit(other, b"y")
    [kept] = await first.start_jobs([await queue.take(first)])
    await client.cancel(job.id)
    for _ in range(12):  # more than three leases
        await asyncio.sleep(queue.lease_s / 3)
        assert await first.beat([lease, kept]) == [lease]
        assert await second.fetch(100, 8, block_s=0) == [], "it is nobody else's"
    assert not await first.commit(lease, done(lease))
    assert await first.commit(kept, done(kept))
    assert (await client.wait(other.id)).status == "done"


async def test_a_heartbeat_gives_up_what_is_too_late_though_its_asker_says_nothing(queue: Queue) -> None:
    client, worker = await queue.client(), await queue.worker()
    late, other = queue.job(seconds=0.3), queue.job()
    await client.submit(late, b"x")  # nobody waits for it: the API process died
    [lease] = await worker.start_jobs([await queue.take(worker)])
    await client.submit(other, b"y")
    [kept] = await worker.start_jobs([await queue.take(worker)])
    assert await worker.beat([lease, kept]) == []
    await asyncio.sleep(0.35)
    for _ in range(2):
        assert await worker.beat([lease, kept]) == [lease]
    assert not await worker.commit(lease, done(lease))
    assert await worker.commit(kept, done(kept))
    assert (await client.wait(other.id)).status == "done"
    await queue.assert_empty()


async def test_give_back_counts_no_try_and_goes_to_another_worker(queue: Queue) -> None:
    client, first, second = await queue.client(), await queue.worker(), await queue.worker()
    job = queue.job()
    await client.submit(job, b"payload")
    lease = await queue.take(first)
    await first.give_back([lease])
    again = await queue.take(second)
    assert (again.tries, again.fence) == (0, 3)
    assert await first.start_jobs([lease]) == []
    assert not await first.commit(lease, done(lease))
    assert await first.beat([lease]) == [lease]
    [started] = await second.start_jobs([again])
    await second.give_back([started], untry=True)  # CUDA ran out of memory: not the job's fault
    third = await queue.take(first)
    assert (third.tries, third.alone) == (0, False)
    [started] = await first.start_jobs([third])
    await first.give_back([started])
    fourth = await queue.take(second)
    assert (fourth.tries, fourth.alone) == (1, True)
    [started] = await second.start_jobs([fourth])
    assert await second.load(started) == b"payload"
    await second.commit(started, done(started))
    assert (await client.wait(job.id)).tries == 2
    await queue.assert_empty()


async def test_give_back_of_a_canceled_job_ends_it(queue: Queue) -> None:
    client, worker = await queue.client(), await queue.worker()
    job = queue.job()
    await client.submit(job, b"x")
    lease = await queue.take(worker)
    await client.cancel(job.id)
    await worker.give_back([lease])
    await queue.assert_empty()


async def test_a_job_that_never_comes_back_is_given_up_after_three_tries(queue: Queue) -> None:
    client, _ = await queue.client(), await queue.worker()
    job, neighbour = queue.job(), queue.job()
    await client.submit(job, b"x")
    for tries in range(3):
        worker = await queue.worker()
        lease = await queue.take(worker)
        assert (lease.tries, lease.alone, lease.fence) == (tries, tries > 0, tries + 1)
        await worker.start_jobs([lease])  # ... and the worker dies
    await client.submit(neighbour, b"y")
    last = await queue.worker()
    await asyncio.sleep(queue.lease_s * 1.2)
    [lease] = await last.fetch(1000, 8)
    assert lease.job.id == neighbour.id
    answer = await client.wait(job.id)
    assert (answer.status, answer.code, answer.tries) == ("failed", "item_failed_repeatedly", 3)
    [(_, dead)] = queue.raw.xrange(queue.keys.dead)
    assert (dead[b"id"].decode(), dead[b"n"]) == (job.id, b"3")


async def test_an_item_that_was_only_fetched_with_a_poisonous_one_counts_no_try(queue: Queue) -> None:
    client, dead, worker = await queue.client(), await queue.worker(), await queue.worker()
    for _ in range(4):
        await client.submit(queue.job(), b"x")
    fetched = [await queue.take(dead) for _ in range(4)]
    await dead.start_jobs(fetched[:1])
    await asyncio.sleep(queue.lease_s * 1.2)
    assert sorted(lease.tries for lease in await worker.fetch(1000, 8)) == [0, 0, 0, 1]


async def test_a_repeated_start_counts_once(queue: Queue) -> None:
    client, worker = await queue.client(), await queue.worker()
    job = queue.job()
    await client.submit(job, b"x")
    lease = await queue.take(worker)
    await worker.start_jobs([lease])
    await worker.start_jobs([lease])
    assert queue.raw.hget(queue.keys.job(job.id), "n") == b"1"


async def test_a_repeated_commit_is_the_same_commit(queue: Queue) -> None:
    client, worker = await queue.client(), await queue.worker()
    job = queue.job()
    await client.submit(job, b"x")
    [lease] = await worker.start_jobs([await queue.take(worker)])
    assert await worker.commit(lease, done(lease, b"z" * 30_000))
    assert await worker.commit(lease, done(lease, b"z" * 30_000))
    assert (await client.wait(job.id)).payload == b"z" * 30_000
    await queue.assert_empty()


async def test_answers_of_a_batch_end_together_each_in_its_way(queue: Queue) -> None:
    """Small and large ones, one whose job was canceled meanwhile, and none at all."""
    client, worker = await queue.client(), await queue.worker()
    sizes = (0, 10, 5_000_000, blobs.INLINE_BYTES, 20)
    jobs = [queue.job() for _ in sizes]
    for job in jobs:
        await client.submit(job, b"x")
    leases = await worker.start_jobs([await queue.take(worker) for _ in sizes])
    await client.cancel(jobs[4].id)
    pairs = [(lease, done(lease, b"z" * size)) for lease, size in zip(leases, sizes, strict=True)]
    assert await worker.commit_all(pairs) == [True, True, True, True, False]
    assert await worker.commit_all([]) == []
    for job, size in zip(jobs[:4], sizes, strict=False):
        assert (await client.wait(job.id)).payload == b"z" * size
    await queue.assert_empty()


async def test_a_lost_input_is_said(queue: Queue) -> None:
    client, worker = await queue.client(), await queue.worker()
    job = queue.job()
    await client.submit(job, b"x" * 5_000_000)
    lease = await queue.take(worker)
    queue.raw.delete(queue.keys.inputs(job.id, 5_000_000)[1])
    with pytest.raises(PayloadLost, match=job.id):
        await worker.load(lease)
    [lease] = await worker.start_jobs([lease])
    await worker.commit(lease, Answer(id=job.id, status="lost", code="job_lost", detail="input gone"))
    assert (await client.wait(job.id)).status == "lost"
    await queue.assert_empty()


async def test_fetch_stays_near_its_budget_and_below_max_items(queue: Queue) -> None:
    client, worker = await queue.client(), await queue.worker()
    for _ in range(40):
        await client.submit(queue.job(cost=100), b"x")
    some = await worker.fetch(300, 100)
    assert 3 <= len(some) <= 16
    assert len(await worker.fetch(100_000, 10)) == 10
    rest = await worker.fetch(100_000, 100)
    assert len(some) + 10 + len(rest) == 40
    began = time.monotonic()
    assert await worker.fetch(100_000, 100, block_s=0.0) == []
    assert time.monotonic() - began < 0.5
