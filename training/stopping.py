"""SIGTERM: a run saves and ends at the end of its step."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_watches: list[list[int]] = []
"""What came to whoever listens first: who listens inside of it hears the same."""


@contextmanager
def terminated() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM came; the process goes on to the end of its step."""
    if _watches:
        outer = _watches[-1]
        yield lambda: bool(outer)
        return
    came: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    except ValueError:  # not in the main thread
        yield lambda: False
        return
    _watches.append(came)
    try:
        yield lambda: bool(came)
    finally:
        _watches.remove(came)
        signal.signal(signal.SIGTERM, before)
