"""`atoken serve`: the API in this process, and on one machine a worker process and a private Redis beside it.

One Ctrl-C or SIGTERM stops everything, in order: the API answers what is in flight, the worker leaves, Redis ends.
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
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

import structlog
from fastapi import FastAPI

from service.api.app import create_app
from service.api.server import Server
from service.queue.jobs import QueueUnavailable
from service.queue.server import PrivateRedis
from service.settings import Settings
from service.telemetry import configure_logging, package_version

RESTARTS, RESTART_WINDOW_S = 3, 600.0
WORKER_STOP_S = 60.0
"""Time for a worker's batch in hand; then it is killed."""
EXIT_START = 78
"""The worker's status for "starting again will not help"; defined in service.worker.main, which needs torch."""

log = structlog.get_logger(__name__)


class StartError(Exception):
    """The service cannot start; the message says why and what to do."""


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; return the exit status. Call it from the main thread.

    With settings.redis_url it is the API alone; else a private Redis and a worker are started beside it.
    Raises StartError when the address cannot be bound, ServerError when there is no Redis to start.
    """
    with _bound(settings) as listener:
        configure_logging(settings.log_level)
        signal.signal(signal.SIGTERM, _exit_now)  # until the server runs, and again after it has ended
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            signal.signal(signal.SIGHUP, lambda number, frame: signal.raise_signal(signal.SIGTERM))
        if settings.redis_url is not None:
            return asyncio.run(_run(settings, listener, None))
        with PrivateRedis() as redis:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            complete = settings.model_copy(
                # One core is left to the API, which answers, decodes and encodes files: on two busy cores that was
                # better than two threads for one client (p50 36 against 47 ms) and for 16 (35 against 25 a second).
                update={"redis_url": redis.url, "threads": settings.threads or max(1, cores - 1)}
            )
            return asyncio.run(_run(complete, listener, redis))


async def _run(settings: Settings, listener: socket.socket, redis: PrivateRedis | None) -> int:
    log.info("settings", **settings.printable())
    app = create_app(settings)
    server = Server(app, settings)
    worker = _WorkerProcess(settings) if redis is not None else None
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
            service = getattr(app.state, "service", None)
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
    print(
        f"AToken Serve stopped{f': {reason}' if reason else ''}.", file=sys.stderr if reason else sys.stdout, flush=True
    )
    return 1 if reason else 0


class _WorkerProcess:
    """The worker as a child in a session of its own: the terminal's Ctrl-C is for us, and we end it in order."""

    def __init__(self, settings: Settings) -> None:
        self._environment = os.environ | {
            "ATOKEN_REDIS_URL": settings.redis_url or "",  # not as an argument: process lists show those
            "ATOKEN_MODELS": ",".join(settings.models),
            "ATOKEN_DEFAULT_MODEL": settings.default_model,
            "ATOKEN_DEVICE": settings.device,
            "ATOKEN_DTYPE": settings.dtype,
            "ATOKEN_THREADS": str(settings.threads),
            "ATOKEN_LOG_LEVEL": settings.log_level,
        }
        self._process: asyncio.subprocess.Process | None = None
        self._starts: deque[float] = deque(maxlen=RESTARTS + 1)

    async def keep_alive(self) -> str:
        """Run the worker, again when it dies; return why it is given up."""
        while True:
            self._starts.append(time.monotonic())
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "service.worker.main", "--parent", str(os.getpid())),
                env=self._environment,
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
            status = await self._process.wait()
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
            if status == EXIT_START:
                return "the worker cannot start; its last message says why"
            if len(self._starts) == self._starts.maxlen and time.monotonic() - self._starts[0] < RESTART_WINDOW_S:
                return f"the worker ended with {how}, for the {len(self._starts)}th time in {RESTART_WINDOW_S:.0f} s"
            log.error("worker_died", how=how, detail="starting it again; its jobs are not lost")

    async def stop(self) -> None:
        """End the worker in order, or by force when that takes too long."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), WORKER_STOP_S)
        except BaseException as error:
            process.kill()
            await process.wait()
            if not isinstance(error, TimeoutError):
                raise


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
        service = getattr(app.state, "service", None)
        with suppress(QueueUnavailable):
            if service is not None and (cards := await service.queue.models()):
                break
        await asyncio.sleep(0.1)
    names = ", ".join(f"{card['name']} ({card['device']}, {card['dtype']})" for card in cards)
    print(f"Ready at {url} after {time.monotonic() - begin:.1f} s: {names}", flush=True)


def _exit_now(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
