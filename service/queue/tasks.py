"""Keep Redis exchanges out of the tasks that callers may cancel."""

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from service.queue.jobs import QueueUnavailable

T = TypeVar("T")
P = ParamSpec("P")


class Tasks:
    """Tasks of one end of the queue.

    An exchange that is cut off half way leaves a reply behind for whoever uses the connection next, and on Python 3.11
    redis-py's asyncio.wait_for can swallow the cancellation. So every exchange runs in a task of ours to its end;
    callers only wait for it.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self.closed = False

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run work in a task of its own. Raises QueueUnavailable after close()."""
        if self.closed:
            work.close()
            raise QueueUnavailable("this end of the queue is closed")
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    async def own(self, work: Coroutine[Any, Any, T]) -> T:
        """Run work to its end, whatever happens to the caller."""
        return await self.join(self.spawn(work))

    async def join(self, task: asyncio.Task[T]) -> T:
        """Wait for a task of ours. Raises QueueUnavailable if close() ended it."""
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise QueueUnavailable("this end of the queue is closed") from None
            raise

    async def close(self) -> None:
        """Cancel all tasks, as often as it takes."""
        self.closed = True
        pending = set(self._tasks)
        while pending:
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=0.1)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever awaits it sees it; there may be nobody left to


class HasTasks(Protocol):
    """Something with tasks of its own."""

    _tasks: Tasks


S = TypeVar("S", bound=HasTasks)


def owned(
    method: Callable[Concatenate[S, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[S, P], Coroutine[Any, Any, T]]:
    """Make a method run in a task of its object's own."""

    async def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._tasks.own(method(self, *args, **kwargs))

    functools.update_wrapper(call, method)
    return call
