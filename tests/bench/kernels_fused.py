"""Candidates for fusing, and whether they pay: residual + norm as one pass, GELU inside the product before it.

None of this is in the model. It goes there if a block gains a twentieth over both eager and compiled torch on a GPU.
Not tried: patchify + input projection, which is under one part in a hundred of a network of 27 blocks, once.
N rows, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from model.blocks import Block
from model.kernels import segment_starts
from model.norms import EPS, LayerNorm
from model.rope import rotary_table
from tests.bench.kernels_clock import Ceiling, Clock, Scale, short

PAYS = 1.05


@triton.jit(do_not_specialize=["rows"])
def add_norm_kernel(
    h, y, weight, bias, total, out, rows, C: tl.constexpr, MEAN: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr
):
    """total = h + y, and the norm of total, of one row. MEAN: LayerNorm; else RMSNorm, rounded before the weight."""
    row = tl.program_id(0).to(tl.int64) * C
    columns = tl.arange(0, BLOCK)
    exists = columns < C
    x = tl.load(h + row + columns, mask=exists, other=0.0).to(tl.float32)
    x += tl.load(y + row + columns, mask=exists, other=0.0).to(tl.float32)
    x = x.to(total.dtype.element_ty)
    tl.store(total + row + columns, x, mask=exists)
    x = x.to(tl.float32)
    if MEAN:
        x = tl.where(exists, x - tl.sum(x, 0) / C, 0.0)
    x = x / tl.sqrt(tl.sum(x * x, 0) / C + EPS)
    gain = tl.load(weight + columns, mask=exists, other=0.0).to(tl.float32)
    if MEAN:
        x = x * gain + tl.load(bias + columns, mask=exists, other=0.0).to(tl.float32)
    else:
        x = x.to(out.dtype.element_ty).to(tl.float32) * gain
    tl.store(out + row + columns, x.to(out.dtype.element_ty), mask=exists)


def add_norm(h: Tensor, y: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """h + y and its norm, as the block computes them one after the other. h, y: [N, C], contiguous."""
    total, out = torch.empty_like(h), torch.empty_like(h)
    width = h.shape[1]
    mean = isinstance(norm, LayerNorm)
    add_norm_kernel[(len(h),)](
        h, y, norm.weight, norm.bias if mean else None, total, out, len(h),
        C=width, MEAN=mean, EPS=EPS, BLOCK=triton.next_power_of_2(width), num_warps=4,
    )  # fmt: skip
    return total, out


def plain_add_norm(h: Tensor, y: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The same in torch."""
    h = h + y
    return h, norm(h)


def product_gelu(x: Tensor, layer: nn.Linear) -> Tensor:
    """GELU inside the library's product, of which torch has a private form; the GELU there is the tanh form."""
    bias = x.new_zeros(layer.out_features) if layer.bias is None else layer.bias
    return torch._addmm_activation(bias, x, layer.weight.T, use_gelu=True)


Join = Callable[[Tensor, Tensor, nn.Module], tuple[Tensor, Tensor]]
Starts = Sequence[int] | Tensor
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def make_step(block: Block, rotary: Tensor, starts: Starts, join: Join, *, inside: bool) -> Step:
    """A block from (h, norm1(h)) to the same for the next one: as much work as Block, cut where fusing cuts it."""
    up, down = block.mlp.mlp[0], block.mlp.mlp[2]

    def step(h: Tensor, normed: Tensor) -> tuple[Tensor, Tensor]:
        h, normed = join(h, block.attn(normed, rotary, starts), block.norm2)
        hidden = product_gelu(normed, up) if inside else F.gelu(up(normed), approximate="tanh")
        return join(h, down(hidden), block.norm1)

    return step


@torch.no_grad()
def fused_table(clock: Clock, scale: Scale, top: Ceiling, *, reserve: float) -> Iterator[str]:
    """The pass alone beside the time of its bytes, then whole blocks, of encoder and decoder.

    reserve: seconds that are to be left for what comes after.
    """
    dtype, device = torch.bfloat16, clock.device
    name, lengths = list(scale.encoder.items())[-1]
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    for side, stack in (("encoder", scale.config.encoder), ("decoder", scale.config.decoder)):
        if clock.left() < reserve:
            yield f"\nThe {side} is left out: no time"
            continue
        with torch.device(device):
            block = Block(stack).to(dtype)
        h, y = (torch.randn(starts[-1], stack.width, device=device, dtype=dtype) for _ in range(2))
        yield f"\nResidual + {stack.norm} norm of the {side}, {name} tokens:\n"
        yield from _pass_lines(clock, top, block, h, y)
        rotary = rotary_table(torch.stack([torch.arange(len(h)) % 64] * 4, 1), stack.head_width).to(device)
        yield f"\nA block of the {side}, {name} tokens:\n"
        yield from _block_lines(clock, block, h, rotary, segment_starts(starts, device))


def _pass_lines(clock: Clock, top: Ceiling, block: Block, h: Tensor, y: Tensor) -> Iterator[str]:
    moved = 4 * h.numel() * h.element_size()
    ways: dict[str, Join] = {"eager": plain_add_norm, "compiled": torch.compile(plain_add_norm), "fused": add_norm}
    if clock.device.type == "cpu":
        ways = {"eager": plain_add_norm}
    yield "| how | ms | ms of its bytes alone | share |"
    yield "|---|---|---|---|"
    for way, join in ways.items():
        try:
            ms = clock.median([lambda f=join: f(h, y, block.norm2)])
        except Exception as error:
            yield f"| {way} | {short(error)} | | |"
            continue
        yield f"| {way} | {ms:.3f} | {top.floor_ms(moved):.3f} | {top.floor_ms(moved) / ms:.2f} |"


def _block_lines(clock: Clock, block: Block, h: Tensor, rotary: Tensor, starts: Starts) -> Iterator[str]:
    normed = block.norm1(h)
    eager = make_step(block, rotary, starts, plain_add_norm, inside=False)
    ways: dict[str, Step] = {"eager": eager}
    if clock.device.type == "cuda":
        ways["compiled"] = torch.compile(eager)
        ways["residual + norm fused"] = make_step(block, rotary, starts, add_norm, inside=False)
        ways["GELU in the product"] = make_step(block, rotary, starts, plain_add_norm, inside=True)
        ways["both"] = make_step(block, rotary, starts, add_norm, inside=True)
    want = eager(h, normed)
    found: dict[str, float] = {}
    yield f"| how | ms | against eager | against compiled | pays ({PAYS} x both) |"
    yield "|---|---|---|---|---|"
    for way, step in ways.items():
        try:
            wrong = max(_apart(a, b) for a, b in zip(step(h, normed), want, strict=True))
            if wrong > 2e-2:
                yield f"| {way} | WRONG: {wrong:.1e} from eager | | | no |"
                continue
            found[way] = clock.median([lambda f=step: f(h, normed)])
        except Exception as error:
            yield f"| {way} | {short(error)} | | | no |"
            continue
        gains = [found[other] / found[way] if other in found else float("nan") for other in ("eager", "compiled")]
        pays = "" if way in ("eager", "compiled") else "yes" if min(gains) >= PAYS else "no"
        yield f"| {way} | {found[way]:.3f} | {gains[0]:.2f} x | {gains[1]:.2f} x | {pays} |"


def _apart(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())
