"""Health check of a worker's container: exit 0 if the worker of this host lately said in Redis that it is ready."""

from __future__ import annotations

import asyncio
import socket
import sys

from service.queue.client import QueueClient
from service.queue.jobs import QueueUnavailable
from service.settings import Settings


async def check(redis_url: str, host: str) -> str | None:
    """Return why the worker of this host is not healthy, None if it is. Workers are named after their host."""
    client = QueueClient(redis_url, timeout_s=5.0)
    try:
        mine = [worker for worker in await client.workers() if worker.id.startswith(f"{host[:40]}-")]
    except QueueUnavailable as error:
        return str(error)
    finally:
        await client.close()
    if not mine:
        return f"no worker of host {host} is registered, or it has been silent for too long"
    unready = [worker.pool for worker in mine if not worker.ready]
    return f"not ready: {', '.join(unready)}" if unready else None


if __name__ == "__main__":
    redis_url = Settings().redis_url
    sys.exit(asyncio.run(check(redis_url, socket.gethostname())) if redis_url else "ATOKEN_REDIS_URL is not set")
