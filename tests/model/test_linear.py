from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.linear import Linear


@pytest.mark.parametrize("rows", [0, 1, 3, 257])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_inference_equals_float64(rows: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = Linear(72, 200, bias=bias).to(dtype)
    x = torch.randn(rows, 72, dtype=dtype)
    exact = F.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    limit = 2e-2 if dtype == torch.bfloat16 else 5e-6
    with torch.inference_mode():
        torch.testing.assert_close(linear(x).double(), exact, rtol=limit, atol=limit)
        exact = F.gelu(exact, approximate="tanh")
        torch.testing.assert_close(linear.forward_gelu(x).double(), exact, rtol=limit, atol=limit)


def test_gradients_pass_where_they_are_wanted() -> None:
    torch.manual_seed(0)
    linear = Linear(24, 16)
    x = torch.randn(5, 24, requires_grad=True)
    linear.forward_gelu(linear(x) @ torch.randn(16, 24)).sum().backward()
    assert x.grad is not None
    assert linear.weight.grad is not None
    assert bool(linear.weight.grad.abs().sum() > 0)


def test_inference_and_training_agree() -> None:
    torch.manual_seed(0)
    linear, x = Linear(1152, 4304), torch.randn(300, 1152)
    trained = linear.forward_gelu(x)
    with torch.no_grad():
        torch.testing.assert_close(linear.forward_gelu(x), trained, rtol=1e-5, atol=2e-6)
