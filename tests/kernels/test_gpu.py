"""What only a GPU shows: bfloat16 as it is, random shapes, long segments, CUDA graphs, no waiting. `pytest -m gpu`.

The other tests of this folder run on the GPU too where there is one.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from model.kernels import fixed_linear, launch, packed_attention, segment_starts
from model.rope import rotary_table
from tests.kernels.samples import DEVICE, check_gradients, check_result, exact_forward, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


# Few of them: every one compiles its own kernels.
OPTIONS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.bfloat16, {"norm": False}),
    (torch.bfloat16, {"norm": True}),
    (torch.bfloat16, {"norm": False, "width": 64, "softcap": 30.0}),
    (torch.bfloat16, {"norm": False, "width": 128}),
    (torch.float16, {"norm": False, "width": 96, "rotary": False}),
    (torch.float32, {"norm": True}),
]


@pytest.mark.parametrize("seed", range(200))
def test_random_shapes(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.choice([0, 1, draw.randint(2, 70), draw.randint(100, 700)]) for _ in range(draw.randint(1, 9))]
    lengths[draw.randrange(len(lengths))] += 1
    dtype, options = draw.choice(OPTIONS)
    keys = [length + draw.randint(0, 90) for length in lengths] if draw.random() < 0.3 else None
    sample = make(lengths, key_lengths=keys, heads=draw.choice([1, 2, 5]), dtype=dtype, seed=seed, **options)
    out, gradients = sample.run()
    want, want_gradients = sample.exact()
    check_result(out, want, dtype)
    if sum(length > 1 for length in lengths):  # segments of one key have no gradient in q and k
        check_gradients(gradients, want_gradients, dtype)


def test_a_hundred_thousand_tokens() -> None:
    sample = make([3, 100_000, 0, 70], dtype=torch.bfloat16, heads=1)
    p = sample.problem
    out, _ = launch.forward(p)
    # The exact answer of some queries: their rows as a problem of its own, over the keys of their segment.
    rows = torch.tensor([3, 4, 131, 50_000, 99_999, 100_002], device=DEVICE)
    own = torch.tensor([0, len(rows)], dtype=torch.int32)
    assert p.q_table is not None
    assert p.k_table is not None
    part = launch.Problem(
        p.q[rows], p.k[3:100_003], p.v[3:100_003], own, torch.tensor([0, 100_000]),
        p.q_table[rows], p.k_table[3:100_003], p.q_gain, p.k_gain, 0.0, p.arch,
    )  # fmt: skip
    check_result(out[rows], exact_forward(part), torch.bfloat16)


def test_nothing_waits_and_a_graph_records_it() -> None:
    rotary = rotary_table(torch.randint(0, 64, (199, 4)), 72).to(DEVICE)
    starts = segment_starts([0, 5, 5, 135, 199], DEVICE)
    qkv = torch.randn(199, 3, 2, 72, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = qkv.unbind(1)
        out = packed_attention(q, k, v, starts, rotary=rotary)
        return out, torch.autograd.grad(out.float().square().sum(), qkv)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    with torch.no_grad():
        qkv.copy_(torch.randn_like(qkv))
        starts.copy_(segment_starts([0, 64, 64, 70, 199], DEVICE))
    graph.replay()
    assert all(torch.equal(got, want) for got, want in zip(recorded, step(), strict=True))


def test_the_same_bits_every_time() -> None:
    sample = make([300, 77, 0, 1000], dtype=torch.bfloat16)
    first, again = sample.run(), sample.run()
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True) if a is not None)


@pytest.mark.parametrize(("inner", "columns"), [(1152, 3456), (1152, 1152), (1152, 4304), (4304, 1152), (48, 1152)])
@torch.no_grad()
def test_published_products_keep_the_bits_of_an_item(inner: int, columns: int) -> None:
    x, weight = (torch.randn(n, inner, device=DEVICE, dtype=torch.bfloat16) for n in (256, columns))
    alone = fixed_linear(x, weight)
    want = x.double() @ weight.double().T
    assert float((alone.double() - want).norm() / want.norm()) < 5e-3
    for before, after in [(1, 0), (0, 1), (77, 1000), (256, 256), (5000, 3)]:
        pack = torch.cat([torch.randn(before, inner, device=DEVICE).bfloat16(), x, x.new_ones(after, inner)])
        assert torch.equal(fixed_linear(pack, weight)[before : before + 256], alone)
