"""`atoken serve`: the API in this process, and on one machine a worker process and a private Redis beside it.

One Ctrl-C or SIGTERM stops everything, in order: the API answers what is in flight, the worker leaves, Redis ends.
A second Ctrl-C ends everything at once.
A worker that dies is started again, up to RESTARTS times in RESTART_WINDOW_S; its jobs are run by the next one. A
worker that cannot start, or a Redis that dies, ends the rest with its reason and exit status 1.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import structlog
from fastapi import FastAPI

from service import event_loop
from service.api.app import create_app
from service.api.core import Service
from service.api.server import Server
from service.queue.jobs import QueueUnavailable
from service.queue.server import PrivateRedis
from service.settings import Settings
from service.telemetry import configure_logging, package_version
from service.worker_process import WorkerProcess

MEDIA_END_S = 2.0
"""Time for the decoder children to be gone when everything ends at once; they also die with this process."""
EXIT_INTERRUPTED = 128 + signal.SIGINT

log = structlog.get_logger(__name__)


class StartError(Exception):
    """The service cannot start; the message says why and what to do."""


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status. Call it from the main thread.

    With settings.redis_url it is the API alone; else a private Redis and a worker are started beside it. A second
    SIGINT kills them and ends this process with status 130.
    Raises StartError when the address cannot be bound, ServerError when there is no Redis to start.
    """
    with _bound(settings) as listener:
        configure_logging(settings.log_level)
        signals = _Signals()
        if settings.redis_url is not None:
            return event_loop.run(_run(settings, listener, None, signals))
        with PrivateRedis() as redis:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            complete = settings.model_copy(
                # One core is left to the API, which answers, decodes and encodes files: on two busy cores that was
                # better than two threads for one client (p50 36 against 47 ms) and for 16 (35 against 25 a second).
                update={"redis_url": redis.url, "threads": settings.threads or max(1, cores - 1)}
            )
            return event_loop.run(_run(complete, listener, redis, signals))


class _Signals:
    """SIGINT, SIGTERM and a terminal's SIGHUP, from the first child to the end of the last.

    While the event loop runs they go to a function in it. Before, the first one raises SystemExit, which closes what
    was started. After, they have nothing left to hurry.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._receive: Callable[[int], None] | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            signal.signal(signal.SIGHUP, self._on_signal)

    @contextmanager
    def sent_to(self, receive: Callable[[int], None]) -> Iterator[None]:
        """Call `receive` with the number of each signal, in the running event loop."""
        self._loop, self._receive = asyncio.get_running_loop(), receive
        try:
            yield
        finally:
            self._receive = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._loop is None:
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, signal.SIG_IGN)  # what is being closed now shall be closed
            raise SystemExit(128 + number)
        if self._receive is not None:
            self._loop.call_soon_threadsafe(self._receive, number)


class _Api(Server):
    """The API's server; signals reach it through us, since they are for its neighbours too."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Stop:
    """What a signal does: the first stops everything in order, a second Ctrl-C at once."""

    def __init__(
        self, settings: Settings, app: FastAPI, server: Server, worker: WorkerProcess | None, redis: PrivateRedis | None
    ) -> None:
        self._settings, self._app, self._server, self._worker, self._redis = settings, app, server, worker, redis
        self._is_asked = False
        self._end: asyncio.Task[None] | None = None

    def receive(self, number: int) -> None:
        """Take a signal."""
        if self._is_asked and number == signal.SIGINT:
            self._end = self._end or asyncio.create_task(self._end_at_once())
            return
        self._is_asked = True
        self._server.handle_exit(number, None)
        service = _service_of(self._app)
        waiting = service.telemetry.registry.get_sample_value("atoken_http_in_flight") if service else None
        if waiting:
            print(
                f"Stopping: {waiting:.0f} request{'s' if waiting > 1 else ''} in flight, waiting at most "
                f"{self._settings.drain_s + self._settings.shutdown_s:g} s for their answers (then 503). "
                f"Ctrl-C again ends at once.",
                flush=True,
            )

    async def _end_at_once(self) -> None:
        service = _service_of(self._app)
        if service is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(service.media.aclose(), MEDIA_END_S)
        # No await from here on: nothing else may run and complain of what is missing.
        if self._worker is not None:
            self._worker.kill()
        if self._redis is not None:
            self._redis.process.kill()
            self._redis.close()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_INTERRUPTED)


async def _run(settings: Settings, listener: socket.socket, redis: PrivateRedis | None, signals: _Signals) -> int:
    log.info("settings", **settings.printable())
    app = create_app(settings)
    server = _Api(app, settings)
    worker = WorkerProcess(settings) if redis is not None else None
    with signals.sent_to(_Stop(settings, app, server, worker, redis).receive):
        reason = await _serve(settings, listener, app, server, worker, redis)
    print(
        f"AToken Serve stopped{f': {reason}' if reason else ''}.", file=sys.stderr if reason else sys.stdout, flush=True
    )
    return 1 if reason else 0


async def _serve(
    settings: Settings,
    listener: socket.socket,
    app: FastAPI,
    server: Server,
    worker: WorkerProcess | None,
    redis: PrivateRedis | None,
) -> str | None:
    """Serve until the end; return the reason if it is not that somebody asked for it."""
    url = _print_welcome(settings, listener, is_alone=redis is None)
    api = asyncio.create_task(server.serve(sockets=[listener]))
    announcing = asyncio.create_task(_announce_ready(app, url))
    guards: list[asyncio.Task[str]] = []
    if redis is not None and worker is not None:
        guards = [asyncio.create_task(_until_dead(redis)), asyncio.create_task(worker.keep_alive())]
    reason: str | None = None
    try:
        done, _ = await asyncio.wait([api, *guards], return_when=asyncio.FIRST_COMPLETED)
        if api not in done:
            reason = next(guard.result() for guard in guards if guard.done())
            log.error("stopping", reason=reason)
            service = _service_of(app)
            if service is not None:  # requests in flight can have no answer any more
                service.draining = True
                service.stopping.set()
            server.should_exit = True
        await api
    finally:
        for task in (announcing, *guards):
            task.cancel()
        await asyncio.gather(announcing, *guards, return_exceptions=True)
        if worker is not None:
            await worker.stop()
    if reason is None and not server.started:
        reason = "the API did not start; its log has the reason"
    return reason


async def _until_dead(redis: PrivateRedis) -> str:
    while redis.process.poll() is None:
        await asyncio.sleep(0.2)
    return f"the private Redis ended with status {redis.process.returncode}"


@contextmanager
def _bound(settings: Settings) -> Iterator[socket.socket]:
    """Bind before anything is started, so that a port in use is said at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except OSError as error:
            raise StartError(
                f"cannot listen on {settings.host}:{settings.port} ({error.strerror}); choose another with --port"
            ) from None
        yield listener


def _print_welcome(settings: Settings, listener: socket.socket, *, is_alone: bool) -> str:
    host, port = listener.getsockname()[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
    shown = settings.printable()
    if is_alone:
        work = f"by workers at {shown['redis_url']}: start them with `atoken worker --redis URL`"
    else:
        work = f"by one worker here ({settings.device}, {settings.threads} threads), queue in a private Redis"
    print(
        f"AToken Serve {package_version()} at {url} (listening on {host}, documentation at /docs)\n"
        f"  models   {', '.join(settings.models) if not is_alone else 'those of the workers'}\n"
        f"  computed {work}\n"
        f"A picture to tokens and back:\n"
        f"  curl -H 'Accept: application/vnd.safetensors' -F file=@photo.jpg {url}/encode -o photo.tokens\n"
        f"  curl -H 'Accept: image/png' -H 'Content-Type: application/vnd.safetensors' "
        f"--data-binary @photo.tokens {url}/decode -o photo.png\n"
        f"Waiting for a worker. Stop with Ctrl-C.",
        flush=True,
    )
    return url


async def _announce_ready(app: FastAPI, url: str) -> None:
    begin = time.monotonic()
    while True:
        service = _service_of(app)
        with suppress(QueueUnavailable):
            if service is not None and (cards := await service.queue.models()):
                break
        await asyncio.sleep(0.1)
    names = ", ".join(f"{card['name']} ({card['device']}, {card['dtype']})" for card in cards)
    print(f"Ready at {url} after {time.monotonic() - begin:.1f} s: {names}", flush=True)


def _service_of(app: FastAPI) -> Service | None:
    """Return the running parts of the API; None until it has started."""
    found: Service | None = getattr(app.state, "service", None)
    return found
