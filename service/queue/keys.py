"""The names of everything that the queue keeps in Redis. All keys of a pool share a hash tag, so one Cluster slot."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.queue import blobs

# A change of the scripts' data that old and new processes cannot share gets a new number: they then do not meet.
PREFIX = "at:2"
GROUP = "w"
LANES = (0, 1)  # interactive, batch
POOLS = f"{PREFIX}:pools"

_NAME = re.compile(r"[A-Za-z0-9._@+-]{1,200}")


def check_name(what: str, name: str) -> str:
    """Return name if it can be part of a key (letters, digits and ._@+-, 1 to 200 of them), else raise ValueError."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{what} must be 1 to 200 of letters, digits and ._@+-, not {name!r}")
    return name


def pool_of(card: Mapping[str, Any]) -> str:
    """Name of the pool that serves a model card: `name@revision`, the revision cut to 12 characters."""
    return f"{card['name']}@{str(card['revision'])[:12]}"


@dataclass(frozen=True)
class PoolKeys:
    """Keys of one pool, such as `tiny-continuous@0123456789ab`."""

    pool: str

    def __post_init__(self) -> None:
        check_name("a pool's name", self.pool)

    def _key(self, *parts: object) -> str:
        return ":".join([PREFIX, f"{{{self.pool}}}", *map(str, parts)])

    def queue(self, lane: int) -> str:
        """Stream of waiting and running jobs. Never trimmed: a trim would drop unread jobs without a word."""
        return self._key("q", lane)

    def job(self, job_id: str) -> str:
        """Hash, the truth about a job."""
        return self._key("j", job_id)

    def inputs(self, job_id: str, payload_bytes: int) -> list[str]:
        """Strings, the pieces of a job's payload."""
        return [self._key("i", job_id, k) for k in range(blobs.count(payload_bytes))]

    def outputs(self, job_id: str, fence: int, payload_bytes: int) -> list[str]:
        """Strings, the pieces of an answer. With the fence, or a late worker would overwrite the winner's."""
        return [self._key("o", job_id, fence, k) for k in range(blobs.count(payload_bytes))]

    def results(self, api: str) -> str:
        """Stream of answers for one API process."""
        return self._key("r", api)

    @property
    def counters(self) -> str:
        """Hash of tokens, encode, decode, bytes, items and `t:<tenant>` over all queued and running jobs."""
        return self._key("ctr")

    @property
    def active(self) -> str:
        """Hash of what each queued or running job adds to the counters: they can be recounted from it."""
        return self._key("act")

    @property
    def workers(self) -> str:
        """Sorted set of workers by their last heartbeat, in Redis' milliseconds."""
        return self._key("wk")

    def worker(self, worker_id: str) -> str:
        """Hash of one worker's facts."""
        return self._key("wk", worker_id)

    @property
    def dead(self) -> str:
        """Stream of jobs that were given up; never their payloads."""
        return self._key("dead")

    @property
    def reap_lock(self) -> str:
        """String that exists while nobody should reap again."""
        return self._key("reap")

    def ending(self, job_id: str, lane: int, api: str, payload_bytes: int) -> list[str]:
        """What a script needs to end a job; lib.lua has the same order."""
        return [
            self.job(job_id),
            self.queue(lane),
            self.counters,
            self.active,
            self.results(api),
            self.dead,
            *self.inputs(job_id, payload_bytes),
        ]
