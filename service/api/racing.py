"""Wait for work, but no longer than its client, its deadline and this process last."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from service.errors import Problem

T = TypeVar("T")


async def race(
    work: Coroutine[Any, Any, T], request: Request, *, remaining_s: float, late: Problem, stopping: asyncio.Event
) -> T:
    """Return the result of work; cancel it, and wait until it has cleaned up, when something else comes first.

    The request's body must have been read: the next message on its channel is then that the client left.
    Raises what work raises, ClientDisconnect, Problem shutting_down, or late after remaining_s.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request.receive))
    stop = asyncio.ensure_future(stopping.wait())
    everything: set[asyncio.Future[Any]] = {task, gone, stop}
    try:
        await asyncio.wait(everything, timeout=max(remaining_s, 0.0), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientDisconnect
        if stop.done():
            raise Problem("shutting_down", "the service is stopping; send the request again", retry_after=1.0)
        raise late
    finally:
        for future in everything:
            future.cancel()
        await asyncio.gather(*everything, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
