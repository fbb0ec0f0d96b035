"""The attention kernels: compile them ahead of time; with a GPU, check them, look for better tiles, and measure.

    python -m tests.bench.kernels [--compile-only | --rehearse]

With a GPU it takes under eight minutes and writes results/<date>-<gpu>.md. If a check is red it writes nothing, if a
part of the measuring fails the report says so; both end with status 1. --compile-only needs no GPU: every head width
and option for sm_80 to sm_100. --rehearse runs the benchmark's own code on a CPU, in small, and prints figures that
mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from tests.bench.kernels_attention import AttentionTable, search
from tests.bench.kernels_clock import BUDGET_S, FAILED, FULL, HEADS, SMALL, WIDTH, Clock, Scale, ceiling, short
from tests.bench.kernels_encoder import encoder_table
from tests.bench.kernels_linear import linear_search, linear_table
from tests.bench.kernels_peers import PEERS, SLOW_PEERS, Make
from tests.paths import ROOT

CHECKS = "random or isolation or ragged or graph or bits or hundred or fixed_linear or bench"
CHECK_S = 300  # after that a check hangs


def report(clock: Clock, scale: Scale) -> Iterator[str]:
    """All tables, after the checks; a part that fails is a line that begins with FAILED, and the others follow."""
    cuda = clock.device.type == "cuda"
    top = ceiling(clock, scale)
    yield f"torch {torch.__version__}, bfloat16, {HEADS} heads of {WIDTH}, medians of up to {scale.repeats}."
    yield f"One product of {scale.square} x {scale.square}: **{top.tflops:.0f} TFLOP/s**, the ceiling below."
    yield f"One copy of {scale.copied} bytes: {top.tbytes:.2f} TB/s read and written."
    yield "Backward = forward + backward less forward. TFLOP/s count useful operations: no padding, nothing twice."
    table = AttentionTable(clock, scale, top)
    # What comes first leaves time for what comes after: a gate before every line keeps the whole under eight minutes.
    yield from _part("Attention", lambda: _attention(table, PEERS, reserve=220, own=True))
    yield from _part("Blocks of the encoder", lambda: encoder_table(clock, scale, top, reserve=190))
    yield from _part("Products of the batch-invariant mode", lambda: linear_table(clock, scale, top, reserve=160))
    if cuda or find_spec("triton"):
        from tests.bench.kernels_fused import fused_table

        yield from _part("Would fusing pay?", lambda: fused_table(clock, scale, top, reserve=130))
    yield from _part("Peers that compile for each shape", lambda: _attention(table, SLOW_PEERS, reserve=100, own=False))
    yield from _part("Attention, the verdict", table.verdicts)
    if cuda:
        yield from _part("Tiles of attention", lambda: search(clock, scale))
        yield from _part("Tiles of the fixed product", lambda: linear_search(clock, scale))
    yield f"\n{BUDGET_S - clock.left():.0f} of {BUDGET_S} seconds, checks included."


def _attention(table: AttentionTable, peers: dict[str, Make], *, reserve: float, own: bool) -> Iterator[str]:
    yield from table.head()
    if table.clock.device.type == "cuda" or own:  # FlexAttention has no backward on a CPU
        yield from table.measure(peers, own=own, reserve=reserve)


def _part(title: str, make: Callable[[], Iterator[str]]) -> Iterator[str]:
    yield f"\n## {title}\n"
    try:
        yield from make()
    except Exception as error:
        traceback.print_exc()
        yield f"\n{FAILED}: {short(error)}"


def main() -> int:
    """Parse and run; 1 if a check is red or a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--compile-only", action="store_true")
    modes.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    if arguments.compile_only:
        return subprocess.run([sys.executable, "-m", "tests.kernels.ahead", "--all"], cwd=ROOT, check=False).returncode
    if arguments.rehearse:
        return int(_failed(_shown(report(Clock(torch.device("cpu"), SMALL.repeats), SMALL))))
    if not torch.cuda.is_available():
        print("no CUDA device; --compile-only is the part that needs none", file=sys.stderr)
        return 1
    clock = Clock(torch.device("cuda"), FULL.repeats)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels", "-k", CHECKS]
    try:
        red = subprocess.run(command, cwd=ROOT, check=False, timeout=CHECK_S).returncode
    except subprocess.TimeoutExpired:
        red = f"not done after {CHECK_S} s"
    if red:
        print(f"a check is red ({red}): nothing is measured", file=sys.stderr)
        return 1
    name = torch.cuda.get_device_name()
    lines = [
        f"# Attention kernels, {name}, {datetime.date.today()}\n",
        "`python -m tests.bench.kernels`; all checks green.\n",
    ]
    lines += _shown(report(clock, FULL))
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    (folder / f"{datetime.date.today()}-{slug}.md").write_text("\n".join(lines) + "\n")
    return int(_failed(lines))


def _shown(lines: Iterator[str]) -> list[str]:
    kept = []
    for line in lines:
        print(line, flush=True)
        kept.append(line)
    return kept


def _failed(lines: list[str]) -> bool:
    return any(FAILED in line for line in lines)


if __name__ == "__main__":
    sys.exit(main())
