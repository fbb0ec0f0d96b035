"""What the tables of `tests.bench.kernels` share: sizes, inputs, medians on a device, and the time that is left."""

from __future__ import annotations

import itertools
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model import VARIANTS
from model.config import ModelConfig
from model.rope import rotary_table

BUDGET_S = 450  # of the eight minutes: what does not fit is left out, and the report says so
HEADS, WIDTH = 16, 72
FAILED = "**FAILED**"
MEDIAN_S = 0.4  # of one timing: slow calls are repeated less often, but five times


@dataclass(frozen=True)
class Scale:
    """How large the benchmark is. shapes: lengths of segments; rows: of products; repeats: of every timing."""

    shapes: dict[str, list[int]]
    encoder: dict[str, list[int]]
    rows: tuple[int, ...]
    config: ModelConfig
    square: int
    copied: int
    repeats: int


def _mixed(total: int, longest: int) -> list[int]:
    """Lognormal lengths (median 300, sigma 1) from 16 to `longest`."""
    draw = random.Random(0)
    lengths: list[int] = []
    while sum(lengths) < total:
        length = int(min(max(draw.lognormvariate(5.7, 1.0), 16), longest))
        lengths.append(min(length, total - sum(lengths)))
    return lengths


FULL = Scale(
    shapes={
        "(a) 128 x 256": [256] * 128,
        "(b) 32 x 1024": [1024] * 32,
        "(c) 8 x 4096": [4096] * 8,
        "(d) lognormal, 32k": _mixed(32768, 4096),
        "(e) 1 x 32k": [32768],
    },
    encoder={"8k": [256] * 32, "32k": [256] * 128},
    rows=(256, 2048, 32768),
    config=VARIANTS["so400m-continuous"],
    square=8192,
    copied=1 << 30,
    repeats=15,
)
SMALL = Scale(
    shapes={"2 x 16": [16] * 2, "ragged": [3, 20, 9]},
    encoder={"24": [8, 16]},
    rows=(5,),
    config=VARIANTS["tiny-continuous"],
    square=64,
    copied=1 << 12,
    repeats=2,
)


class Clock:
    """Medians on the device at hand, and how much of the budget is left."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats, self.begin = device, repeats, time.monotonic()

    def left(self) -> float:
        return BUDGET_S - (time.monotonic() - self.begin)

    def median(self, calls: Sequence[Callable[[], object]]) -> float:
        """Milliseconds of one call; the calls, on inputs of their own, are made in turns."""
        for call in calls:  # compiles, and fills the allocator's cache
            call()
        times: list[float] = []
        for call in itertools.islice(itertools.cycle(calls), max(self.repeats, len(calls))):
            times.append(self._once(call))
            if len(times) >= 5 and sum(times) > 1000 * MEDIAN_S:
                break
        return statistics.median(times)

    def _once(self, call: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end)
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start)


@dataclass(frozen=True)
class Ceiling:
    """What this device reached in this run: TFLOP/s of one large bfloat16 product, TB/s of one large copy."""

    tflops: float
    tbytes: float

    def floor_ms(self, moved: int) -> float:
        """Milliseconds that this many bytes take, read and written together."""
        return moved / self.tbytes / 1e9


def ceiling(clock: Clock, scale: Scale) -> Ceiling:
    """Measure it."""
    a, b = (torch.randn(scale.square, scale.square, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.zeros(scale.copied, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    product, copy = clock.median([lambda: a @ b]), clock.median([lambda: target.copy_(source)])
    return Ceiling(2 * scale.square**3 / product / 1e9, 2 * scale.copied / copy / 1e9)


def inputs(lengths: list[int], device: torch.device, sets: int = 3) -> tuple[list[Tensor], Tensor, list[int]]:
    """Some qkv tensors [N, 3, H, D], the rotary table, the starts."""
    torch.manual_seed(0)
    starts = [0, *itertools.accumulate(lengths)]
    qkv = [
        torch.randn(starts[-1], 3, HEADS, WIDTH, device=device, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(sets)
    ]
    side = 64
    places = torch.arange(starts[-1])
    coords = torch.stack([places * 0, places // side % side, places % side, places * 0], 1)
    return qkv, rotary_table(coords, WIDTH).to(device), starts


def short(error: Exception) -> str:
    """One cell of a table."""
    return re.sub(r"[|\s]+", " ", f"{type(error).__name__}: {error}")[:90]
