"""What the benchmark puts beside our kernels computes what it should: preparation of the peers, fused candidates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.blocks import Block
from model.config import StackConfig
from model.kernels import plain, segment_starts
from model.norms import LayerNorm, RMSNorm
from model.rope import rotary_table
from tests.bench import kernels_fused
from tests.bench.kernels_peers import FusedPreparation
from tests.kernels.samples import DEVICE

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
def test_fused_preparation_of_the_peers(norm: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(37, 3, 2, 72, device=DEVICE, requires_grad=True)
    gain = (1 + 0.2 * torch.randn(2, 72, device=DEVICE)).requires_grad_() if norm else None
    table = rotary_table(torch.randint(0, 64, (37, 4)), 72).to(DEVICE)
    grad = torch.randn(37, 2, 72, device=DEVICE)
    inputs = [x] if gain is None else [x, gain]
    want, got = plain.prepare(x[:, 1], table, gain), FusedPreparation.apply(x[:, 1], table, gain)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    gradients = (torch.autograd.grad(out, inputs, grad) for out in (got, want))
    for gradient, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [LayerNorm, RMSNorm])
def test_residual_and_norm(make: type[torch.nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = make(72).to(DEVICE, dtype)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        h, y = (torch.randn(9, 72, device=DEVICE).to(dtype) for _ in range(2))
        total, out = kernels_fused.add_norm(h, y, norm)
        want_total, want = kernels_fused.plain_add_norm(h, y, norm)
    assert torch.equal(total, want_total)
    limit = 1e-5 if dtype == torch.float32 else 1e-2  # one step of bfloat16 is 8e-3
    torch.testing.assert_close(out, want, rtol=limit, atol=limit)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="on a CPU torch's private form has the other GELU")
def test_gelu_in_the_product() -> None:
    layer, x = torch.nn.Linear(64, 48, device=DEVICE), torch.randn(20, 64, device=DEVICE)
    with torch.no_grad():
        want = F.gelu(layer(x), approximate="tanh")
        torch.testing.assert_close(kernels_fused.product_gelu(x, layer), want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_step_is_a_block() -> None:
    torch.manual_seed(0)
    config = StackConfig(width=144, blocks=1, heads=2, mlp=80, norm="layer", bias=True, qk_norm=False)
    block = Block(config).to(DEVICE)
    h, rotary = torch.randn(21, 144, device=DEVICE), rotary_table(torch.randint(0, 9, (21, 4)), 72).to(DEVICE)
    starts = segment_starts([0, 5, 21], DEVICE)
    step = kernels_fused.make_step(block, rotary, starts, kernels_fused.add_norm, inside=False)
    total, normed = step(h, block.norm1(h))
    torch.testing.assert_close(total, block(h, rotary, starts), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(normed, block.norm1(total), rtol=1e-4, atol=1e-4)
