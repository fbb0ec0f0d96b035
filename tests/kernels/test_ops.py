"""The custom ops and the door: what torch says of them, and that they may stand inside of compiled code."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from model.blocks import Block
from model.config import StackConfig
from model.errors import ShapeError, UnsupportedError
from model.kernels import launch, ops, packed_attention, plain, segment_starts, tiles
from model.rope import rotary_table
from tests.kernels.samples import DEVICE, LENGTHS, Sample, check_gradients, check_result, make


@pytest.fixture(params=["plain", "kernels"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops as they are on a CPU, and the same ops with the kernels inside, which the interpreter runs."""
    if request.param == "kernels" and DEVICE.type == "cpu":

        def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
            return launch.forward(launch.Problem(*arguments, arch=80))

        def backward(*arguments: Any) -> plain.Gradients:
            *problem, out, lse, grad = arguments
            return launch.backward(launch.Problem(*problem, arch=80), out, lse, grad)

        monkeypatch.setattr(plain, "forward", forward)
        monkeypatch.setattr(plain, "backward", backward)


def _arguments(sample: Sample) -> tuple[Any, ...]:
    p = sample.problem
    return (p.q, p.k, p.v, p.starts, p.key_starts, p.q_table, p.k_table, p.q_gain, p.k_gain, p.softcap)


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.usefixtures("backend")
def test_opcheck(norm: bool) -> None:
    sample = make([3, 0, 18], heads=1, norm=norm)
    for x in sample.inputs().values():
        x.requires_grad_()
    torch.library.opcheck(ops.packed_attention, _arguments(sample))
    arguments = [x.detach() if isinstance(x, Tensor) else x for x in _arguments(sample)]
    out, lse = ops.packed_attention(*arguments)
    torch.library.opcheck(ops.packed_attention_backward, (*arguments, out, lse, sample.grad))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_plain_against_float64(lengths: list[int], dtype: torch.dtype) -> None:
    sample = make(lengths, dtype=dtype)
    out, lse = plain.forward(*_arguments(sample))
    want, want_gradients = sample.exact()
    check_result(out, want, dtype)
    if lengths != [1]:
        check_gradients(plain.backward(*_arguments(sample), out, lse, sample.grad), want_gradients, dtype)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="float64 is for the plain path, on a CPU")
def test_plain_gradients_by_finite_differences() -> None:
    p = make([3, 0, 5], heads=1, width=16, dtype=torch.float64, softcap=2.0).problem
    inputs = [x.requires_grad_() for x in (p.q, p.k, p.v, p.q_gain, p.k_gain) if x is not None]

    def run(q: Tensor, k: Tensor, v: Tensor, q_gain: Tensor, k_gain: Tensor) -> Tensor:
        return ops.packed_attention(q, k, v, p.starts, p.key_starts, p.q_table, p.k_table, q_gain, k_gain, 2.0)[0]

    torch.autograd.gradcheck(run, inputs, fast_mode=True)


def _block_and_inputs(rows: int = 21) -> tuple[Block, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    config = StackConfig(width=144, blocks=1, heads=2, mlp=80, norm="rms", bias=False, qk_norm=True)
    x = torch.randn(rows, 144, device=DEVICE, requires_grad=True)
    rotary = rotary_table(torch.randint(0, 9, (rows, 4)), 72).to(DEVICE)
    return Block(config).to(DEVICE), x, rotary, torch.tensor([0, 3, 3, rows], dtype=torch.int32, device=DEVICE)


def _gradients(block: Block, x: Tensor, out: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out.square().sum(), [x, *block.parameters()]))


@pytest.mark.usefixtures("backend")
def test_a_block_compiles_in_one_graph() -> None:
    block, x, rotary, starts = _block_and_inputs()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    want, got = block(x, rotary, starts), compiled(x, rotary, starts)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for gradient, exact in zip(_gradients(block, x, got), _gradients(block, x, want), strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("backend")
def test_other_token_counts_do_not_recompile_for_ever() -> None:
    block, _, _, _ = _block_and_inputs()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    with torch.no_grad():
        for rows in (5, 9, 12, 17):
            _, x, rotary, starts = _block_and_inputs(rows)
            compiled(x.detach(), rotary, starts)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    block, x, rotary, starts = _block_and_inputs()
    plain_gradients = _gradients(block, x, block(x, rotary, starts))
    out = checkpoint(block, x, rotary, starts, use_reentrant=use_reentrant)
    out.square().sum().backward()
    found = [x.grad, *(parameter.grad for parameter in block.parameters())]
    for got, want in zip(found, plain_gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_fsdp2_gives_the_same_gradients() -> None:
    block, x, rotary, starts = _block_and_inputs()
    want = _gradients(block, x, block(x, rotary, starts))[1:]
    dist.init_process_group("nccl" if DEVICE.type == "cuda" else "gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        mesh = dist.device_mesh.init_device_mesh(DEVICE.type, (1,))
        sharded = fully_shard(copy.deepcopy(block), mesh=mesh)
        sharded(x, rotary, starts).square().sum().backward()
        for parameter, gradient in zip(sharded.parameters(), want, strict=True):
            assert isinstance(parameter.grad, DTensor)
            torch.testing.assert_close(parameter.grad.full_tensor(), gradient, rtol=1e-5, atol=1e-5)
    finally:
        dist.destroy_process_group()


def test_autocast() -> None:
    block, x, rotary, starts = _block_and_inputs()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = block(x, rotary, starts)
        q, k, v = torch.randn(3, 21, 2, 72, device=DEVICE)
        assert packed_attention(q, k, v, starts).dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), block(x, rotary, starts), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("as_tensor", [True, False], ids=["tensor", "tuple"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
def test_door_against_float64(as_tensor: bool, norm: bool) -> None:
    sample = make([9, 0, 31, 1], norm=norm)
    p = sample.problem
    starts = p.starts if as_tensor else tuple(p.starts.tolist())
    inputs = [x.requires_grad_() for x in sample.inputs().values()]
    out = packed_attention(p.q, p.k, p.v, starts, rotary=p.q_table, q_gain=p.q_gain, k_gain=p.k_gain)
    want, want_gradients = sample.exact()
    check_result(out.detach(), want, torch.float32)
    found = plain.Gradients(*torch.autograd.grad(out, inputs, sample.grad), *([] if norm else [None, None]))
    check_gradients(found, want_gradients, torch.float32)


X = torch.zeros(6, 2, 72)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": X.int()}, "int32"),
        ({"k": X.half()}, "float16"),
        ({"q": X[0]}, "wanted \\[N, H, D\\]"),
        ({"k": X[:, :1]}, "wanted \\[N, H, D\\]"),
        ({"q": X[:0], "starts": [0]}, "at least one token"),
        ({"q": X.transpose(0, 1).contiguous().transpose(0, 1)}, "strides"),
        ({"v": torch.zeros(6, 2, 144)[..., ::2]}, "strides"),
        ({"q": torch.zeros(6, 150)[:, :144].unflatten(1, (2, 72))}, "multiple of 8"),
        ({"starts": [0, 5]}, "from 0 to 6"),
        ({"starts": [1, 6]}, "from 0 to 6"),
        ({"starts": [0, 4, 3, 6]}, "non-decreasing"),
        ({"starts": []}, "from 0 to 6"),
        ({"starts": torch.tensor([0, 4, 3, 6], dtype=torch.int32)}, "non-decreasing"),
        ({"starts": torch.tensor([0, 6])}, "int32"),
        ({"key_starts": [0, 2, 6]}, "wanted as many"),
        ({"key_starts": [0, 7]}, "from 0 to 6"),
        ({"rotary": torch.zeros(6, 72).half()}, "float32"),
        ({"rotary": torch.zeros(5, 72)}, "\\(6, 72\\)"),
        ({"q_gain": torch.zeros(72)}, "\\(2, 72\\)"),
        ({"softcap": -1.0}, "softcap"),
    ],
)
def test_bad_input_is_a_value_error(change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"q": X, "k": X, "v": X, "starts": [0, 6]} | change
    q, k, v, starts = (options.pop(name) for name in ("q", "k", "v", "starts"))
    with pytest.raises(ValueError, match=message) as caught:
        packed_attention(q, k, v, starts, **options)
    assert isinstance(caught.value, ShapeError)


@pytest.mark.parametrize("starts", [[], [1, 4], [0, 4, 3]])
def test_starts_for_a_device_are_checked_before_they_go_there(starts: list[int]) -> None:
    with pytest.raises(ShapeError, match="non-decreasing from 0"):
        segment_starts(starts, DEVICE)


@pytest.mark.parametrize("width", [8, 44, 136])
def test_head_widths_that_the_kernels_do_not_have(width: int) -> None:
    with pytest.raises(UnsupportedError, match="multiple of 8 from 16 to 128"):
        tiles.split_width(width)


SPLITS = {16: (16, 0), 40: (32, 16), 64: (64, 0), 72: (64, 16), 80: (64, 16), 96: (64, 32), 128: (128, 0)}


@pytest.mark.parametrize(("width", "parts"), SPLITS.items())
def test_split_of_a_head(width: int, parts: tuple[int, int]) -> None:
    assert tiles.split_width(width) == parts


@pytest.mark.parametrize(("arch", "like"), [(86, 89), (87, 89), (120, 89), (103, 100), (80, 80), (90, 90)])
def test_other_gpus_take_the_entry_of_a_smaller_one(arch: int, like: int) -> None:
    assert tiles.lookup(arch, 72, torch.bfloat16, "forward") == tiles.TABLE[like, "narrow", "16", "forward"]


def test_old_gpus_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"8\.0 or newer"):
        tiles.lookup(75, 72, torch.bfloat16, "forward")
    with pytest.raises(UnsupportedError, match=r"8\.0 or newer"):
        tiles.lookup_linear(75, torch.bfloat16)
