"""Packed inputs by name, the exact answer for them, and how far an answer may be from it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.kernels import launch, naive
from model.kernels.plain import Gradients
from model.rope import rotary_table

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

LENGTHS = {
    "one": [1],
    "around a dot's 16 rows": [15, 16, 17],
    "around a tile": [63, 64, 65, 127, 128, 129],
    "mixed": [0, 1, 15, 16, 17, 72, 200],
    "empty first": [0, 0, 33],
    "empty last": [33, 0],
    "empty middle": [20, 0, 0, 31],
    "long and short": [300, 1, 1, 1],
}

# Worst row (of one token and head) and all rows together, relative to float64: what a right kernel reaches, times
# two to eight. For dq and dk rows are taken relative to a tenth of the median row at least, since some are 0 in theory.
LIMITS = {
    torch.float32: {"out": (1e-5, 2e-6), "grad": (1e-4, 5e-6)},
    torch.float16: {"out": (2e-3, 8e-4), "grad": (5e-3, 1e-3)},
    torch.bfloat16: {"out": (1.2e-2, 5e-3), "grad": (2e-2, 6e-3)},
}
NAMES = ("q", "k", "v", "q_gain", "k_gain")


@dataclass(frozen=True)
class Sample:
    """A problem for the kernels and a gradient of its result."""

    problem: launch.Problem
    grad: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """What has a gradient."""
        return {name: x for name in NAMES if (x := getattr(self.problem, name)) is not None}

    def run(self) -> tuple[Tensor, Gradients]:
        """Result and gradients of the kernels."""
        out, lse = launch.forward(self.problem)
        return out, launch.backward(self.problem, out, lse, self.grad)

    def exact(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Result and gradients of the naive path, in float64, from the same rounded inputs."""
        inputs = {name: x.double().requires_grad_() for name, x in self.inputs().items()}
        out = exact_forward(replace(self.problem, **inputs))
        gradients = torch.autograd.grad(out, list(inputs.values()), self.grad.double())
        return out.detach(), dict(zip(inputs, gradients, strict=True))


def exact_forward(problem: launch.Problem) -> Tensor:
    p = problem
    tables = {"q_table": p.q_table, "k_table": p.k_table, "q_gain": p.q_gain, "k_gain": p.k_gain}
    return naive.packed_attention(p.q, p.k, p.v, p.starts.tolist(), p.key_starts.tolist(), softcap=p.softcap, **tables)


def make(
    lengths: list[int],
    *,
    key_lengths: list[int] | None = None,
    width: int = 72,
    dtype: torch.dtype = torch.float32,
    heads: int = 2,
    rotary: bool = True,
    norm: bool = True,
    softcap: float = 0.0,
    scale: float = 1.0,
    seed: int = 0,
) -> Sample:
    """Random q, k and v, as views of one tensor where queries and keys are as many; coordinates up to 63."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows, keys = sum(lengths), sum(lengths if key_lengths is None else key_lengths)
    coords = torch.randint(0, 64, (max(rows, keys), 4), generator=generator)
    qkv = (scale * random(max(rows, keys), 3, heads, width)).to(DEVICE, dtype)
    table = rotary_table(coords, width).to(DEVICE) if rotary else None
    gains = [(1 + 0.2 * random(heads, width)).to(DEVICE, dtype) if norm else None for _ in range(2)]
    problem = launch.Problem(
        q=qkv[:rows, 0],
        k=qkv[:keys, 1],
        v=qkv[:keys, 2],
        starts=starts_of(lengths),
        key_starts=starts_of(lengths if key_lengths is None else key_lengths),
        # Queries are the last tokens of each sequence in a cached decode; for the kernels any table will do.
        q_table=None if table is None else table[len(table) - rows :].contiguous(),
        k_table=None if table is None else table[:keys].contiguous(),
        q_gain=gains[0],
        k_gain=gains[1],
        softcap=softcap,
        arch=launch.device_arch(DEVICE),
    )
    return Sample(problem, random(rows, heads, width).to(DEVICE, dtype))


def starts_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def worst_row(got: Tensor, exact: Tensor, floor: float) -> float:
    """The largest |got - exact| / |exact| of a row, where rows count as at least `floor` medians long."""
    error, size = (got.double() - exact).norm(dim=-1), exact.norm(dim=-1)
    return float((error / torch.maximum(size, floor * size.median()).clamp(min=1e-30)).max())


def overall(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def check_result(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    row, all_rows = LIMITS[dtype]["out"]
    assert worst_row(got, exact, 1e-3) < row
    assert overall(got, exact) < all_rows


def check_gradients(got: Gradients, exact: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name in NAMES:
        gradient = getattr(got, name)
        assert (gradient is None) == (name not in exact), name
        if gradient is None:
            continue
        row, all_rows = LIMITS[dtype]["out" if name == "v" else "grad"]
        assert worst_row(gradient, exact[name], 0.1) < row, name
        assert overall(gradient, exact[name]) < all_rows, name
