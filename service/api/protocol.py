"""Uvicorn's HTTP/1.1 protocol with a bound on the time for a request's head, which uvicorn does not have.

Without it a thousand connections that send half a line each keep everybody else out (`ATOKEN_CONNECTIONS`).
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


def bounded_protocol(head_timeout_s: float) -> type[H11Protocol]:
    """Return the protocol that closes a connection whose head does not come whole within so many seconds.

    The time runs from the connection's start, and on a kept connection from the first byte of its next request.
    """

    class BoundedProtocol(H11Protocol):
        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
            super().connection_made(transport)
            self._expect_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is h11.IDLE:
                self._expect_head()
            else:
                self._forget_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget_timer()
            super().connection_lost(exc)

        def _expect_head(self) -> None:
            if self.timer is None:
                self.timer = self.loop.call_later(head_timeout_s, self.transport.close)

        def _forget_timer(self) -> None:
            if self.timer is not None:
                self.timer.cancel()
                self.timer = None

    return BoundedProtocol
