"""What a run leaves to look at: configuration, environment, metrics.jsonl, pictures, TensorBoard; a console line."""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from media.types import UInt8Array


def environment(world: int) -> dict[str, Any]:
    """Versions and machine, as plain values."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "processes": world,
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }


def space_left(folder: Path) -> str:
    """What the file system has left, to be put behind an error; nothing where it cannot be asked."""
    try:
        return f" ({shutil.disk_usage(folder).free / 1e6:,.1f} MB free in {folder})"
    except OSError:
        return ""


class RunFolder:
    """Writer of a run's records; only the first rank has one. TensorBoard is written if the package is there.

    Raises OSError where the folder cannot be written to at the start. Later a record that cannot be written is said by
    `log`, once, and the run goes on; the next one is tried again. Not TensorBoard's: its thread ends with its first
    error, and the next stage has a new one.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], world: int, log: Callable[[str], None] = print) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.log = log
        self._missed: set[str] = set()
        self._write("config.json", config)
        self._write("environment.json", environment(world))
        self._board = _board(folder / _BOARD)
        self._marks: tuple[float, int] | None = None

    def metrics(self, stage: str, step: int, steps: int, values: Mapping[str, float]) -> str:
        """Append a line; returns the console line, with throughput and the time that is left."""
        record = {"stage": stage, "step": step, "time": round(time.time(), 3), **values}
        with self._spared("metrics.jsonl"):
            append_line(self.folder / "metrics.jsonl", json.dumps(record) + "\n")
        with self._spared(_BOARD):
            if self._board is not None:
                for name, value in values.items():
                    self._board.add_scalar(f"{stage}/{name}", value, step)
        now = time.monotonic()
        speed = ""
        if self._marks is not None and step > self._marks[1]:
            a_step = (now - self._marks[0]) / (step - self._marks[1])
            speed = f"  {values.get('tokens', 0) / a_step:,.0f} tokens/s  {_clock((steps - step) * a_step)} left"
        self._marks = (now, step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if name not in ("tokens", "samples"))
        return f"{stage} {step}/{steps}  {shown}{speed}"

    def picture(self, stage: str, name: str, step: int, pixels: Tensor) -> Path:
        """Save a grid, uint8 [H, W, 3], as STAGE-NAME-STEP.png."""
        path = self.folder / "pictures" / f"{stage}-{name}-{step:06d}.png"
        array: UInt8Array = pixels.numpy()
        with self._spared("pictures"):
            path.parent.mkdir(exist_ok=True)
            PIL.Image.fromarray(array).save(path)
        with self._spared(_BOARD):
            if self._board is not None:
                self._board.add_image(f"{stage}/{name}", pixels, step, dataformats="HWC")
        return path

    def close(self) -> None:
        """Flush what is buffered."""
        with self._spared(_BOARD):
            if self._board is not None:
                self._board.close()

    @contextmanager
    def _spared(self, what: str) -> Iterator[None]:
        """A full disk costs a record, not the run."""
        try:
            yield
        except OSError as error:
            if what not in self._missed:
                self.log(f"{what} not written: {error}{space_left(self.folder)}; the run goes on without")
            self._missed.add(what)

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        (self.folder / name).write_text(json.dumps(values, indent=1, default=str) + "\n")


_BOARD = "tensorboard"


def append_line(path: Path, line: str) -> None:
    """All of a line or nothing of it: the next one must not be glued to a half."""
    data = line.encode()
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(data) < len(data):  # what a disk does that has room for a part
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                file.truncate(before)
            raise


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
