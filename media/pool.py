"""Decoder processes that may hang, crash or eat memory without harm to anybody else.

Each child is a fresh interpreter with an empty environment and an empty working directory, that imports the decoders
and nothing else of the program, and lives under resource limits. A task that takes too long is killed with its
child; a child that dies costs one task. pebble keeps the children; there is one of its pools for each child, so
that a child killed in the middle of a message can harm no other.

This module is imported in the children too: numpy and the decoders are imported late, under the child's limits.
"""

from __future__ import annotations

import asyncio
import ctypes
import io
import os
import resource
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import context, popen_spawn_posix, reduction, resource_tracker, spawn, util
from typing import Any, Final, ParamSpec, Self, TypeVar

from pebble import ProcessExpired, ProcessPool

from media.errors import MediaError
from media.limits import Limits
from media.scratch import Scratch

P = ParamSpec("P")
R = TypeVar("R")

_START_S: Final = 20.0
"""What starting a child and moving the data may take on a busy machine, beside the task itself."""
_QUEUE_PER_WORKER: Final = 2
# Linux, <linux/prctl.h>.
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
# What an interpreter in an unusual place needs to start at all.
_KEPT_VARIABLES: Final = ("LD_LIBRARY_PATH", "PYTHONHOME")
_THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class MediaPool:
    """A fixed number of killable processes for the functions of this package.

    Belongs to one event loop. Children start in the background at once. Close it with close() or aclose(), or use
    it in `async with`.
    """

    def __init__(self, limits: Limits | None = None, workers: int | None = None) -> None:
        self.limits = limits or Limits()
        self.workers = workers if workers is not None else os.cpu_count() or 1
        if self.workers < 1:
            raise ValueError(f"a media pool needs at least one worker, not {workers}")
        self.queue_limit = self.workers * (1 + _QUEUE_PER_WORKER)
        self._closed = False
        self._pending = 0
        self._permits = asyncio.Semaphore(self.workers)
        # Empty and not writable to a child that runs as another user; nothing is ever put there.
        self._folder = Scratch("atoken-decoders-")
        os.chmod(self._folder.path, 0o500)
        # Children die with the thread that started them (PDEATHSIG): these threads live as long as the pool.
        self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix="media-pool")
        self._free = deque(_Slot(self.limits, str(self._folder.path), self._threads) for _ in range(self.workers))
        self._slots = tuple(self._free)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @property
    def pending(self) -> int:
        """Tasks that run or wait."""
        return self._pending

    async def start(self) -> None:
        """Wait until every child is up and has imported its decoders. Optional: run() waits for the one it needs."""
        await asyncio.gather(*(slot.wait_ready() for slot in self._slots))
        await asyncio.gather(*(self.run(time.sleep, 0.0) for _ in self._slots))

    async def run(self, fn: Callable[P, R], *args: P.args, timeout_s: float | None = None) -> R:  # type: ignore[valid-type]
        """Run fn(*args) in a child; fn is a module-level function. The event loop is never blocked.

        timeout_s: wall time of the task from its start, at most and by default limits.child_wall_s. Cancelling
        kills the child. Raises MediaError: fn's own, media_busy if too many wait, decode_limit if it took too much
        time or memory, corrupt_media if the child died twice, internal for any other failure of fn.
        """
        if self._closed:
            raise MediaError("shutting_down", "the media pool is closed")
        if self._pending >= self.queue_limit:
            raise MediaError(
                "media_busy",
                f"{self._pending} media files are being decoded or wait for it; try again",
                limit=self.queue_limit,
                actual=self._pending,
            )
        wall_s = min(timeout_s or self.limits.child_wall_s, self.limits.child_wall_s)
        self._pending += 1
        try:
            async with self._permits:
                # A child may die for a reason that is not in its input (out of memory on the host): one retry.
                deaths: list[_DeathError] = []
                while len(deaths) < 2:
                    try:
                        return await self._attempt(fn, args, wall_s)
                    except _DeathError as death:
                        deaths.append(death)
                if any(death.was_running for death in deaths):
                    raise MediaError("corrupt_media", "decoding the file crashed the decoder twice")
                raise MediaError("internal", "the media processes cannot start")
        finally:
            self._pending -= 1

    async def _attempt(self, fn: Callable[..., R], args: tuple[Any, ...], wall_s: float) -> R:
        if self._closed:
            raise MediaError("shutting_down", "the media pool is closed")
        slot = self._free.popleft()
        healthy = False
        try:
            await slot.wait_ready()
            future = slot.schedule(fn, args, wall_s)
            # pebble watches the child; the outer limit watches pebble.
            result = await asyncio.wait_for(asyncio.wrap_future(future), wall_s + _START_S)
            healthy = True
            return result
        except MediaError:
            healthy = True
            raise
        except TimeoutError:
            raise MediaError("decode_limit", f"decoding took longer than {wall_s:g} s", limit=wall_s) from None
        except ProcessExpired as error:
            if error.exitcode == -signal.SIGXCPU:
                raise MediaError(
                    "decode_limit",
                    f"decoding took more than {self.limits.child_cpu_s:g} s of processor time",
                    limit=self.limits.child_cpu_s,
                ) from None
            raise _DeathError(was_running=True) from None
        except (BrokenProcessPool, RuntimeError, OSError):
            # pebble's way to say that the child died while it was idle, starting or being given the task.
            raise _DeathError(was_running=False) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and not (task and task.cancelling()):
                raise MediaError("shutting_down", "the media pool was closed") from None
            raise
        finally:
            if not healthy and not self._closed:
                slot.restart()
            self._free.append(slot)

    def close(self) -> None:
        """Kill the children and wait until they are gone; running tasks end with shutting_down. Blocks for less
        than a second as a rule; from a coroutine use aclose().
        """
        if self._closed:
            return
        self._closed = True
        for slot in self._slots:
            slot.abandon()
        self._end()

    async def aclose(self) -> None:
        """close() for coroutines."""
        if self._closed:
            return
        self._closed = True
        for slot in self._slots:
            slot.abandon()
        await asyncio.to_thread(self._end)

    def _end(self) -> None:
        stops = [self._threads.submit(slot.stop) for slot in self._slots]
        for stop in stops:
            stop.result()
        self._threads.shutdown()
        self._folder.remove()


class _DeathError(Exception):
    def __init__(self, *, was_running: bool) -> None:
        super().__init__()
        self.was_running = was_running


class _Slot:
    """One child and the pebble pool of one that keeps it. ready: done when the pool can take a task."""

    def __init__(self, limits: Limits, folder: str, threads: ThreadPoolExecutor) -> None:
        self._limits, self._folder, self._threads = limits, folder, threads
        self._pool: ProcessPool | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._running: set[Future[Any]] = set()
        self.ready: Future[None] = threads.submit(self._start)

    async def wait_ready(self) -> None:
        """Wait until the pool can take a task; raises what kept it from starting."""
        # Shielded: who gives up waiting must not cancel the start for the next.
        await asyncio.shield(asyncio.wrap_future(self.ready))

    def schedule(self, fn: Callable[..., R], args: tuple[Any, ...], wall_s: float) -> Future[R]:
        """Hand a task to the child."""
        if self._pool is None:
            raise RuntimeError("the child did not start")
        future: Future[R] = self._pool.schedule(_run_task, (fn, args, self._limits.child_cpu_s), timeout=wall_s)
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        return future

    def restart(self) -> None:
        """Replace the child, in the background."""
        self.ready = self._threads.submit(self._restart)

    def abandon(self) -> None:
        """Let nobody wait for the running task any longer."""
        self._closed = True
        for future in tuple(self._running):
            future.cancel()

    def stop(self) -> None:
        """Kill the child. Blocks."""
        with self._lock:
            pool, self._pool = self._pool, None
            if pool is not None:
                pool.stop()  # type: ignore[no-untyped-call]  # pebble's annotations have gaps
                pool.join()

    def _start(self) -> None:
        arguments = (self._limits, self._folder, os.getpid())
        with self._lock:
            if self._closed:
                return
            pool = ProcessPool(1, self._limits.child_max_tasks, _prepare_child, arguments, context=_BareSpawnContext())
            # pebble starts its child with the first task, in the thread that brings it.
            pool.schedule(os.getpid)
            self._pool = pool

    def _restart(self) -> None:
        self.stop()
        self._start()


class _BarePopen(popen_spawn_posix.Popen):
    """Starts a child that inherits neither the environment nor the main module of its parent.

    The standard library would import the parent's main script in the child (a server, or a training run with
    torch) and hand over every variable (keys and passwords).
    """

    def _launch(self, process_obj: Any) -> None:
        tracker = resource_tracker.getfd()
        handed_over: list[int] = self._fds  # type: ignore[attr-defined]  # typeshed does not know it
        setup = spawn.get_preparation_data("media")
        for key in ("init_main_from_name", "init_main_from_path"):
            setup.pop(key, None)
        setup["sys_argv"] = [""]
        message = io.BytesIO()
        context.set_spawning_popen(self)
        try:
            reduction.dump(setup, message)
            reduction.dump(process_obj, message)
        finally:
            context.set_spawning_popen(None)
        # The child reads its start message from one pipe; the other closes when it ends.
        message_out, message_in = os.pipe()
        alive_out, alive_in = os.pipe()
        try:
            inherited = {*handed_over, tracker, message_out, alive_in}
            executable, *options = spawn.get_command_line(tracker_fd=tracker, pipe_handle=message_out)
            command = [executable, "-P", *options]  # no code from the folder it is started in
            variables = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
            variables.update(dict.fromkeys(_THREAD_VARIABLES, "1"), LC_ALL="C.UTF-8")
            self.pid = os.posix_spawn(
                spawn.get_executable(),
                command,
                variables,
                file_actions=[(os.POSIX_SPAWN_DUP2, number, number) for number in inherited],
                # A terminal's Ctrl-C is for its parent; before it can ignore it, it would die of it with a traceback.
                setpgroup=0,
            )
        except BaseException:
            os.close(alive_out)
            os.close(message_in)
            raise
        finally:
            os.close(message_out)
            os.close(alive_in)
        self.sentinel = alive_out
        self.finalizer = util.Finalize(self, _close, (alive_out, message_in))
        with open(message_in, "wb", closefd=False) as pipe:
            pipe.write(message.getbuffer())


def _close(*numbers: int) -> None:
    for number in numbers:
        os.close(number)


class _BareProcess(context.SpawnProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802  # the standard library's name
        return _BarePopen(process_obj)


class _BareSpawnContext(context.SpawnContext):
    Process = _BareProcess


def _prepare_child(limits: Limits, folder: str, parent: int) -> None:
    """First thing in a child: import the decoders, then give up what decoding does not need."""
    os.environ.clear()
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, "1"))
    sys.dont_write_bytecode = True
    # The default action kills at once, also inside a decoder's loop; Python's own handlers would wait for its end.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    import av.logging

    import media.decode  # noqa: F401  # and with it numpy, Pillow and PyAV

    av.logging.set_level(None)
    os.chdir(folder)
    os.nice(5)
    taken = 0
    if sys.platform == "linux":
        control = ctypes.CDLL(None, use_errno=True).prctl
        control(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        control(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)  # it died before the signal was ordered
        with open("/proc/self/statm", encoding="ascii") as status:
            taken = int(status.read().split()[0]) * resource.getpagesize()
        # Address space that the libraries have mapped is not memory used: the limit is for what comes on top.
        most = taken + limits.child_memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        # No further process or thread.
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits.child_open_files, limits.child_open_files))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _run_task(fn: Callable[..., R], args: tuple[Any, ...], cpu_s: float) -> R:
    """In the child: run one task under its own share of processor time; only MediaError leaves."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    # The limit counts from the start of the process, a child runs many tasks: move it.
    soft = int(used.ru_utime + used.ru_stime + cpu_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))
    try:
        return fn(*args)
    except MediaError:
        raise
    except MemoryError:
        raise MediaError("decode_limit", "decoding needs more memory than a decoder may take") from None
    except Exception as error:
        raise MediaError("internal", f"the media task failed ({type(error).__name__})") from None
