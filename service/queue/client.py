"""The API's side of the queue: admission, waiting for answers, and what is known about workers."""

import asyncio
import json
import logging
import random
import time
import uuid
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import OutOfMemoryError, RedisError

from service.queue import blobs
from service.queue.connect import Call, Scripts, UnusableServer, connect, unavailable
from service.queue.estimate import MARGIN, Load, Rates, fastest
from service.queue.jobs import Answer, Job, QueueLimits, QueueUnavailable, RefusalCode, Refused, Status, Worker
from service.queue.keys import LANES, PoolKeys, check_name
from service.queue.registry import Registry
from service.queue.tasks import Tasks, owned

log = logging.getLogger(__name__)

_CONNECTIONS = 16
_READ_BLOCK_MS = 1000
_LOOK_FIRST_BYTES = 1 << 20  # below, a refused payload costs less than a round trip for all others
_OUTLIVE_MS = 600_000  # how long a job's record outlives its deadline
_ABANDONED_S = 5.0  # how long after its deadline an entry that nobody fetched is kept
_LAST_CALL_S = 1.0  # how long an answer that Redis already has may still take to arrive


@dataclass
class _Entry:
    """One job of ours on its way."""

    job: Job
    payload_bytes: int
    future: asyncio.Future[Answer]
    submitted_at: float | None = None  # monotonic; None until Redis said yes
    waiters: int = 0
    abandoned: bool = False  # its waiter was cancelled
    arriving: bool = False  # its answer is being fetched
    ended_seen: int = 0  # checks that found it ended without an answer here

    def resolve(self, answer: Answer) -> None:
        if not self.future.done():
            self.future.set_result(answer)


class QueueClient:
    """Submits jobs and hands their answers to whoever waits. One per process and event loop.

    No request task ever touches a Redis connection, so a cancelled request cannot disturb another (see Tasks).
    """

    def __init__(self, url: str, limits: QueueLimits | None = None, *, timeout_s: float = 5.0) -> None:
        self._url = url
        self._limits = limits or QueueLimits()
        self._timeout_s = timeout_s
        self._api = uuid.uuid4().hex[:16]
        self._redis = connect(url, connections=_CONNECTIONS, timeout_s=timeout_s)
        self._registry = Registry(self._redis, self._limits.worker_silent_s)
        self._scripts = Scripts()
        self._entries: dict[str, _Entry] = {}
        self._readers: dict[str, asyncio.Task[None]] = {}
        self._tasks = Tasks()
        self._check_now = asyncio.Event()

    async def start(self) -> None:
        """Begin to watch the workers. A Redis that is not there yet is waited for in the background.

        Raises QueueUnavailable if the server is there but too old or set to evict keys.
        """
        try:
            await self._tasks.own(self._registry.refresh())
        except UnusableServer:
            raise
        except QueueUnavailable as error:
            log.warning("%s", error)
        self._tasks.spawn(self._keep_house())

    async def close(self) -> None:
        """Stop. Open waits end with the answer `lost`; their jobs go on and end unseen."""
        await self._tasks.close()
        for entry in self._entries.values():
            entry.resolve(
                Answer(id=entry.job.id, status="lost", code="shutting_down", detail="the service is stopping")
            )
        await self._redis.aclose()

    async def submit(self, job: Job, payload: blobs.Buffer) -> None:
        """Enqueue a job; after this, wait(job.id) gives its answer. A repeated id is an error.

        A job whose deadline has passed is not sent; its answer is `expired`.

        Raises Refused, QueueUnavailable (the job may then still run, unseen), ValueError for a bad job. If the caller
        is cancelled meanwhile, the job is too.
        """
        check_name("a job's id", job.id)
        if job.id in self._entries:
            raise ValueError(f"job {job.id} was already submitted")
        if job.cost < 1 or job.lane not in LANES or any(c.isspace() for c in job.tenant):
            raise ValueError(f"a job needs cost >= 1, lane in {LANES}, a tenant without spaces: {job}")
        entry = _Entry(job, memoryview(payload).nbytes, asyncio.get_running_loop().create_future())
        self._entries[job.id] = entry
        task = self._tasks.spawn(self._submit(entry, payload))
        try:
            await self._tasks.join(task)
        except asyncio.CancelledError:
            self._tasks.spawn(self._withdraw(entry, task))
            raise
        except BaseException:
            self._forget(entry)
            raise

    async def wait(self, job_id: str) -> Answer:
        """Return the job's answer, at the latest a moment after its deadline (status `expired`).

        If the wait is cancelled the job goes on, until cancel(); its answer is dropped. Raises KeyError for an id that
        was not submitted here or whose answer was already taken.
        """
        entry = self._entries[job_id]
        entry.waiters += 1
        try:
            try:
                async with asyncio.timeout(max(0.0, entry.job.deadline - time.time())):
                    answer = await asyncio.shield(entry.future)
            except TimeoutError:
                answer = await self._tasks.own(self._expire(entry))
        except asyncio.CancelledError:
            entry.abandoned = True
            raise
        finally:
            entry.waiters -= 1
        self._forget(entry)
        return answer

    async def cancel(self, job_id: str) -> None:
        """End a job that nobody wants any more. Whoever waits for it gets `canceled`.

        A queued job never starts; of a running one the answer is dropped, and a worker stops computing a batch that
        nobody waits for. Unknown ids and an unreachable Redis are no errors (the job's deadline still holds).
        """
        entry = self._entries.get(job_id)
        if entry is None:
            return
        entry.resolve(Answer(id=job_id, status="canceled"))
        if not entry.waiters:
            self._forget(entry)
        try:
            await self._tasks.own(self._end(entry, "canceled", "", ""))
        except QueueUnavailable:
            log.warning("could not cancel job %s: the queue's Redis does not answer", job_id)

    @owned
    async def models(self) -> list[dict[str, Any]]:
        """Model cards of the ready workers that live, one a pool, by name. Raises QueueUnavailable."""
        return await self._registry.models()

    @owned
    async def workers(self) -> list[Worker]:
        """All workers with a heartbeat that is not too old, ready or not. Raises QueueUnavailable."""
        return await self._registry.workers()

    @owned
    async def stats(self) -> dict[str, Load]:
        """Load by pool. Raises QueueUnavailable."""
        return await self._registry.stats()

    @owned
    async def ping(self) -> float:
        """Milliseconds that Redis takes to answer. Raises QueueUnavailable."""
        began = time.perf_counter()
        with unavailable():
            await self._redis.ping()
        return (time.perf_counter() - began) * 1000

    # Submit and cancel

    def _forget(self, entry: _Entry) -> None:
        if self._entries.get(entry.job.id) is entry:
            del self._entries[entry.job.id]

    async def _submit(self, entry: _Entry, payload: blobs.Buffer) -> None:
        job, limits, keys = entry.job, self._limits, self._keys(entry)
        ttl_ms = int((job.deadline - time.time()) * 1000)
        if ttl_ms <= 0:
            entry.resolve(_late(job, "the deadline passed before the job was queued"))
            return
        ready = await self._registry.ready(job.pool)
        if not ready:
            raise Refused("no_worker", retry_after=10.0)
        own = [worker.rates for worker in ready]
        rates, least_s = sum(own, Rates()), fastest(own).seconds(job.work) / MARGIN
        max_bytes = min(limits.payload_bytes, (self._registry.maxmemory_bytes or 0) // 2 or limits.payload_bytes)
        share = 0.0 if job.tenant == "anonymous" else limits.tenant_share
        args: list[Any] = [job.id, job.tenant, job.lane, job.cost, entry.payload_bytes, ttl_ms, self._api, job.op]
        args += [json.dumps(job.options), job.request_id, _OUTLIVE_MS]
        args += [limits.tokens or 0, limits.queue_seconds, limits.floor_tokens, max_bytes, limits.items, share]
        args += [job.work.encode, job.work.decode, int(1000 * least_s), rates.encode, rates.decode]
        inputs = keys[6:]
        self._read_answers(job.pool)
        try:
            with unavailable():
                if entry.payload_bytes > _LOOK_FIRST_BYTES:
                    reply = await self._scripts.one(self._redis, "submit", keys[:6], "check", *args)
                    _raise_if_refused(job, reply)
                blob = (inputs, payload, ttl_ms + int(3000 * limits.lease_s))
                [reply] = await self._scripts.run(self._redis, [Call("submit", keys, ["add", *args])], blob)
        except OutOfMemoryError:
            with unavailable():
                await blobs.delete(self._redis, inputs)
            raise Refused("queue_full_memory", retry_after=5.0) from None
        _raise_if_refused(job, reply)
        entry.submitted_at = time.monotonic()

    async def _withdraw(self, entry: _Entry, submission: asyncio.Task[None]) -> None:
        """Undo a submit whose caller was cancelled."""
        with suppress(Exception):
            await submission
            await self._end(entry, "canceled", "", "")
        self._forget(entry)

    async def _end(self, entry: _Entry, state: Status, code: str, detail: str) -> str:
        with unavailable():
            found: bytes = await self._scripts.one(self._redis, "cancel", self._keys(entry), state, code, detail)
        return found.decode()

    async def _expire(self, entry: _Entry) -> Answer:
        """End a job whose deadline has passed; more time would not have helped one that has no worker left."""
        answer = await self._end_late(entry)
        with suppress(QueueUnavailable):
            if answer.status == "expired" and not await self._registry.ready(entry.job.pool):
                detail = "the last worker that had this model is gone"
                return replace(answer, status="failed", code="no_worker", detail=detail)
        return answer

    async def _end_late(self, entry: _Entry) -> Answer:
        """End the job if it still waits, and take an answer that is already under way."""
        late = _late(entry.job, "the deadline has passed")
        try:
            found = await self._end(entry, "expired", "deadline_exceeded", "the deadline passed in the queue")
        except QueueUnavailable:
            return late
        if found in ("running", "gone"):
            return late
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_CALL_S):
                return await asyncio.shield(entry.future)
        return late

    def _keys(self, entry: _Entry) -> list[str]:
        job = entry.job
        return PoolKeys(job.pool).ending(job.id, job.lane, self._api, entry.payload_bytes)

    # Answers

    def _read_answers(self, pool: str) -> None:
        if pool not in self._readers:
            self._readers[pool] = self._tasks.spawn(self._reader(pool))

    async def _reader(self, pool: str) -> None:
        """Follow our result stream of one pool, on a connection that nothing else uses."""
        client = connect(self._url, connections=1, timeout_s=_READ_BLOCK_MS / 1000 + self._timeout_s, retries=0)
        after, delay = "0-0", 0.0
        try:
            while not self._tasks.closed:
                try:
                    with unavailable():
                        after = await self._read_some(client, pool, after)
                except (QueueUnavailable, RedisError) as error:
                    if not delay:
                        log.warning("%s", error)
                    after = "0-0"  # a restarted server may number anew
                    delay = min(2.0, max(0.1, 2 * delay))
                    await asyncio.sleep(delay * random.uniform(0.5, 1.0))
                else:
                    if delay:
                        log.warning("the queue's Redis is back")
                        self._check_now.set()  # it may have forgotten everything
                    delay = 0.0
        finally:
            await client.aclose()

    async def _read_some(self, client: Redis, pool: str, after: str) -> str:
        """Hand out the answers that come next, and return the id of the last one."""
        stream = PoolKeys(pool).results(self._api)
        reply: Any = await client.xread({stream: after}, count=64, block=_READ_BLOCK_MS)
        for entry_id, fields in reply[0][1] if reply else ():
            after = entry_id.decode()
            try:
                self._arrive(pool, {k.decode(): v for k, v in fields.items()})
            except Exception:  # one bad entry must not keep the others from their askers
                log.exception("an answer from pool %s could not be read", pool)
        if reply:  # what was read is not needed again, and a replay after a reconnect is short
            await client.xtrim(stream, minid=_next_id(after), approximate=False)
        return after

    def _arrive(self, pool: str, fields: dict[str, bytes]) -> None:
        job_id = fields["id"].decode()
        entry = self._entries.get(job_id)
        size = int(fields.get("ob", b"0"))
        if size > blobs.INLINE_BYTES:
            if entry is not None:
                if entry.arriving:  # a replay after a reconnect
                    return
                entry.arriving = True
            keys = PoolKeys(pool).outputs(job_id, int(fields["f"]), size)
            self._tasks.spawn(self._fetch(entry, fields, keys))
        elif entry is not None:
            self._hand_over(entry, fields, fields.get("p"))

    async def _fetch(self, entry: _Entry | None, fields: dict[str, bytes], keys: Sequence[str]) -> None:
        """Get an answer's payload from its own keys; for nobody's answer, only delete it."""
        while entry is not None:
            try:
                with unavailable():
                    payload = await blobs.get(self._redis, keys)
            except QueueUnavailable:
                if entry.future.done() or time.time() > entry.job.deadline:
                    return
                await asyncio.sleep(0.2)
                continue
            if payload is None:
                self._lost(entry, "its answer is no longer there")
            else:
                self._hand_over(entry, fields, payload)
            break
        with suppress(QueueUnavailable), unavailable():  # else its time runs out
            await blobs.delete(self._redis, keys)

    def _hand_over(self, entry: _Entry, fields: dict[str, bytes], payload: bytes | None) -> None:
        status: Status = fields["st"].decode()  # type: ignore[assignment] # our scripts write no other
        entry.resolve(
            Answer(
                id=entry.job.id,
                status=status,
                payload=payload if status == "done" else None,
                code=fields["code"].decode() or None,
                detail=fields["detail"].decode() or None,
                timings={"queue": float(fields["q"])} | json.loads(fields.get("tm", b"{}")),
                tries=int(fields["n"]),
            )
        )
        if entry.abandoned and not entry.waiters:
            self._forget(entry)

    # What is seen from time to time

    async def _keep_house(self) -> None:
        limits = self._limits
        tick = min(1.0, limits.check_every_s, limits.worker_silent_s / 3)
        checked = time.monotonic()
        while not self._tasks.closed:
            with suppress(TimeoutError):
                async with asyncio.timeout(tick):
                    await self._check_now.wait()
            now = time.monotonic()
            try:
                if self._check_now.is_set() or now - checked >= limits.check_every_s:
                    at_once = self._check_now.is_set()
                    self._check_now.clear()
                    checked = now
                    await self._check(now if at_once else now - limits.check_every_s)
                await self._registry.refresh()
            except QueueUnavailable as error:
                log.debug("%s", error)  # the readers and the callers say it
            except Exception:
                log.exception("the queue's client could not look after its jobs")

    async def _check(self, submitted_before: float) -> None:
        """Find jobs that Redis no longer knows: it restarted without its data, and nobody will answer."""
        for entry in list(self._entries.values()):
            if not entry.waiters and time.time() > entry.job.deadline + _ABANDONED_S:
                self._forget(entry)
        open_entries = [
            e
            for e in self._entries.values()
            if e.submitted_at is not None and e.submitted_at <= submitted_before and not (e.future.done() or e.arriving)
        ]
        if not open_entries:
            return
        pipe = self._redis.pipeline(transaction=False)
        for entry in open_entries:
            pipe.hget(self._keys(entry)[0], "st")
        with unavailable():
            states = await pipe.execute()
        for entry, state in zip(open_entries, states, strict=True):
            if state is None:
                self._lost(entry, "Redis no longer knows the job")
            elif state not in (b"queued", b"running"):
                entry.ended_seen += 1
                if entry.ended_seen > 2 and not entry.arriving:
                    self._lost(entry, "its answer is no longer there")

    def _lost(self, entry: _Entry, detail: str) -> None:
        entry.resolve(Answer(id=entry.job.id, status="lost", code="job_lost", detail=detail))
        if entry.abandoned and not entry.waiters:
            self._forget(entry)


def _late(job: Job, detail: str) -> Answer:
    return Answer(id=job.id, status="expired", code="deadline_exceeded", detail=detail)


def _raise_if_refused(job: Job, reply: list[Any]) -> None:
    why = reply[0].decode()
    if why in ("ok", "dup"):
        return
    limit, actual, wait_ms = reply[1:]
    if why == "would_miss_deadline":
        limit, actual = round(limit / 1000, 1), round(actual / 1000, 1)
    jitter = 1 + zlib.crc32(job.id.encode()) % 21 / 100  # not everybody at once
    code: RefusalCode = why
    raise Refused(code, retry_after=max(1.0, min(60.0, wait_ms / 1000)) * jitter, limit=limit, actual=actual)


def _next_id(stream_id: str) -> str:
    ms, seq = stream_id.split("-")
    return f"{ms}-{int(seq) + 1}"
