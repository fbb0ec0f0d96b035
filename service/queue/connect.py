"""Connections to Redis or Valkey, the scripts, and what counts as "not available"."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import Any, NamedTuple

from redis import exceptions
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from service.queue import blobs
from service.queue.jobs import QueueUnavailable

log = logging.getLogger(__name__)

MIN_VERSION = (7, 0)  # "#!lua" flags and XAUTOCLAIM's third field. Valkey says 7.2.4 in the same place.
SCRIPTS = ("submit", "begin", "start", "beat", "commit", "give_back", "cancel", "reap")

# Errors that a server sends while it cannot take commands; they pass.
_NOT_NOW = ("LOADING", "MASTERDOWN", "READONLY", "MISCONF", "NOREPLICAS", "CLUSTERDOWN", "TRYAGAIN", "BUSY")


def connect(url: str, *, connections: int, timeout_s: float, retries: int = 1) -> Redis:
    """Return a client for redis://, rediss:// or unix://; nothing is sent yet.

    timeout_s bounds every reply, so a reader that blocks needs more than its block time. A broken connection is
    replaced at once, one time: after a restart all pooled ones are broken. No more retries, so that callers learn soon.
    """
    if not url.startswith(("redis://", "rediss://", "unix://")):
        raise ValueError(f"a Redis URL starts with redis://, rediss:// or unix://, not with {url.split('://')[0]!r}")
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=connections,
        timeout=4 * timeout_s,  # the wait for a free connection
        socket_timeout=timeout_s,
        socket_connect_timeout=min(timeout_s, 2.0),
        retry=Retry(NoBackoff(), retries, supported_errors=(exceptions.ConnectionError,)),
        protocol=2,
    )
    return Redis.from_pool(pool)


@contextmanager
def unavailable() -> Iterator[None]:
    """Turn every error that means "not now" into QueueUnavailable."""
    try:
        yield
    except (exceptions.ConnectionError, exceptions.TimeoutError, OSError) as error:
        # redis-py names the address, never the password.
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise QueueUnavailable(f"the queue's Redis does not answer: {reason}") from error
    except exceptions.ResponseError as error:
        if str(error).startswith(_NOT_NOW) or isinstance(error, exceptions.ReadOnlyError | exceptions.ClusterDownError):
            raise QueueUnavailable(f"the queue's Redis takes no commands now: {error}") from error
        raise


class UnusableServer(QueueUnavailable):
    """The server answers but the queue cannot use it: too old, or set to evict keys. Waiting does not help."""


async def check_server(client: Redis) -> int:
    """Return the server's maxmemory in bytes (0: no limit).

    Raises UnusableServer if it is too old or may evict our keys, QueueUnavailable if it does not answer.
    Source: serving design, sections 3.3, 3.11.
    """
    with unavailable():
        server, memory = await client.info("server"), await client.info("memory")
    version = str(server["redis_version"])
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_VERSION:
        raise UnusableServer(f"the queue needs Redis >= 7.0 or Valkey >= 7.2, this server is {version}")
    policy = str(memory.get("maxmemory_policy", "noeviction"))
    if policy.startswith("allkeys-"):
        raise UnusableServer(f"maxmemory-policy is {policy}: it would drop accepted jobs; set it to noeviction")
    if policy != "noeviction":
        log.warning("maxmemory-policy is %s: a full server drops accepted jobs; set it to noeviction", policy)
    return int(memory.get("maxmemory", 0))


class Call(NamedTuple):
    """One script call."""

    script: str
    keys: Sequence[str]
    args: Sequence[Any]


class Scripts:
    """The Lua scripts, sent by hash and loaded again whenever the server does not know them."""

    def __init__(self) -> None:
        folder = resources.files("service.queue") / "scripts"
        library = (folder / "lib.lua").read_text("utf-8")
        self._sources: dict[str, str] = {}
        for name in SCRIPTS:
            first, rest = (folder / f"{name}.lua").read_text("utf-8").split("\n", 1)
            self._sources[name] = f"{first}\n{library}\n{rest}"
        self._sha: dict[str, str] = {}

    async def run(
        self, client: Redis, calls: Sequence[Call], blob: tuple[Sequence[str], blobs.Buffer, int] | None = None
    ) -> list[Any]:
        """Run calls in one round trip, after storing blob = (keys, payload, time to live in ms). Returns their replies.

        Raises the first error among them. All scripts may be repeated safely.
        """
        if not calls:
            return []
        if not self._sha:
            await self._load(client)
        for attempt in (1, 2):
            pipe = client.pipeline(transaction=False)
            if blob is not None:
                keys, payload, ttl_ms = blob
                for key, piece in zip(keys, blobs.split(payload), strict=True):
                    pipe.set(key, piece, px=ttl_ms)
            for call in calls:
                pipe.evalsha(self._sha[call.script], len(call.keys), *call.keys, *call.args)
            replies = await pipe.execute(raise_on_error=False)
            errors = [reply for reply in replies if isinstance(reply, Exception)]
            if any(isinstance(error, exceptions.NoScriptError) for error in errors) and attempt == 1:
                await self._load(client)
                continue
            if errors:
                raise errors[0]
            break
        return list(replies[-len(calls) :])

    async def one(self, client: Redis, script: str, keys: Sequence[str], *args: Any) -> Any:
        """Run a single call and return its reply."""
        return (await self.run(client, [Call(script, keys, args)]))[0]

    async def _load(self, client: Redis) -> None:
        self._sha = {name: await client.script_load(source) for name, source in self._sources.items()}
