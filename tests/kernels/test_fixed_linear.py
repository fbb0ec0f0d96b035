"""The linear layer of the batch-invariant mode: right against float64, and the same bits whatever shares the pack.

On a CPU both forms: the kernel in the interpreter, and torch's products of a fixed number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.blocks import Block
from model.config import StackConfig
from model.errors import ShapeError, UnsupportedError
from model.kernels import fixed_linear, launch, linear_fwd, segment_starts
from model.kernels.linear import fixed_linear_op
from model.kernels.tiles import LinearTile
from model.linear import Linear
from model.norms import LayerNorm, RMSNorm
from model.rope import rotary_table
from tests.kernels.samples import DEVICE

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]

LIMITS = {torch.float32: 2e-6, torch.float16: 8e-4, torch.bfloat16: 5e-3}
NEIGHBOURS = [(1, 0), (0, 70), (3, 200), (64, 1), (127, 130)]


def _kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.full((len(x), weight.shape[0]), float("nan"), dtype=x.dtype, device=x.device)
    linear_fwd.plan_linear(x, weight, bias, out, launch.device_arch(DEVICE)).run()
    return out


@pytest.fixture
def rows_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """In numpy, which the interpreter calls, a row's product changes with its place in the tile; not so on a GPU."""
    if DEVICE.type == "cuda":
        return
    from triton.runtime import interpreter

    plain_dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        def row(handle: Any, i: int) -> Any:
            return interpreter.TensorHandle(handle.data[i : i + 1], handle.dtype)

        rows = [plain_dot(self, row(a, i), b, row(d, i), *rest) for i in range(len(a.data))]
        return interpreter.TensorHandle(np.concatenate([x.data for x in rows]), rows[0].dtype)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(params=["op", "kernel"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Product:
    if DEVICE.type == "cpu":  # tiles whose edges are met by small matrices
        monkeypatch.setattr(linear_fwd, "lookup_linear", lambda *_: LinearTile(64, 64, 32, 4, 1))
    return _kernel if request.param == "kernel" else fixed_linear


def _matrices(
    rows: int, inner: int, columns: int, dtype: torch.dtype = torch.float32, *, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(rows + inner)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    return random(rows, inner), random(columns, inner) / inner**0.5, random(columns) if bias else None


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(
    ("rows", "inner", "columns", "bias"),
    [(1, 48, 96, False), (65, 72, 130, True), (200, 64, 64, True), (63, 7, 5, True)],
)
def test_against_float64(product: Product, rows: int, inner: int, columns: int, bias: bool, dtype: torch.dtype) -> None:
    x, weight, shift = _matrices(rows, inner, columns, dtype, bias=bias)
    want = F.linear(x.double(), weight.double(), None if shift is None else shift.double())
    got = product(x, weight, shift)
    assert got.dtype == dtype
    assert float((got.double() - want).norm() / want.norm()) < LIMITS[dtype]
    assert float(((got.double() - want).norm(dim=1) / want.norm(dim=1)).max()) < 4 * LIMITS[dtype]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.usefixtures("rows_apart")
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("length", [1, 37, 66])
def test_alone_and_packed(product: Product, length: int, dtype: torch.dtype) -> None:
    """An item's rows between others of any number, which hold NaN and infinity, at any place of a tile."""
    x, weight, bias = _matrices(length, 104, 200, dtype)
    alone = product(x, weight, bias)
    for before, after in NEIGHBOURS:
        pack = torch.cat([x.new_full((before, 104), float("nan")), x, x.new_full((after, 104), float("inf"))])
        assert torch.equal(product(pack, weight, bias)[before : before + length], alone)


def test_gelu() -> None:
    x, weight, bias = _matrices(67, 40, 24)
    want = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    torch.testing.assert_close(fixed_linear(x, weight, bias, gelu=True), want)


def test_views() -> None:
    x, weight, bias = _matrices(20, 96, 40)
    want = fixed_linear(x, weight, bias)
    wide = torch.cat([x, x], 1)
    assert torch.equal(fixed_linear(wide[:, :96], weight, bias), want)
    assert torch.equal(fixed_linear(x.T.contiguous().T, weight, bias), want)
    assert torch.equal(fixed_linear(x.unflatten(0, (4, 5)), weight, bias), want.unflatten(0, (4, 5)))
    assert torch.equal(fixed_linear(x[3], weight, bias), want[3])
    assert fixed_linear(x[:0], weight, bias).shape == (0, 40)


def test_opcheck() -> None:
    torch.library.opcheck(fixed_linear_op, (*_matrices(70, 16, 24), False))
    torch.library.opcheck(fixed_linear_op, (*_matrices(3, 16, 24)[:2], None, True))


X, WEIGHT = torch.zeros(3, 8), torch.zeros(5, 8)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (X, WEIGHT.T, None, r"wanted \[\.\.\., K\]"),
        (X, WEIGHT[0], None, r"wanted \[\.\.\., K\]"),
        (X[:, :0], WEIGHT[:, :0], None, r"wanted \[\.\.\., K\]"),
        (X, WEIGHT, torch.zeros(8), r"wanted \[5\]"),
        (X, WEIGHT.half(), None, "float16"),
        (X.int(), WEIGHT.int(), None, "int32"),
    ],
)
def test_bad_input_is_a_value_error(x: Tensor, weight: Tensor, bias: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        fixed_linear(x, weight, bias)
    assert isinstance(caught.value, ShapeError)


def test_no_gradient() -> None:
    weight = WEIGHT.clone().requires_grad_()
    with pytest.raises(UnsupportedError, match="no_grad"):
        fixed_linear(X, weight)
    with torch.no_grad():
        assert fixed_linear(X, weight).shape == (3, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [192, 1152])
@torch.inference_mode()
def test_layers_between_the_products_go_row_by_row(width: int, dtype: torch.dtype) -> None:
    """They are torch's own: nothing is to be done for them, and here it is seen."""
    x = torch.randn(9, width, device=DEVICE).to(dtype)
    layers: list[torch.nn.Module] = [LayerNorm(width).to(DEVICE, dtype), RMSNorm(width).to(DEVICE, dtype)]
    if DEVICE.type == "cuda":  # on a CPU it is a part of the op: the last values of a tensor come out differently
        layers.append(torch.nn.GELU("tanh"))
    for layer in layers:
        alone = layer(x)
        for before, after in NEIGHBOURS:
            pack = torch.cat([torch.randn(before, width, device=DEVICE).to(dtype), x, x.new_ones(after, width)])
            assert torch.equal(layer(pack)[before : before + 9], alone), type(layer).__name__


@pytest.mark.parametrize("norm", ["layer", "rms"])
@torch.inference_mode()
def test_a_block_keeps_the_bits_of_an_item(norm: str) -> None:
    """The published block with the fixed product in all its linear layers."""
    torch.manual_seed(0)
    encoder = norm == "layer"
    config = StackConfig(width=144, blocks=1, heads=2, mlp=272, norm=norm, bias=encoder, qk_norm=not encoder)
    block = Block(config).to(DEVICE).eval()
    for layer in block.modules():
        if isinstance(layer, Linear):
            layer.fixed = True
    lengths = [37, 1, 72, 600]

    def run(x: Tensor, coords: Tensor, lengths: list[int]) -> Tensor:
        starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
        out: Tensor = block(x, rotary_table(coords, 72).to(DEVICE), segment_starts(starts, DEVICE))
        return out

    x, coords = torch.randn(sum(lengths), 144, device=DEVICE), torch.randint(0, 64, (sum(lengths), 4))
    packed = run(x, coords, lengths).split(lengths)
    for own, place, together in zip(x.split(lengths), coords.split(lengths), packed, strict=True):
        assert torch.equal(run(own, place, [len(own)]), together), len(own)
