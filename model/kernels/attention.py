"""The door to attention: checks what it is given and picks the path.

N queries, M keys (M = N but for a cached prefix), H heads, D head width, W segments.
On a CUDA device the Triton kernels run, always; on a CPU torch's own attention does.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from model.errors import ShapeError
from model.kernels import ops, plain, sdpa, tiles

_CUDA_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Sequence[int] | Tensor,
    *,
    key_starts: Sequence[int] | Tensor | None = None,
    rotary: Tensor | None = None,
    key_rotary: Tensor | None = None,
    q_gain: Tensor | None = None,
    k_gain: Tensor | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Let every query attend to all keys of its own segment.

    q: [N, H, D]; k, v: [M, H, D]; one dtype, the heads of a token side by side (views of one qkv tensor are). starts:
    W + 1 segment starts, first 0, last N; a tensor of them (int32, on q's device) is taken as it is, so that nothing
    waits for the device and a graph can record the call. key_starts: the same for the keys where they are longer than
    the queries (a cached prefix); default: starts. rotary, key_rotary: float32 [N, D] and [M, D] of rotary_table; None:
    no rotation; key_rotary defaults to rotary. q_gain, k_gain: [H, D] of the norm of each head;
    None: no norm. softcap: scores s become softcap * tanh(s / softcap); 0: they do not.
    The norm, then the rotation, are computed in float32 and rounded to q's dtype, as published.
    Returns [N, H, D] in q's dtype. Raises ShapeError (a ValueError) for what does not fit, UnsupportedError for a head
    width that the CUDA kernels do not have.
    """
    if torch.is_autocast_enabled(q.device.type):  # custom ops are not cast by autocast
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    key_starts = starts if key_starts is None else key_starts
    key_rotary = rotary if key_rotary is None else key_rotary
    _check(q, k, v, rotary, key_rotary, q_gain, k_gain, softcap)
    own, other = _starts("starts", starts, q), _starts("key_starts", key_starts, k)
    if len(own) != len(other):
        raise ShapeError(f"{len(own)} starts and {len(other)} key_starts; wanted as many")
    if not isinstance(own, Tensor) and not isinstance(other, Tensor) and softcap == 0:
        q, k = plain.prepare(q, rotary, q_gain), plain.prepare(k, key_rotary, k_gain)
        return sdpa.packed_attention(q, k, v, own, other)
    own, other = (torch.as_tensor(x, dtype=torch.int32, device=q.device) for x in (own, other))
    out, _ = ops.packed_attention(q, k, v, own, other, rotary, key_rotary, q_gain, k_gain, softcap)
    return out


def segment_starts(starts: Sequence[int], device: torch.device) -> Sequence[int] | Tensor:
    """Starts in the form that packed_attention likes best on a device: do this once per forward, not once per layer.

    Raises ShapeError for what no pack can have: on the device it is not looked at again.
    """
    if len(starts) < 1 or starts[0] != 0 or any(b < a for a, b in itertools.pairwise(starts)):
        raise ShapeError(f"starts of {list(starts)[:8]}...; wanted non-decreasing from 0")
    if device.type == "cpu":
        return starts
    return torch.tensor(starts, dtype=torch.int32).to(device, non_blocking=True)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Tensor | None,
    key_rotary: Tensor | None,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    softcap: float,
) -> None:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[1:] != k.shape[1:]:
        raise ShapeError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; wanted [N, H, D], twice [M, H, D]"
        )
    if 0 in q.shape:
        raise ShapeError(f"q {tuple(q.shape)}; wanted at least one token, head and channel")
    allowed = _CUDA_DTYPES if q.is_cuda else (*_CUDA_DTYPES, torch.float64)
    if q.dtype not in allowed or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ShapeError(f"q {q.dtype}, k {k.dtype}, v {v.dtype}; wanted one of {allowed} for all three")
    if q.is_cuda:
        tiles.split_width(q.shape[2])
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.device != q.device:
            raise ShapeError(f"{name} on {x.device}, q on {q.device}; wanted one device")
        heads_apart = x.shape[1] > 1 and x.stride(1) != x.shape[2]
        if x.stride(2) != 1 or heads_apart or (x.shape[0] > 1 and x.stride(0) % 8):
            raise ShapeError(
                f"{name} with strides {x.stride()}; wanted the heads of a token side by side, {(x.shape[2], 1)}, "
                "and a multiple of 8 from token to token (contiguous, or a view of a qkv tensor)"
            )
    for name, table, rows in (("rotary", rotary, q.shape[0]), ("key_rotary", key_rotary, k.shape[0])):
        wanted = (rows, q.shape[2])
        if table is not None and (table.shape != wanted or table.dtype != torch.float32 or not table.is_contiguous()):
            raise ShapeError(
                f"{name} {table.dtype} {tuple(table.shape)}; wanted float32 {wanted} of rotary_table, contiguous"
            )
    for name, gain in (("q_gain", q_gain), ("k_gain", k_gain)):
        if gain is not None and (gain.shape != q.shape[1:] or not gain.is_floating_point() or not gain.is_contiguous()):
            raise ShapeError(f"{name} {gain.dtype} {tuple(gain.shape)}; wanted floats {tuple(q.shape[1:])}, contiguous")
    if not 0 <= softcap < float("inf"):
        raise ShapeError(f"softcap {softcap}; wanted 0 (none) or more")


def _starts(name: str, starts: Sequence[int] | Tensor, x: Tensor) -> Sequence[int] | Tensor:
    """Refuse starts that do not fit. What a CUDA tensor holds is not looked at: that would wait for the device.

    The kernels keep inside of q, k and v whatever it holds; with wrong starts, rows that no segment owns come back as
    whatever the memory held.
    """
    if isinstance(starts, Tensor):
        if starts.ndim != 1 or len(starts) < 1 or starts.dtype != torch.int32 or starts.device != x.device:
            raise ShapeError(
                f"{name} {starts.dtype} {tuple(starts.shape)} on {starts.device}; wanted int32 [W + 1] on {x.device}"
            )
        if starts.is_cuda or torch.compiler.is_compiling():
            return starts
    ends = starts.tolist() if isinstance(starts, Tensor) else starts
    if len(ends) < 1 or ends[0] != 0 or ends[-1] != len(x) or any(b < a for a, b in itertools.pairwise(ends)):
        raise ShapeError(f"{name} of {list(ends)[:8]}...; wanted non-decreasing from 0 to {len(x)}")
    return starts
