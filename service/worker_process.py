"""The worker that `atoken serve` keeps beside its API: a child process, started again when it dies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections import deque
from contextlib import suppress
from typing import Any

import structlog

from service.settings import Settings

RESTARTS, RESTART_WINDOW_S = 3, 600.0
STOP_S = 2.0
"""Time for a worker to leave. It is told when the API has answered everybody: nobody waits for its batch in hand."""
EXIT_START = 78
"""The worker's status for "starting again will not help"; defined in service.worker.main, which needs torch."""
CAUSE_LINES = 5
"""An error that a worker logged longer before its end was not its end."""
LOG_END_S = 1.0
"""For the last of its log; a process of its own that outlives it would keep the pipe open."""

log = structlog.get_logger(__name__)


class WorkerProcess:
    """The worker as a child in a session of its own: the terminal's Ctrl-C is for us, and we end it in order.

    One at a time: the next takes over what a dead one held, at once.

    Its log passes through ours, so that a person can be told in a line of what it died.
    """

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
        self._log: asyncio.Task[str] | None = None
        self._starts: deque[float] = deque(maxlen=RESTARTS + 1)

    async def keep_alive(self) -> str:
        """Run the worker, again when it dies; return why it is given up."""
        while True:
            self._starts.append(time.monotonic())
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                # -P: a service takes no code from the folder it is started in.
                *("-P", "-m", "service.worker.main", "--parent", str(os.getpid())),
                env=self._environment,
                stdin=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
            assert self._process.stderr is not None
            self._log = asyncio.create_task(_pass_on(self._process.stderr))
            status = await self._process.wait()
            cause = find_cause(await self._end_of_log())
            if status == EXIT_START:
                return f"the worker cannot start: {cause or 'it did not say why'}"
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
            said = f"the worker ended with {how}{f' ({cause})' if cause else ''}"
            if len(self._starts) == self._starts.maxlen and time.monotonic() - self._starts[0] < RESTART_WINDOW_S:
                return f"{said}, for the {len(self._starts)}th time in {RESTART_WINDOW_S:.0f} s"
            log.error("worker_died", how=how, cause=cause, detail="starting it again; its jobs are not lost")
            print(f"{said[0].upper()}{said[1:]}; starting it again.", file=sys.stderr, flush=True)

    async def stop(self) -> None:
        """End the worker in order, or by force when that takes over STOP_S."""
        process = self._process
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_S)
        except BaseException as error:
            self.kill()
            await process.wait()
            if not isinstance(error, TimeoutError):
                raise
        await self._end_of_log()

    def kill(self) -> None:
        """End the worker at once."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()

    async def _end_of_log(self) -> str:
        if self._log is None:
            return ""
        done, _ = await asyncio.wait([self._log], timeout=LOG_END_S)
        return self._log.result() if done else ""


async def _pass_on(stream: asyncio.StreamReader) -> str:
    """Write what comes to our own stderr, in whole lines; return the end of it."""
    rest = tail = b""
    while chunk := await stream.read(1 << 16):
        whole, end, rest = (rest + chunk).rpartition(b"\n")
        _write(whole + end)
        tail = (tail + whole + end)[-(1 << 16) :]
    _write(rest)
    return (tail + rest).decode(errors="replace")


def _write(data: bytes) -> None:
    with suppress(OSError):  # nobody reads our stderr any more: the worker's must be read all the same
        sys.stderr.buffer.write(data)
        sys.stderr.flush()


def find_cause(text: str) -> str:
    """Return in a line why a worker ended: what its last error or traceback says; "" when it said nothing.

    text: the end of its log, JSON objects and plain lines.
    """
    last = text.strip().splitlines()[-CAUSE_LINES:]
    if last and not last[-1].startswith("{"):  # the end of a traceback, or the last word of a library
        return last[-1].strip()
    for line in reversed(last):
        entry = _parse(line)
        if entry.get("level") in ("error", "critical"):
            said = entry.get("detail") or str(entry.get("exception") or "").strip().rpartition("\n")[2]
            return str(said or entry.get("event"))
    return ""


def _parse(line: str) -> dict[str, Any]:
    with suppress(ValueError):
        entry = json.loads(line)
        if isinstance(entry, dict):
            return entry
    return {}
