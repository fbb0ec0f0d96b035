"""The one thread that computes, and how the rest of the worker sees that it still moves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from torch.nn import Module
from torch.nn.modules.module import register_module_forward_pre_hook

P = ParamSpec("P")
R = TypeVar("R")


class Abandoned(BaseException):
    """What ran in the model's thread was ended: nobody waits for it. No Exception, since no item of it is at fault."""


class ModelThread:
    """Runs calls one after the other in a thread of its own, so that Redis is answered while the model computes.

    It counts as moving whenever a layer of a network starts: a large batch may take minutes, a layer may not. There it
    can also be ended early.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._moved: float | None = None
        self._is_abandoned = False
        self._hook = register_module_forward_pre_hook(self._on_layer)

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Return function(*args, **kwargs), computed in the thread. Raises Abandoned."""
        self._is_abandoned = False
        self._moved = time.monotonic()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, lambda: function(*args, **kwargs))
        finally:
            self._moved = None

    @property
    def stalled_s(self) -> float:
        """Seconds since the running call last began a layer; 0 when nothing runs."""
        moved = self._moved
        return 0.0 if moved is None else time.monotonic() - moved

    def abandon(self) -> None:
        """End the running call with Abandoned where the next layer begins."""
        self._is_abandoned = True

    def close(self) -> None:
        """Give the thread up; a call that runs is waited for."""
        self._hook.remove()
        self._executor.shutdown()

    def _on_layer(self, module: Module, inputs: Any) -> None:
        if self._moved is not None:
            self._moved = time.monotonic()
            if self._is_abandoned:
                raise Abandoned
