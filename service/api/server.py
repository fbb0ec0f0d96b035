"""Serve the application with uvicorn: one process a port, bounded headers, an orderly end."""

from __future__ import annotations

import asyncio
import signal
import socket
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from service.api.app import create_app
from service.api.protocol import bounded_protocol
from service.settings import Settings
from service.telemetry import configure_logging

log = structlog.get_logger("atoken.server")

PARSER_ROOM = 2
"""The parser's bound on a head, in header_bytes: it cuts off with plain text what the middleware would explain."""

LAST_WORD_S = 1.0
"""So long before the server cuts them off, requests in flight are told that it stops."""


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; returns when every request has been answered or the time for it is over.

    Raises ValueError without a redis_url, SystemExit when the port cannot be bound.
    """
    configure_logging(settings.log_level)
    log.info("settings", **settings.printable())
    server = Server(create_app(settings), settings)
    server.run()


class Server(uvicorn.Server):
    """Uvicorn with a drain: readiness goes first, then the listening socket, then the requests in flight."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        # h11 because httptools has no bound on headers. Source: serving.md section 6.6.
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                http=bounded_protocol(settings.head_timeout_s),
                ws="none",
                loop="asyncio",
                h11_max_incomplete_event_size=PARSER_ROOM * settings.header_bytes,
                limit_concurrency=settings.connections,
                timeout_keep_alive=settings.keep_alive_s,
                timeout_graceful_shutdown=settings.shutdown_s,
                access_log=False,
                log_config=None,
                server_header=False,
            )
        )
        self._app = app
        self._settings = settings

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop, on the given listening sockets or on the settings' address."""
        for listener in sockets or []:
            # Asyncio sets it only on sockets that were made with a protocol number; connections inherit it. Without it
            # each answer (headers, then body) waits 40 ms for the client's delayed ACK.
            if listener.family in (socket.AF_INET, socket.AF_INET6):
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; a second SIGINT stops at once. The process then ends with status 0, not by the signal."""
        service = getattr(self._app.state, "service", None)
        if service is None or service.draining:
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True
            return
        service.draining = True
        patience = max(0.0, self._settings.shutdown_s - LAST_WORD_S)
        loop = asyncio.get_running_loop()
        for delay, step in (
            (self._settings.drain_s, self._close),
            (self._settings.drain_s + patience, service.stopping.set),
        ):
            loop.call_soon_threadsafe(loop.call_later, delay, step)

    def _close(self) -> None:
        self.should_exit = True
