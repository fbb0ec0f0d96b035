"""Nothing in a segment's result depends on what else is in the pack: bit for bit, whatever the neighbours hold."""

from dataclasses import replace

import pytest
import torch

from model.kernels import launch
from tests.kernels.samples import DEVICE, Sample, make, starts_of

LENGTHS = [37, 0, 72, 130]
OWN = slice(37, 109)


def _cut(sample: Sample, rows: slice) -> Sample:
    p = sample.problem
    starts = starts_of([rows.stop - rows.start])
    assert p.q_table is not None
    assert p.k_table is not None
    cut = {name: getattr(p, name)[rows] for name in ("q", "k", "v", "q_table", "k_table")}
    return Sample(replace(p, starts=starts, key_starts=starts, **cut), sample.grad[rows])


def _bits(sample: Sample) -> dict[str, torch.Tensor]:
    out, gradients = sample.run()
    return {"out": out, "q": gradients.q, "k": gradients.k, "v": gradients.v}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_alone_and_packed(dtype: torch.dtype) -> None:
    sample = make(LENGTHS, dtype=dtype)
    alone, packed = _bits(_cut(sample, OWN)), _bits(sample)
    assert all(torch.equal(alone[name], packed[name][OWN]) for name in alone)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in the interpreter
def test_poisoned_neighbours() -> None:
    sample = make(LENGTHS)
    clean = _bits(_cut(sample, OWN))
    for x in (sample.problem.q, sample.problem.k, sample.problem.v, sample.grad):
        x[: OWN.start] = float("nan")
        x[OWN.stop :] = float("inf")
    poisoned = _bits(sample)
    assert all(torch.equal(clean[name], poisoned[name][OWN]) for name in clean)


def test_rows_after_the_end_are_not_read() -> None:
    """The packed tensors may be the front of larger ones that hold anything."""
    sample = make([50, 78])
    short = _cut(sample, slice(0, 50))
    clean = _bits(replace_problem(short))
    for x in (sample.problem.q, sample.problem.k, sample.problem.v, sample.grad):
        x[50:] = float("nan")
    again = _bits(short)
    assert all(torch.equal(clean[name], again[name]) for name in clean)


@pytest.mark.parametrize(
    "starts", [[5, 60], [-900, 30, 60], [0, 50, 20, 60], [0, 30, 4000], [0, 2**31 - 1, -(2**31), 60], [60, 0, 60]]
)
def test_wrong_starts_reach_no_other_memory(starts: list[int]) -> None:
    """On a device nobody looks at starts. q, k, v and results are the middle of larger tensors, NaN around them."""
    sample = make([400], rotary=False, norm=False)
    p, own = sample.problem, slice(170, 230)
    wrong = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    inside = {name: getattr(p, name)[own].clone() for name in ("q", "k", "v")}
    for x in (p.q, p.k, p.v):
        x.fill_(float("nan"))
    for name, values in inside.items():
        getattr(p, name)[own] = values
    cut = replace(p, starts=wrong, key_starts=wrong, **{name: getattr(p, name)[own] for name in inside})
    whole = [torch.full((400, 2, 72), 7.0, device=DEVICE) for _ in range(4)]
    row_sums = torch.full((9, 2, 60), 7.0, device=DEVICE)
    for launched in launch.plan_forward(cut, whole[0][own], row_sums[4]):
        launched.run()
    grad = torch.ones(60, 2, 72, device=DEVICE)
    for launched in launch.plan_backward(cut, whole[0][own], row_sums[4], grad, *(x[own] for x in whole[1:])):
        launched.run()
    for x in whole:
        assert bool((x[: own.start] == 7).all())
        assert bool((x[own.stop :] == 7).all())
    assert bool(torch.isfinite(whole[0]).all())  # no row of q, k or v around was read
    assert bool((row_sums[:4] == 7).all())
    assert bool((row_sums[5:] == 7).all())


def replace_problem(sample: Sample) -> Sample:
    """The same values in memory of their own."""
    p = sample.problem
    own = {name: getattr(p, name).clone() for name in ("q", "k", "v")}
    return Sample(replace(p, **own), sample.grad.clone())


def test_permuted_pack() -> None:
    sample = make([20, 75])
    p = sample.problem
    order = torch.cat([torch.arange(20, 95), torch.arange(20)]).to(DEVICE)
    starts = starts_of([75, 20])
    assert p.q_table is not None
    assert p.k_table is not None
    turned = {name: getattr(p, name)[order] for name in ("q", "k", "v", "q_table", "k_table")}
    permuted = Sample(replace(p, starts=starts, key_starts=starts, **turned), sample.grad[order])
    straight, other = _bits(sample), _bits(permuted)
    assert all(torch.equal(straight[name][order], other[name]) for name in straight)


def test_same_place_needs_no_rotation() -> None:
    """All tokens at one place: queries and keys turn by the same angles, so the result is that without rotation."""
    sample = make([60], norm=False)
    p = sample.problem
    assert p.q_table is not None
    table = p.q_table[:1].expand(60, -1).contiguous()
    turned, _ = launch.forward(replace(p, q_table=table, k_table=table))
    still, _ = launch.forward(replace(p, q_table=None, k_table=None))
    assert float((turned - still).abs().max()) < 1e-5
