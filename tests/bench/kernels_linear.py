"""What the batch-invariant mode costs: the fixed product against the library's, and other tiles for it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import StackConfig
from model.kernels import fixed_linear
from tests.bench.kernels_clock import Ceiling, Clock, Scale, short


def layers_of(stack: StackConfig) -> dict[str, tuple[int, int]]:
    """K and C of the products of a block."""
    width = stack.width
    return {
        "qkv": (width, 3 * width), "out": (width, width), "up": (width, stack.mlp), "down": (stack.mlp, width)
    }  # fmt: skip


def _matrices(device: torch.device, rows: int, inner: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    return random(rows, inner), random(columns, inner), random(columns)


@torch.no_grad()
def linear_table(clock: Clock, scale: Scale, top: Ceiling, *, reserve: float) -> Iterator[str]:
    """Each product of a block at several numbers of rows; reserve: seconds that are to be left for what comes after."""
    yield "| rows | layer | library ms | fixed ms | times as long | TFLOP/s library, fixed | fixed of the ceiling |"
    yield "|---|---|---|---|---|---|---|"
    for rows in scale.rows:
        if clock.left() < reserve:
            yield f"| {rows} | left out: no time | | | | | |"
            continue
        whole = [0.0, 0.0]
        for name, (inner, columns) in layers_of(scale.config.encoder).items():
            given = _matrices(clock.device, rows, inner, columns)
            times = [clock.median([lambda f=f, g=given: f(*g)]) for f in (F.linear, fixed_linear)]
            whole = [total + ms for total, ms in zip(whole, times, strict=True)]
            rates = [2 * rows * inner * columns / ms / 1e9 for ms in times]
            yield (
                f"| {rows} | {name} | {times[0]:.3f} | {times[1]:.3f} | {times[1] / times[0]:.2f} "
                f"| {rates[0]:.0f}, {rates[1]:.0f} | {rates[1] / top.tflops:.2f} |"
            )
        yield f"| {rows} | **all of a block** | {whole[0]:.3f} | {whole[1]:.3f} | **{whole[1] / whole[0]:.2f}** | | |"


@torch.no_grad()
def linear_search(clock: Clock, scale: Scale) -> Iterator[str]:
    """Other tiles in bfloat16. It changes nothing: who reads it edits tiles.py."""
    from model.kernels import launch, linear_fwd
    from model.kernels.tiles import LinearTile

    used = linear_fwd.lookup_linear(launch.device_arch(clock.device), torch.bfloat16)
    sizes = [(128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3)]
    sizes += [(128, 256, 64, 8, 4), (64, 256, 64, 8, 3), (128, 128, 32, 4, 4)]
    tiles = [used, *(tile for size in sizes if (tile := LinearTile(*size)) != used)]
    layers = layers_of(scale.config.encoder)
    some = [_matrices(clock.device, rows, *layers[name]) for rows in scale.rows[1:] for name in ("qkv", "down")]
    names = [f"{name}, {rows} rows: ms" for rows in scale.rows[1:] for name in ("qkv", "down")]
    yield f"| tile | {' | '.join(names)} | |"
    yield "|---" * (len(names) + 2) + "|"
    lookup = linear_fwd.lookup_linear
    for tile in tiles:
        if clock.left() < 10:
            yield f"| {tile} | left out: no time |" + " |" * len(names)
            continue
        linear_fwd.lookup_linear = lambda *_, t=tile: t
        try:
            cells = " | ".join(f"{clock.median([lambda g=given: fixed_linear(*g)]):.3f}" for given in some)
            yield f"| {tile} | {cells} | {'in the table' if tile == used else ''} |"
        except Exception as error:  # too much shared memory, most often
            yield f"| {tile} | {short(error)} |" + " |" * len(names)
        finally:
            linear_fwd.lookup_linear = lookup
