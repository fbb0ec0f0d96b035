"""x @ weight.T + bias with one tile and one order of the sum, whatever the number of rows, forward.

Libraries pick a kernel by the number of rows, and with it the order in which products are added. Here a block owns its
rows and columns from the first channel to the last and no setting follows the rows: those of an item give the same bits
whatever shares their pack. N rows, K channels in, C channels out.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import Launch
from model.kernels.tiles import lookup_linear

GROUP = 8
"""Row tiles whose programs run side by side, so that their columns of the weight stay in the L2 cache."""


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x, weight, bias, out, rows,
    COLUMNS: tl.constexpr, INNER: tl.constexpr, X_STRIDE: tl.constexpr, WEIGHT_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROW_TILE: tl.constexpr, COLUMN_TILE: tl.constexpr, INNER_TILE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of out. INNER: K; COLUMNS: C."""
    across = tl.cdiv(COLUMNS, COLUMN_TILE)
    program = tl.program_id(0)
    row_tile, column_tile = tl.swizzle2d(program // across, program % across, tl.cdiv(rows, ROW_TILE), across, GROUP)
    own = row_tile * ROW_TILE + tl.arange(0, ROW_TILE)
    columns = column_tile * COLUMN_TILE + tl.arange(0, COLUMN_TILE)
    inside, exists = own < rows, columns < COLUMNS
    inner = tl.arange(0, INNER_TILE)
    x_tile = x + own.to(tl.int64)[:, None] * X_STRIDE + inner[None, :]
    weight_tile = weight + columns.to(tl.int64)[:, None] * WEIGHT_STRIDE + inner[None, :]
    total = tl.zeros((ROW_TILE, COLUMN_TILE), tl.float32)
    for first in range(0, INNER, INNER_TILE):
        x_there, weight_there = inside[:, None], exists[:, None]
        if INNER % INNER_TILE:
            x_there = x_there & (first + inner < INNER)[None, :]
            weight_there = weight_there & (first + inner < INNER)[None, :]
        a = tl.load(x_tile + first, mask=x_there, other=0.0)
        b = tl.load(weight_tile + first, mask=weight_there, other=0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + columns, mask=exists, other=0.0).to(tl.float32)[None, :]
    to = out + own.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=inside[:, None] & exists[None, :])


def plan_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, arch: int) -> Launch:
    """x: [N, K], weight: [C, K], the channels of a row side by side; bias: [C]; out: [N, C], contiguous; one dtype."""
    rows, inner = x.shape
    columns = weight.shape[0]
    tile = lookup_linear(arch, x.dtype)
    return Launch(
        kernel=linear_kernel,
        grid=(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns), 1),
        arguments={"x": x, "weight": weight, "bias": bias, "out": out, "rows": rows},
        constants={
            "COLUMNS": columns, "INNER": inner, "X_STRIDE": x.stride(0), "WEIGHT_STRIDE": weight.stride(0),
            "PRECISION": "ieee",
            "ROW_TILE": tile.rows, "COLUMN_TILE": tile.columns, "INNER_TILE": tile.inner, "GROUP": GROUP,
        },
        warps=tile.warps,
        stages=tile.stages,
    )  # fmt: skip
