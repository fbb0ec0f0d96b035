"""The attention kernels: compile them ahead of time; with a GPU, check them, look for better tiles, and measure.

    python -m tests.bench.kernels [--compile-only | --rehearse]

With a GPU it takes under eight minutes and writes results/<date>-<gpu>.md; if a check is red it writes nothing.
--compile-only needs no GPU: every head width and option for sm_80 to sm_100. --rehearse runs the benchmark's own code
on a CPU, in small, and prints figures that mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from model import VARIANTS
from model.config import ModelConfig
from model.encoder import Encoder
from model.kernels import segment_starts
from model.rope import rotary_table
from tests.bench.kernels_peers import PEERS, Attention, ours, with_rotation
from tests.paths import ROOT

BUDGET_S = 450  # of the eight minutes: what does not fit is left out, and the report says so
HEADS, WIDTH = 16, 72
CHECKS = "random or isolation or ragged or graph or bits or hundred"


@dataclass(frozen=True)
class Scale:
    """How large the benchmark is. shapes: lengths of segments; repeats: of every timing."""

    shapes: dict[str, list[int]]
    encoder: dict[str, list[int]]
    config: ModelConfig
    square: int
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
    config=VARIANTS["so400m-continuous"],
    square=8192,
    repeats=15,
)
SMALL = Scale(
    shapes={"2 x 16": [16] * 2, "ragged": [3, 20, 9]},
    encoder={"24": [8, 16]},
    config=replace(VARIANTS["tiny-continuous"]),
    square=64,
    repeats=2,
)


class Clock:
    """Medians on the device at hand, and how much of the budget is left."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats, self.begin = device, repeats, time.monotonic()

    def left(self) -> float:
        return BUDGET_S - (time.monotonic() - self.begin)

    def median(self, calls: list[Callable[[], object]]) -> float:
        """Milliseconds of one call; the calls, on inputs of their own, are made in turns."""
        for call in calls:
            call()
        turns = itertools.islice(itertools.cycle(calls), max(self.repeats, len(calls)))
        return statistics.median(self._once(call) for call in turns)

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


def ceiling(clock: Clock, scale: Scale) -> float:
    """TFLOP/s of one large bfloat16 product."""
    a, b = (torch.randn(scale.square, scale.square, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * scale.square**3 / clock.median([lambda: a @ b]) / 1e9


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


def forward_and_backward(clock: Clock, attention: Attention, sets: list[Tensor]) -> tuple[float, float]:
    """Milliseconds of the forward alone, and of forward + backward."""
    grads = [torch.randn_like(qkv[:, 0]) for qkv in sets]

    def forward(qkv: Tensor) -> Tensor:
        with torch.no_grad():
            return attention(*qkv.unbind(1))

    def both(qkv: Tensor, grad: Tensor) -> Tensor:
        return torch.autograd.grad(attention(*qkv.unbind(1)), qkv, grad)[0]

    def calls(make: Callable[[int], Callable[[], object]]) -> list[Callable[[], object]]:
        return [make(i) for i in range(len(sets))]

    alone = clock.median(calls(lambda i: lambda: forward(sets[i])))
    return alone, clock.median(calls(lambda i: lambda: both(sets[i], grads[i])))


def attention_table(clock: Clock, scale: Scale, top: float) -> Iterator[str]:
    """Ours and the peers on every shape, as Markdown."""
    yield "| shape | attention | rotation | forward ms | forward + backward ms | TFLOP/s forward | of the ceiling |"
    yield "|---|---|---|---|---|---|---|"
    verdicts = []
    for shape, lengths in scale.shapes.items():
        sets, rotary, starts = inputs(lengths, clock.device)
        flop = 4 * HEADS * WIDTH * sum(length**2 for length in lengths)
        candidates: list[tuple[str, str, Callable[[], Attention]]] = [
            ("ours", "inside", lambda s=starts, r=rotary: ours(s, r))
        ]
        for name, make in PEERS.items():
            for fused in (True, False) if clock.device.type == "cuda" else (False,):
                label = "Triton pass" if fused else "plain torch"
                candidates.append(
                    (
                        name,
                        label,
                        lambda m=make, s=starts, r=rotary, f=fused: with_rotation(m(s, clock.device), r, fused=f),
                    )
                )
        found: dict[str, tuple[float, float]] = {}
        for name, rotation, build in candidates:
            if clock.left() < 100 and name != "ours":
                yield f"| {shape} | {name} | {rotation} | left out: no time | | | |"
                continue
            try:
                alone, both = forward_and_backward(clock, build(), sets)
            except Exception as error:  # a peer that is not there, or refuses, is a line of the report
                yield f"| {shape} | {name} | {rotation} | {_short(error)} | | | |"
                continue
            if name == "ours" or found.get(name, (alone,))[0] >= alone:
                found[name] = alone, both
            rate = flop / alone / 1e9
            yield f"| {shape} | {name} | {rotation} | {alone:.3f} | {both:.3f} | {rate:.0f} | {rate / top:.2f} |"
        verdicts.append(_verdict(shape, found))
    yield ""
    yield "| shape | forward against the best peer | backward against the best peer |"
    yield "|---|---|---|"
    yield from verdicts


def _verdict(shape: str, found: dict[str, tuple[float, float]]) -> str:
    own = found.pop("ours", None)
    if own is None or not found:
        return f"| {shape} | no peer ran | |"
    name, alone = min(((name, times[0]) for name, times in found.items()), key=lambda pair: pair[1])
    peer, back = min(((name, both - one) for name, (one, both) in found.items()), key=lambda pair: pair[1])
    return f"| {shape} | {alone / own[0]:.2f} x ({name}) | {back / (own[1] - own[0]):.2f} x ({peer}) |"


def _short(error: Exception) -> str:
    return re.sub(r"[|\s]+", " ", f"{type(error).__name__}: {error}")[:90]


def encoder_table(clock: Clock, scale: Scale, top: float) -> Iterator[str]:
    """All blocks of the encoder, without gradients: eager, compiled, as a CUDA graph."""
    yield "| tokens | how | ms | tokens/s | TFLOP/s | of the ceiling |"
    yield "|---|---|---|---|---|---|"
    dtype = torch.bfloat16
    stack = scale.config.encoder
    with torch.device(clock.device):
        blocks = Encoder(scale.config).to(dtype).blocks
    compiled = [torch.compile(block, fullgraph=True) for block in blocks]
    for name, lengths in scale.encoder.items():
        _, _, starts = inputs(lengths, clock.device, sets=0)
        rows = starts[-1]
        coords = torch.stack([torch.arange(rows) % 64] * 4, 1)
        rotary, held = rotary_table(coords, stack.head_width).to(clock.device), segment_starts(starts, clock.device)
        h = torch.randn(rows, stack.width, device=clock.device, dtype=dtype)

        def run(
            layers: list[Callable[..., Tensor]], h: Tensor = h, rotary: Tensor = rotary, held: object = held
        ) -> Tensor:
            with torch.no_grad():
                for layer in layers:
                    h = layer(h, rotary, held)
            return h

        products = 2 * rows * (4 * stack.width**2 + 2 * stack.width * stack.mlp)
        flop = stack.blocks * (products + 4 * stack.width * sum(length**2 for length in lengths))
        ways: dict[str, Callable[[], object]] = {"eager": lambda: run(list(blocks))}
        if clock.device.type == "cuda":
            ways["compiled"] = lambda: run(compiled)
            ways["CUDA graph, eager"] = lambda: _recorded(lambda: run(list(blocks)))
            ways["CUDA graph, compiled"] = lambda: _recorded(lambda: run(compiled))
        for way, call in ways.items():
            if clock.left() < 40:
                yield f"| {name} | {way} | left out: no time | | | |"
                continue
            if way.startswith("CUDA graph"):
                call = call()
            ms = clock.median([call])
            rate = flop / ms / 1e9
            yield f"| {name} | {way} | {ms:.2f} | {1000 * rows / ms:.0f} | {rate:.0f} | {rate / top:.2f} |"


def _recorded(call: Callable[[], object]) -> Callable[[], object]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def search(clock: Clock, scale: Scale) -> Iterator[str]:
    """Other tiles for head width 72 in bfloat16 than the table's. It changes nothing: who reads it edits tiles.py."""
    from model.kernels import launch, tiles

    arch = launch.device_arch(clock.device)
    yield "| kernel | tile | (a) ms | (b) ms | |"
    yield "|---|---|---|---|---|"
    shapes = [inputs(lengths, clock.device, sets=1) for lengths in list(scale.shapes.values())[:2]]
    lookup = launch.lookup
    sizes = [(128, 64, 8, 2), (128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 2)]
    sizes += [(64, 32, 4, 2), (64, 128, 8, 2), (128, 64, 4, 2)]
    for direction in ("forward", "keys", "queries"):
        used = lookup(arch, WIDTH, torch.bfloat16, direction)
        forms = [(False, False)]
        if direction == "forward":
            forms += [(True, False)] + [(False, True)] * (arch >= 90)
        candidates = [tiles.Tile(*size, *form) for form in forms for size in sizes]
        rows: list[tuple[float, str]] = []
        stop = clock.left() - 45  # seconds for each kernel
        for tile in [used, *(tile for tile in candidates if tile != used)]:
            if clock.left() < stop:
                break
            launch.lookup = lambda a, w, d, kind, t=tile, wanted=direction: (
                t if kind == wanted else lookup(a, w, d, kind)
            )
            try:
                times = [
                    forward_and_backward(clock, ours(starts, rotary), sets)[direction != "forward"]
                    for sets, rotary, starts in shapes
                ]
            except Exception as error:  # too much shared memory, most often
                rows.append((float("inf"), f"| {direction} | {tile} | {_short(error)} | | |"))
                continue
            finally:
                launch.lookup = lookup
            mark = "in the table" if tile == used else ""
            rows.append((sum(times), f"| {direction} | {tile} | {times[0]:.3f} | {times[1]:.3f} | {mark} |"))
        best = sorted(rows)[:6]
        yield from (line for _, line in best)
        if not any("in the table" in line for _, line in best):
            yield rows[0][1]


def report(clock: Clock, scale: Scale) -> Iterator[str]:
    """All tables, after the checks."""
    top = ceiling(clock, scale)
    yield f"torch {torch.__version__}, bfloat16, {HEADS} heads of {WIDTH}, medians of {scale.repeats}."
    yield f"One product of {scale.square} x {scale.square}: **{top:.0f} TFLOP/s**, the ceiling below."
    yield "Backward = forward + backward less forward."
    yield "\n## Attention\n"
    yield from attention_table(clock, scale, top)
    yield "\n## Blocks of the encoder\n"
    yield from encoder_table(clock, scale, top)
    if clock.device.type == "cuda":
        yield "\n## Tiles\n"
        yield from search(clock, scale)


def main() -> int:
    """Parse and run; 1 if a check is red."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    if arguments.compile_only:
        return subprocess.run([sys.executable, "-m", "tests.kernels.ahead", "--all"], cwd=ROOT, check=False).returncode
    if arguments.rehearse:
        for line in report(Clock(torch.device("cpu"), SMALL.repeats), SMALL):
            print(line, flush=True)
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device; --compile-only is the part that needs none", file=sys.stderr)
        return 1
    clock = Clock(torch.device("cuda"), FULL.repeats)
    checks = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels", "-k", CHECKS]
    if subprocess.run(checks, cwd=ROOT, check=False).returncode:
        print("a check is red: nothing is measured", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name()
    lines = [
        f"# Attention kernels, {name}, {datetime.date.today()}\n",
        "`python -m tests.bench.kernels`; all checks green.\n",
    ]
    for line in report(clock, FULL):
        print(line, flush=True)
        lines.append(line)
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    (folder / f"{datetime.date.today()}-{slug}.md").write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
