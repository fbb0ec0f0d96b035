"""The records that travel through the queue, and what can go wrong with them. No Redis here."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from service.queue.estimate import Rates, Work

Op = Literal["encode", "decode", "embed"]
Status = Literal["done", "failed", "expired", "canceled", "lost"]
RefusalCode = Literal["queue_full", "would_miss_deadline", "queue_full_memory", "no_worker"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One item of work for the pool's workers.

    id: unique text, letters, digits, "-" and "_". pool: `name@revision`. cost: tokens of the item, at least 1.
    effort: what they count in estimates of time, None for as many; the queue does not hand it on.
    deadline: Unix time in seconds. tenant: who is charged (the hash of an API key, never the key).
    lane: 0 interactive, 1 batch. options: JSON values only.
    """

    id: str
    op: Op
    pool: str
    cost: int
    deadline: float
    tenant: str = "anonymous"
    lane: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    request_id: str = ""
    effort: int | None = None

    @property
    def work(self) -> Work:
        """What the job asks of the model, for estimates of time."""
        return Work.of(self.op, self.options, self.effort or self.cost)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How a job ended. timings are milliseconds (`queue`, `model`, ...); tries counts forwards that were begun.

    status: done (payload is set), failed (code and detail are set), expired (deadline passed in the queue), canceled,
    lost (Redis forgot the job: it restarted without its data).
    """

    id: str
    status: Status
    payload: bytes | None = None
    code: str | None = None
    detail: str | None = None
    timings: dict[str, float] = field(default_factory=dict)
    tries: int = 0


@dataclass(frozen=True, kw_only=True)
class Lease:
    """A worker's right to run one job: valid until another worker gets a higher fence.

    tries >= 1 means that an earlier forward with this job did not come back: run it alone.
    """

    job: Job
    fence: int
    tries: int
    payload_bytes: int
    enqueued: float  # Unix time in seconds
    stream_id: str
    api: str

    @property
    def alone(self) -> bool:
        """Whether the job must be a batch of its own, so that a poisonous one takes no neighbour along."""
        return self.tries >= 1

    def started(self) -> "Lease":
        """The same lease with the forward that now begins counted as a try."""
        return replace(self, tries=self.tries + 1)


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One registered worker of one pool. rates: of this pool's model; silent_s: seconds since its last heartbeat."""

    id: str
    pool: str
    ready: bool
    rates: Rates
    silent_s: float
    card: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class QueueLimits:
    """Admission limits of one pool, and how long things live. Source: serving design, sections 3.3 and 3.8.

    Jobs count while they are queued or running. tokens=None derives the limit from what the ready workers do in
    queue_seconds, in the mix of encode and decode that waits, at least floor_tokens; an empty queue takes an item of
    any size. tenant_share: a named tenant holds at most max(tenant_share, 1 / (active tenants + 1)) of the tokens, so
    a newcomer always finds room; "anonymous" is not limited. payload_bytes counts 1.25 times the payloads and is cut to
    half of the server's maxmemory.
    """

    tokens: int | None = None
    payload_bytes: int = 2 << 30
    items: int = 10_000
    tenant_share: float = 0.25
    queue_seconds: float = 60.0
    floor_tokens: int = 262_144  # eight full batches of 32,768
    lease_s: float = 15.0
    worker_silent_s: float = 12.0  # two heartbeats (a third of the lease each) and some slack
    check_every_s: float = 2.0  # how often waiting requests look whether their job still exists

    def room(self, tokens: int, seconds: float) -> tuple[int, float]:
        """Return the limit in tokens, and seconds a token, for a queue of so many tokens that take so many seconds.

        seconds: 0 if no speed is known. submit.lua, which decides, has the same rule.
        """
        limit = self.tokens or max(self.floor_tokens, int(self.queue_seconds * tokens / seconds) if seconds else 0)
        return limit, seconds / tokens if seconds else self.queue_seconds / limit


class Refused(Exception):  # noqa: N818 - a refusal is an answer, not a fault
    """The queue does not take this job now. Nothing was stored.

    retry_after is in seconds; limit and actual are in the unit that the code concerns (tokens, bytes, items, seconds).
    """

    def __init__(
        self, code: RefusalCode, *, retry_after: float, limit: float | None = None, actual: float | None = None
    ) -> None:
        what = f" ({actual:g}, limit {limit:g})" if limit is not None and actual is not None else ""
        super().__init__(f"the queue refused the job: {code}{what}; retry after {retry_after:.0f} s")
        self.code: RefusalCode = code
        self.retry_after = retry_after
        self.limit = limit
        self.actual = actual


class QueueUnavailable(Exception):  # noqa: N818 - the name of a state
    """Redis cannot be reached, is loading its data, or is not one that the queue can use."""


class PayloadLost(Exception):  # noqa: N818 - the name of a state
    """A job's input is no longer in Redis: it expired, or Redis restarted without its data."""
