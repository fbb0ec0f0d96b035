"""The event loop of the long-running processes: uvloop where it exists.

Measured at 32 clients: a tenth less processor time a request in the API, a fifth less in the worker's own thread.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` to its end, as asyncio.run does."""
    try:
        factory = importlib.import_module("uvloop").new_event_loop
    except ImportError:  # Windows
        factory = None
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)
