"""The worker's side of the queue: leases on jobs, heartbeats, and answers that count once."""

import asyncio
import json
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from redis.exceptions import OutOfMemoryError, ResponseError

from service.queue import blobs
from service.queue.connect import Call, Scripts, UnusableServer, check_server, connect, unavailable
from service.queue.estimate import Rates
from service.queue.jobs import Answer, Job, Lease, PayloadLost, QueueUnavailable
from service.queue.keys import GROUP, LANES, POOLS, PoolKeys, check_name, pool_of
from service.queue.tasks import Tasks, owned

log = logging.getLogger(__name__)

T = TypeVar("T")

_CONNECTIONS = 4
_READ_COUNT = 8
_CLAIM_COUNT = 50
_OUTPUT_RETRIES = 3
_WORKER_SILENT_MS = 60_000  # when the registry forgets a worker


class QueueConsumer:
    """Fetches jobs of some pools and commits their answers. One per worker process and event loop.

    While Redis is away nothing here raises but start() on an unusable server: fetch() gives nothing after a pause,
    beat() does nothing, and start_jobs(), load() and commit() go on trying until Redis answers.
    worker_id must be new for every process, but for one that follows another which is known to be dead: it `inherits`
    the name, and its first fetch() takes what that one held, however long the lease. lease_s: how long a silent worker
    keeps its jobs; call beat() at least three times as often. max_tries: forwards after which a job is given up.
    answer_ttl_s: how long an unread answer is kept.
    """

    def __init__(
        self,
        url: str,
        worker_id: str,
        pools: Sequence[str],
        *,
        inherits: bool = False,
        lease_s: float = 15.0,
        max_tries: int = 3,
        answer_ttl_s: float = 60.0,
        timeout_s: float = 5.0,
    ) -> None:
        self._me = check_name("a worker's id", worker_id)
        self._pools = {pool: PoolKeys(pool) for pool in pools}
        self._inherits = inherits
        self._lease_s = lease_s
        self._max_tries = max_tries
        self._answer_ttl_ms = int(answer_ttl_s * 1000)
        self._redis = connect(url, connections=_CONNECTIONS, timeout_s=timeout_s)
        # Blocking reads have a connection of their own.
        self._blocking = connect(url, connections=1, timeout_s=2 * timeout_s)
        self._max_block_s = timeout_s
        self._tasks = Tasks()
        self._scripts = Scripts()
        self._streams = {keys.queue(lane): (keys, lane) for keys in self._pools.values() for lane in LANES}
        self._cards: dict[str, str] = dict.fromkeys(pools, "{}")
        self._cursors = dict.fromkeys(self._streams, "0-0")
        self._next_claim = 0.0
        self._ready = False
        self._rates: dict[str, Rates] = dict.fromkeys(pools, Rates())
        self._pause_s = 0.0

    @owned
    async def start(self, cards: Sequence[Mapping[str, Any]]) -> None:
        """Register this worker, not yet ready, with one model card a pool. Waits until Redis is there.

        Raises UnusableServer (a QueueUnavailable) if it is too old or set to evict keys, ValueError if the cards do not
        fit.
        """
        by_pool = {pool_of(card): json.dumps(dict(card)) for card in cards}
        if by_pool.keys() != self._pools.keys():
            raise ValueError(f"cards for the pools {sorted(self._pools)} are needed, not for {sorted(by_pool)}")
        self._cards = by_pool
        await self._insist(lambda: check_server(self._redis))
        await self._insist(lambda: self._beat([]))

    async def close(self) -> None:
        """Leave the registry and disconnect. Give held jobs back first, or they wait for their lease to end."""
        await self._tasks.close()
        try:
            with unavailable():
                for keys in self._pools.values():
                    await self._redis.zrem(keys.workers, self._me)
                    await self._redis.unlink(keys.worker(self._me))
        except QueueUnavailable:
            log.warning("left without a word: the queue's Redis does not answer")
        await self._blocking.aclose()
        await self._redis.aclose()

    @owned
    async def fetch(self, budget_tokens: int, max_items: int, *, block_s: float = 0.5) -> list[Lease]:
        """Take jobs until budget_tokens or max_items are reached or none waits; the last read may overshoot both.

        With nothing there it waits up to block_s (0: not at all). Every lease must be in the next beat().
        Jobs that are canceled, expired or failed too often end here and are not returned. Do not cancel a fetch but
        to close(): what it would have taken waits for the lease to end.
        """
        leases: list[Lease] = []
        try:
            with unavailable():
                if self._inherits:
                    leases += await self._begin(await self._inherit())
                    self._inherits = False
                if time.monotonic() >= self._next_claim:
                    self._next_claim = time.monotonic() + self._lease_s / 2
                    leases += await self._begin(await self._claim(max(1, min(_CLAIM_COUNT, max_items))))
                while sum(lease.job.cost for lease in leases) < budget_tokens and len(leases) < max_items:
                    count = max(1, min(_READ_COUNT, (max_items - len(leases)) // len(self._streams)))
                    entries = await self._read(count, 0.0 if leases else block_s)
                    if not entries:
                        break
                    leases += await self._begin(entries)
            self._pause_s = 0.0
        except ResponseError as error:
            if not str(error).startswith(("NOGROUP", "UNBLOCKED")):
                raise
            log.warning("the queue is new or was emptied: joining it")
            await self._insist(lambda: self._beat([]))
        except QueueUnavailable as error:
            self._pause_s = min(2.0, max(0.1, 2 * self._pause_s))
            log.warning("%s; next try in %.1f s", error, self._pause_s)
            await asyncio.sleep(self._pause_s * random.uniform(0.5, 1.0))
        return leases

    @owned
    async def start_jobs(self, leases: Sequence[Lease]) -> list[Lease]:
        """Count a try for each job, directly before their forward. Returns those that shall run, with the new count."""
        calls = [Call("start", self._ending(lease), [lease.fence, self._me]) for lease in leases]
        replies = await self._insist(lambda: self._scripts.run(self._redis, calls))
        return [lease.started() for lease, reply in zip(leases, replies, strict=True) if reply == b"run"]

    @owned
    async def load(self, lease: Lease) -> bytes:
        """Return the job's payload. Raises PayloadLost: then commit an Answer with status `lost`, it does no harm."""
        keys = PoolKeys(lease.job.pool).inputs(lease.job.id, lease.payload_bytes)
        payload = await self._insist(lambda: blobs.get(self._redis, keys)) if keys else b""
        if payload is None:
            raise PayloadLost(f"the input of job {lease.job.id} is no longer in the queue")
        return payload

    @owned
    async def beat(self, leases: Sequence[Lease]) -> list[Lease]:
        """Send a heartbeat and keep these leases. Returns those whose answer nobody wants.

        They are lost (other workers have or had the jobs) or canceled; a canceled one is kept until it is committed.
        """
        try:
            with unavailable():
                return await self._beat(leases)
        except QueueUnavailable as error:
            log.warning("no heartbeat: %s", error)
            return []

    async def commit(self, lease: Lease, answer: Answer) -> bool:
        """End a job with its answer; as commit_all."""
        return (await self.commit_all([(lease, answer)]))[0]

    @owned
    async def commit_all(self, pairs: Sequence[tuple[Lease, Answer]]) -> list[bool]:
        """End jobs with their answers, in one round trip but for large ones; insist until Redis says what became of it.

        Whether each answer counted: not if the job was canceled, or the lease was lost and another worker has it.
        """
        if not pairs:
            return []
        leases = [lease for lease, _ in pairs]
        kept = await asyncio.gather(*(self._set_aside(lease, answer) for lease, answer in pairs))
        calls = [
            self._ending_call(
                lease,
                "end",
                answer.status,
                answer.code or "",
                answer.detail or "",
                json.dumps(answer.timings),
                b"" if outputs else answer.payload or b"",
                len(answer.payload or b""),
            )
            for lease, (answer, outputs) in zip(leases, kept, strict=True)
        ]
        replies = await self._insist(lambda: self._scripts.run(self._redis, calls))
        for lease, (_, outputs), reply in zip(leases, kept, replies, strict=True):
            if reply != b"ok":
                log.info("the answer of job %s was refused: %s", lease.job.id, reply.decode())
                await self._insist(partial(blobs.delete, self._redis, outputs))
        return [reply == b"ok" for reply in replies]

    @owned
    async def give_back(self, leases: Sequence[Lease], *, untry: bool = False) -> None:
        """Let others run these jobs, now. untry: take back the try that start_jobs counted (the job was not the cause).

        One attempt: if Redis does not answer, the leases run out by themselves.
        """
        calls = [Call("give_back", self._ending(lease), [lease.fence, self._me, int(untry)]) for lease in leases]
        try:
            with unavailable():
                await self._scripts.run(self._redis, calls)
        except QueueUnavailable as error:
            log.warning("could not give %d jobs back: %s", len(leases), error)

    async def set_ready(self, ready: bool) -> None:
        """Say whether this worker can serve (its self-test passed). Sent at once."""
        self._ready = ready
        await self.beat([])

    async def report(self, pool: str, rates: Rates) -> None:
        """Say how fast this worker runs a pool's model; goes out with the next heartbeat."""
        self._rates[pool] = rates

    @owned
    async def reap(self) -> None:
        """Repair counters and forget dead workers. Any worker may call it at any time; it acts once in 4 seconds."""
        try:
            with unavailable():
                for keys in self._pools.values():
                    lists = [keys.reap_lock, keys.counters, keys.active, keys.workers]
                    queues = [keys.queue(lane) for lane in LANES]
                    done = await self._scripts.one(self._redis, "reap", lists + queues, 4000, _WORKER_SILENT_MS)
                    if done and any(done[1:]):
                        log.info("reaped %s: %d jobs, %d workers, %d consumers", keys.pool, *done[1:])
        except QueueUnavailable as error:
            log.warning("did not reap: %s", error)

    async def _beat(self, leases: Sequence[Lease]) -> list[Lease]:
        unwanted: list[Lease] = []
        for pool, keys in self._pools.items():
            mine = [lease for lease in leases if lease.job.pool == pool]
            names: list[str] = [keys.workers, keys.worker(self._me), *(keys.queue(lane) for lane in LANES)]
            rates = self._rates[pool]
            args: list[Any] = [self._me, int(self._ready), rates.encode, rates.decode, self._cards[pool]]
            for lease in mine:
                names += [keys.job(lease.job.id), keys.queue(lease.job.lane)]
                args += [lease.fence, lease.stream_id]
            unwanted += [mine[i - 1] for i in await self._scripts.one(self._redis, "beat", names, *args)]
        try:
            await self._redis.sadd(POOLS, *self._pools)
        except OutOfMemoryError:
            log.debug("Redis is full")  # the pools have been named at the start
        return unwanted

    async def _read(self, count: int, block_s: float) -> list[tuple[PoolKeys, int, str, dict[bytes, bytes]]]:
        block_ms = max(1, int(min(block_s, self._max_block_s) * 1000)) if block_s > 0 else None
        reply: Any = await self._blocking.xreadgroup(
            GROUP, self._me, dict.fromkeys(self._streams, ">"), count=count, block=block_ms
        )
        return self._entries_of(reply)

    async def _inherit(self) -> list[tuple[PoolKeys, int, str, dict[bytes, bytes]]]:
        """Entries that were delivered under this name and not acknowledged."""
        reply: Any = await self._redis.xreadgroup(GROUP, self._me, dict.fromkeys(self._streams, "0"))
        entries = self._entries_of(reply)
        if entries:
            log.warning("took over %d jobs from the worker before", len(entries))
        return entries

    def _entries_of(self, reply: Any) -> list[tuple[PoolKeys, int, str, dict[bytes, bytes]]]:
        """What a read delivered; an entry that was deleted since has no fields."""
        return [
            (*self._streams[stream.decode()], mid.decode(), fields)
            for stream, found in reply
            for mid, fields in found
            if fields
        ]

    async def _claim(self, count: int) -> list[tuple[PoolKeys, int, str, dict[bytes, bytes]]]:
        """Entries whose owner has been silent for a lease. The server forgets deleted ones by itself (third field)."""
        entries = []
        for stream, (keys, lane) in self._streams.items():
            reply: Any = await self._redis.xautoclaim(
                stream, GROUP, self._me, int(self._lease_s * 1000), self._cursors[stream], count=count
            )
            cursor, found = reply[:2]
            self._cursors[stream] = cursor.decode()
            entries += [(keys, lane, mid.decode(), fields) for mid, fields in found]
        if entries:
            log.warning("claimed %d jobs from silent workers", len(entries))
        return entries

    async def _begin(self, entries: Sequence[tuple[PoolKeys, int, str, dict[bytes, bytes]]]) -> list[Lease]:
        facts = [(k, lane, mid, f[b"id"].decode(), f[b"api"].decode(), int(f[b"b"])) for k, lane, mid, f in entries]
        calls = [
            Call("begin", keys.ending(job_id, lane, api, size), [mid, self._me, self._max_tries])
            for keys, lane, mid, job_id, api, size in facts
        ]
        leases = []
        for (keys, lane, mid, job_id, api, size), reply in zip(
            facts, await self._scripts.run(self._redis, calls), strict=True
        ):
            if reply[0] != b"run":
                log.info("job %s does not run: %s", job_id, reply[0].decode())
                continue
            fence, tries, op, options, request_id, tenant, cost, deadline_ms, enqueued_ms = reply[1:]
            job = Job(
                id=job_id,
                op=op.decode(),
                pool=keys.pool,
                cost=int(cost),
                deadline=float(deadline_ms) / 1000,
                tenant=tenant.decode(),
                lane=lane,
                options=json.loads(options),
                request_id=request_id.decode(),
            )
            leases.append(
                Lease(
                    job=job,
                    fence=fence,
                    tries=tries,
                    payload_bytes=size,
                    enqueued=float(enqueued_ms) / 1000,
                    stream_id=mid,
                    api=api,
                )
            )
        return leases

    async def _set_aside(self, lease: Lease, answer: Answer) -> tuple[Answer, list[str]]:
        """Store an answer's payload under keys of its own if it is large; what is to be said, and the keys."""
        payload = answer.payload or b""
        if len(payload) <= blobs.INLINE_BYTES:
            return answer, []
        outputs = PoolKeys(lease.job.pool).outputs(lease.job.id, lease.fence, len(payload))
        if await self._store(lease, outputs, payload):
            return answer, outputs
        return replace(answer, status="failed", payload=None, code="queue_full_memory", detail="Redis is full"), []

    async def _store(self, lease: Lease, outputs: Sequence[str], payload: bytes) -> bool:
        """Store an answer's payload. In a full Redis first free the inputs, which are not needed any more."""
        for attempt in range(_OUTPUT_RETRIES + 1):
            try:
                await self._insist(lambda: blobs.put(self._redis, outputs, payload, self._answer_ttl_ms))
                return True
            except OutOfMemoryError:
                log.warning("Redis is full: no room for the answer of job %s", lease.job.id)
                if attempt == 0:
                    free = self._ending_call(lease, "free", "", "", "", "", b"", 0)
                    if (await self._insist(partial(self._scripts.run, self._redis, [free])))[0] != b"freed":
                        break  # lost or ended: the commit that follows will say so
                else:
                    await asyncio.sleep(0.05 * 2**attempt)
        await self._insist(lambda: blobs.delete(self._redis, outputs))
        return False

    def _ending_call(self, lease: Lease, mode: str, *answer: Any) -> Call:
        return Call("commit", self._ending(lease), [mode, lease.fence, self._me, *answer])

    def _ending(self, lease: Lease) -> list[str]:
        job = lease.job
        return PoolKeys(job.pool).ending(job.id, job.lane, lease.api, lease.payload_bytes)

    async def _insist(self, do: Callable[[], Awaitable[T]]) -> T:
        """Do it until Redis answers: results are kept, never dropped, while it is away."""
        delay = 0.1
        while True:
            try:
                with unavailable():
                    return await do()
            except UnusableServer:
                raise
            except QueueUnavailable as error:
                log.warning("%s; next try in %.1f s", error, delay)
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))
                delay = min(2.0, 2 * delay)
