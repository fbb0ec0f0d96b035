"""What a run leaves to look at: configuration, environment, metrics.jsonl, pictures, TensorBoard; a console line."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Mapping
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


class RunFolder:
    """Writer of a run's records; only the first rank has one. TensorBoard is written if the package is there."""

    def __init__(self, folder: Path, config: Mapping[str, Any], world: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._write("config.json", config)
        self._write("environment.json", environment(world))
        self._board = _board(folder / "tensorboard")
        self._marks: tuple[float, int] | None = None

    def metrics(self, stage: str, step: int, steps: int, values: Mapping[str, float]) -> str:
        """Append a line; returns the console line, with throughput and the time that is left."""
        record = {"stage": stage, "step": step, "time": round(time.time(), 3), **values}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
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
        folder = self.folder / "pictures"
        folder.mkdir(exist_ok=True)
        path = folder / f"{stage}-{name}-{step:06d}.png"
        array: UInt8Array = pixels.numpy()
        PIL.Image.fromarray(array).save(path)
        if self._board is not None:
            self._board.add_image(f"{stage}/{name}", pixels, step, dataformats="HWC")
        return path

    def close(self) -> None:
        """Flush what is buffered."""
        if self._board is not None:
            self._board.close()

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        (self.folder / name).write_text(json.dumps(values, indent=1, default=str) + "\n")


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
