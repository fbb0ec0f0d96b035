"""The fast attention against the naive one in float64: forward and gradients, ragged and odd shapes."""

import pytest
import torch

from model.errors import ShapeError
from model.kernels import naive, packed_attention
from model.verify import rowwise_error

LENGTHS = {
    "one token": [1],
    "odd": [63, 100, 1],
    "equal": [16, 16, 16],
    "empty segments": [0, 5, 0, 0, 7, 0],
    "many of one": [1] * 40,
    "long": [700, 3],
}


def _starts(lengths: list[int]) -> list[int]:
    return torch.cumsum(torch.tensor([0, *lengths]), 0).tolist()


@pytest.mark.parametrize("head_width", [8, 64, 72])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_forward_and_gradients(lengths: list[int], head_width: int) -> None:
    torch.manual_seed(0)
    n = sum(lengths)
    q, k, v = (torch.randn(n, 2, head_width, requires_grad=True) for _ in range(3))
    starts = _starts(lengths)
    out = packed_attention(q, k, v, starts)
    want = naive.packed_attention(q, k, v, starts, starts)
    assert rowwise_error(out.detach().numpy(), want.detach().numpy()) < 1e-5
    grad = torch.randn(n, 2, head_width)
    for got, exact in zip(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(want, (q, k, v), grad.double()), strict=True
    ):
        scale = exact.abs().max().clamp(min=1e-6)  # a row of one key has no gradient in q and k
        assert float((got - exact).abs().max() / scale) < 1e-4 or float(exact.abs().max()) < 1e-5


def test_keys_longer_than_queries() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(6, 2, 72), torch.randn(11, 2, 72), torch.randn(11, 2, 72)
    got = packed_attention(q, k, v, [0, 4, 6], key_starts=[0, 8, 11])
    assert rowwise_error(got.numpy(), naive.packed_attention(q, k, v, [0, 4, 6], [0, 8, 11]).numpy()) < 1e-5


def test_no_tokens() -> None:
    nothing = torch.zeros(0, 2, 72)
    with pytest.raises(ShapeError, match="at least one token"):
        packed_attention(nothing, nothing, nothing, [0])


@pytest.mark.parametrize("starts", [[0, 5], [1, 6], [0, 4, 3, 6], []])
def test_starts_that_do_not_fit(starts: list[int]) -> None:
    x = torch.randn(6, 2, 72)
    with pytest.raises(ShapeError, match="wanted"):
        packed_attention(x, x, x, starts)
