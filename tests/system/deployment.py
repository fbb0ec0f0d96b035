"""Real processes of the service, as a person starts them, and ways to look at them and to hurt them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil

from tests.paths import ROOT

START_S = 90.0  # a first import of torch on a busy machine
ATOKEN = (sys.executable, "-m", "service.cli.main")
INSTALLED = (str(Path(sys.executable).with_name("atoken")),)


def wait_for(check: Callable[[], Any], what: str, timeout_s: float = 30.0) -> Any:
    """Poll until `check` gives something true, and return it."""
    give_up = time.monotonic() + timeout_s
    while time.monotonic() < give_up:
        found = check()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout_s:.0f} s: {what}")


def _mind_hangups() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Atoken:
    """One `atoken` process in a process group of its own, as in a terminal, with what it writes.

    cwd: where it is started. Use as a context manager: at the end it and all its children are killed.
    """

    def __init__(self, folder: Path, name: str, *arguments: str, cwd: Path = ROOT, **settings: object) -> None:
        self.out, self.err = folder / f"{name}.out", folder / f"{name}.err"
        environment = os.environ | {f"ATOKEN_{key.upper()}": str(value) for key, value in settings.items()}
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.popen = subprocess.Popen(
                [*(ATOKEN if cwd == ROOT else INSTALLED), *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=cwd,
                start_new_session=True,
                # Whoever started the tests under nohup ignores SIGHUP, and that is inherited; a terminal does not.
                preexec_fn=_mind_hangups,
            )
        self.process = psutil.Process(self.popen.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        family = self.family()
        for process in family:
            with_it(process.kill)
        self.popen.wait(10)
        psutil.wait_procs(family, 10)

    def family(self) -> list[psutil.Process]:
        """The process and all that descend from it."""
        try:
            return [self.process, *self.process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def child(self, text: str) -> psutil.Process:
        """The living child with this text in its command line."""

        def find() -> psutil.Process | None:
            for process in self.family()[1:]:
                try:
                    if process.status() != psutil.STATUS_ZOMBIE and text in " ".join(process.cmdline()):
                        return process
                except psutil.NoSuchProcess:
                    continue
            return None

        found: psutil.Process = wait_for(find, f"a child with {text!r}: {self.written()}")
        return found

    def url(self) -> str:
        """Where it serves; waits for the line that says so."""
        found = self.wait_until(
            lambda: re.search(r"AToken Serve .* at (http://\S+)", self.out.read_text()), "the welcome"
        )
        return str(found[1])

    def wait_ready(self) -> Self:
        """Wait until it says that it is ready."""
        self.wait_until(lambda: "\nReady at" in self.out.read_text(), "the ready line")
        return self

    def wait_until(self, check: Callable[[], Any], what: str) -> Any:
        """Poll as wait_for does, for as long as a start may take; fail at once if the process ends."""

        def find() -> Any:
            found = check()
            assert found or self.popen.poll() is None, f"ended with status {self.popen.returncode}: {self.written()}"
            return found

        return wait_for(find, what, START_S)

    def events(self, name: str) -> list[dict[str, Any]]:
        """Its log lines of one event."""
        lines = self.err.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.startswith("{") and line.endswith("}\n")]
        return [found for line in whole if (found := json.loads(line)).get("event") == name]

    def written(self) -> str:
        """The end of what it wrote."""
        return self.out.read_text()[-1500:] + self.err.read_text()[-3000:]

    def interrupt(self) -> None:
        """What Ctrl-C in a terminal does: SIGINT for the whole process group."""
        os.killpg(self.popen.pid, signal.SIGINT)


def with_it(action: Callable[[], object]) -> None:
    """Do something to a process that may have ended meanwhile."""
    with suppress(psutil.NoSuchProcess):
        action()


@contextmanager
def frozen(process: psutil.Process) -> Iterator[None]:
    """Stop a process for a while."""
    process.suspend()
    try:
        yield
    finally:
        with_it(process.resume)


def metric(client: httpx.Client, name: str, **labels: str) -> float:
    """Sum of a metric over all of its samples that have these labels."""
    total = 0.0
    for line in client.get("/metrics").text.splitlines():
        found = re.fullmatch(rf"{name}(?:\{{(.*)\}})? (\S+)", line)
        if found and all(f'{key}="{value}"' in (found[1] or "") for key, value in labels.items()):
            total += float(found[2])
    return total
