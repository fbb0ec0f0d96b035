"""Which kernel runs with which arguments. A plan can be launched, or compiled for a GPU that is not there.

N queries, M keys, H heads, D head width, W segments. Grids and allocations follow from shapes alone: nothing waits for
the device, and a CUDA graph can record it all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from model.kernels.attention_bwd import delta_kernel, keys_kernel, queries_kernel
from model.kernels.attention_fwd import forward_kernel
from model.kernels.plain import Gradients
from model.kernels.prepare import norm_backward_kernel, prepare_kernel
from model.kernels.tiles import Tile, lookup, split_width

PREPARE_ROWS = 32
"""Rows of a block of the passes that are bound by memory."""

NORM_BACKWARD_ROWS = 16
"""The same for the backward of the norm, which spills at 32."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch: run() starts it; tests compile it from the types of its arguments."""

    kernel: Any
    grid: tuple[int, int]
    arguments: dict[str, Tensor | TensorDescriptor | int | None]
    constants: dict[str, Any]
    warps: int
    stages: int

    def run(self) -> None:
        """Start it on the current stream."""
        if 0 in self.grid:
            return
        self.kernel[self.grid](**self.arguments, **self.constants, num_warps=self.warps, num_stages=self.stages)


@dataclass(frozen=True)
class Problem:
    """Arguments of attention: q [N, H, D], k and v [M, H, D] with the heads of a token side by side; int32 starts
    [W + 1] of queries and keys; float32 rotary tables [N, D] and [M, D], cos and sin in turns, or None; gains [H, D]
    or None; softcap 0: none. arch: compute capability, 90 for 9.0.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    starts: Tensor
    key_starts: Tensor
    q_table: Tensor | None
    k_table: Tensor | None
    q_gain: Tensor | None
    k_gain: Tensor | None
    softcap: float
    arch: int

    @property
    def width(self) -> int:
        """Channels of a head."""
        return self.q.shape[2]

    @property
    def segments(self) -> int:
        """How many segments there are."""
        return self.starts.shape[0] - 1

    def columns(self) -> dict[str, int]:
        """How a head is split, as the kernels want it."""
        head, tail = split_width(self.width)
        return {"D": self.width, "HEAD": head, "TAIL": tail}

    def attention_constants(self, tile: Tile) -> dict[str, Any]:
        """What all attention kernels want to know."""
        return {
            "SCALE": self.width**-0.5,
            "SOFTCAP": self.softcap,
            "PRECISION": "ieee",
            **self.columns(),
            "HELD": tile.held,
            "STREAMED": tile.streamed,
        }


def device_arch(device: torch.device) -> int:
    """Compute capability as a number; for the interpreter, which runs on the CPU, the oldest that is supported."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def plan_prepare(x: Tensor, table: Tensor | None, gain: Tensor | None, out: Tensor) -> Launch:
    """Norm (with a gain) and rotation (with a table) of x [N, H, D] into out, contiguous."""
    rows, heads, width = x.shape
    head, tail = split_width(width)
    return Launch(
        kernel=prepare_kernel,
        grid=(triton.cdiv(rows, PREPARE_ROWS), heads),
        arguments={
            "x": x, "out": out, "table": table, "gain": gain, "rows": rows, "heads": heads, "stride": x.stride(0) // 8
        },
        constants={
            "NORM": gain is not None, "ROTATE": table is not None, "D": width, "HEAD": head, "TAIL": tail,
            "BLOCK": PREPARE_ROWS,
        },
        warps=4,
        stages=1,
    )  # fmt: skip


def _prepared(x: Tensor, table: Tensor | None, gain: Tensor | None) -> tuple[Tensor, list[Launch]]:
    if table is None and gain is None:
        return x, []
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return out, [plan_prepare(x, table, gain, out)]


def plan_forward(problem: Problem, out: Tensor, lse: Tensor) -> list[Launch]:
    """Write out [N, H, D] and lse, float32 [H, N], in base 2."""
    p = problem
    tile = lookup(p.arch, p.width, p.q.dtype, "forward", p.softcap > 0)
    k, k_table, k_gain = p.k, p.k_table, p.k_gain
    launches: list[Launch] = []
    if tile.copies or not tile.rotate_keys:
        k, launches = _prepared(k, k_table, k_gain)
        k_table = k_gain = None
    rows, heads, _ = p.q.shape
    k_head, k_tail = _copied_blocks(k, tile)
    v_head, v_tail = _copied_blocks(p.v, tile)
    launches.append(
        Launch(
            kernel=forward_kernel,
            grid=(rows // tile.held + p.segments, heads),
            arguments={
                "q": p.q, "k": k, "v": p.v, "out": out, "lse": lse,
                "k_blocks_head": k_head, "k_blocks_tail": k_tail, "v_blocks_head": v_head, "v_blocks_tail": v_tail,
                "q_table": p.q_table, "k_table": k_table, "q_gain": p.q_gain, "k_gain": k_gain,
                "starts": p.starts, "key_starts": p.key_starts,
                "rows": rows, "keys": p.k.shape[0], "segments": p.segments, "heads": heads,
                "q_stride": p.q.stride(0) // 8, "k_stride": k.stride(0) // 8, "v_stride": p.v.stride(0) // 8,
            },
            constants={
                "NORM_Q": p.q_gain is not None, "ROTATE_Q": p.q_table is not None,
                "NORM_K": k_gain is not None, "ROTATE_K": k_table is not None,
                "COPIES": tile.copies,
                **p.attention_constants(tile),
            },
            warps=tile.warps,
            stages=tile.stages,
        )
    )  # fmt: skip
    return launches


def _copied_blocks(x: Tensor, tile: Tile) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """What the copy engine has to know of x [M, H, D]: blocks of rows of one head, in two widths."""
    if not tile.copies:
        return None, None
    head, tail = split_width(x.shape[2])
    strides = [x.stride(0), x.shape[2], 1]
    blocks = [
        TensorDescriptor(x, list(x.shape), strides, [tile.streamed, 1, width]) if width else None
        for width in (head, tail)
    ]
    return blocks[0], blocks[1]


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp in base 2, float32 [H, N]."""
    q = problem.q
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    for launch in plan_forward(problem, out, lse):
        launch.run()
    return out, lse


def plan_norm_backward(x: Tensor, grad: Tensor, gain: Tensor, dx: Tensor, dgain: Tensor) -> Launch:
    """grad: float32 [N, H, D] after the norm; dgain: float32 [ceil(N / NORM_BACKWARD_ROWS), H, D], yet to be summed."""
    rows, heads, width = x.shape
    head, tail = split_width(width)
    return Launch(
        kernel=norm_backward_kernel,
        grid=(triton.cdiv(rows, NORM_BACKWARD_ROWS), heads),
        arguments={
            "x": x, "grad": grad, "gain": gain, "dx": dx, "dgain": dgain,
            "rows": rows, "heads": heads, "stride": x.stride(0) // 8,
        },
        constants={"D": width, "HEAD": head, "TAIL": tail, "BLOCK": NORM_BACKWARD_ROWS},
        warps=4,
        stages=1,
    )  # fmt: skip


def plan_backward(
    problem: Problem, out: Tensor, lse: Tensor, grad: Tensor, dq: Tensor, dk: Tensor, dv: Tensor
) -> list[Launch]:
    """Write dq, dk and dv, contiguous; dq and dk before the backward of the norm where there is one.

    out, lse: as forward gave them; grad: of out, contiguous.
    """
    p = problem
    rows, heads, _ = p.q.shape
    keys = p.k.shape[0]
    q, prepare_q = _prepared(p.q, p.q_table, p.q_gain)
    k, prepare_k = _prepared(p.k, p.k_table, p.k_gain)
    delta = torch.empty_like(lse)
    launches = [
        *prepare_q,
        *prepare_k,
        Launch(
            kernel=delta_kernel,
            grid=(triton.cdiv(rows, PREPARE_ROWS), heads),
            arguments={"out": out, "grad": grad, "delta": delta, "rows": rows, "heads": heads},
            constants={**p.columns(), "BLOCK": PREPARE_ROWS},
            warps=4,
            stages=1,
        ),
    ]
    shared: dict[str, Tensor | TensorDescriptor | int | None] = {
        "q": q, "k": k, "v": p.v, "grad": grad, "lse": lse, "delta": delta,
        "starts": p.starts, "key_starts": p.key_starts,
        "rows": rows, "keys": keys, "segments": p.segments, "heads": heads,
        "q_stride": q.stride(0) // 8, "k_stride": k.stride(0) // 8, "v_stride": p.v.stride(0) // 8,
    }  # fmt: skip
    tile = lookup(p.arch, p.width, p.q.dtype, "keys", p.softcap > 0)
    launches.append(
        Launch(
            kernel=keys_kernel,
            grid=(keys // tile.held + p.segments, heads),
            arguments={**shared, "dk": dk, "dv": dv, "k_table": p.k_table},
            constants={"ROTATE": p.k_table is not None, **p.attention_constants(tile)},
            warps=tile.warps,
            stages=tile.stages,
        )
    )
    tile = lookup(p.arch, p.width, p.q.dtype, "queries", p.softcap > 0)
    launches.append(
        Launch(
            kernel=queries_kernel,
            grid=(rows // tile.held + p.segments, heads),
            arguments={**shared, "dq": dq, "q_table": p.q_table},
            constants={"ROTATE": p.q_table is not None, **p.attention_constants(tile)},
            warps=tile.warps,
            stages=tile.stages,
        )
    )
    return launches


def backward(problem: Problem, out: Tensor, lse: Tensor, grad: Tensor) -> Gradients:
    """All gradients, the same bits for the same input."""
    p = problem
    # Before the backward of the norm, gradients stay in float32.
    dq, dk = (
        torch.empty(x.shape, dtype=x.dtype if gain is None else torch.float32, device=x.device)
        for x, gain in ((p.q, p.q_gain), (p.k, p.k_gain))
    )
    dv = torch.empty(p.v.shape, dtype=p.v.dtype, device=p.v.device)
    for launch in plan_backward(p, out, lse, grad.contiguous(), dq, dk, dv):
        launch.run()
    dq, dq_gain = _norm_backward(p.q, dq, p.q_gain)
    dk, dk_gain = _norm_backward(p.k, dk, p.k_gain)
    return Gradients(q=dq, k=dk, v=dv, q_gain=dq_gain, k_gain=dk_gain)


def _norm_backward(x: Tensor, grad: Tensor, gain: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if gain is None:
        return grad, None
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shares = torch.empty(triton.cdiv(x.shape[0], NORM_BACKWARD_ROWS), *gain.shape, dtype=torch.float32, device=x.device)
    plan_norm_backward(x, grad, gain, dx, shares).run()
    return dx, shares.sum(0).to(gain.dtype)
