"""Forward and backward against float64, worst row of a token and head: ragged lengths, widths, options."""

import pytest
import torch

from model.kernels import launch
from model.kernels.tiles import Tile
from tests.kernels.samples import DEVICE, LENGTHS, check_gradients, check_result, make, worst_row

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
ALL_DTYPES = {**DTYPES, "bf16": torch.bfloat16}


pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_ragged(lengths: list[int]) -> None:
    sample = make(lengths)
    out, gradients = sample.run()
    want, want_gradients = sample.exact()
    check_result(out, want, torch.float32)
    if lengths != [1]:  # one key: no gradient in q and k, see below
        check_gradients(gradients, want_gradients, torch.float32)


def test_a_segment_of_one_has_no_gradient_in_queries_and_keys() -> None:
    _, gradients = make([1], norm=False).run()
    assert float(gradients.q.abs().max()) < 1e-5
    assert float(gradients.k.abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("width", [16, 40, 64, 80, 96, 128])
def test_widths(width: int, dtype: torch.dtype) -> None:
    sample = make([5, 0, 66], width=width, dtype=dtype)
    out, gradients = sample.run()
    want, want_gradients = sample.exact()
    check_result(out, want, dtype)
    check_gradients(gradients, want_gradients, dtype)


@pytest.mark.parametrize("dtype", ALL_DTYPES.values(), ids=ALL_DTYPES.keys())
@pytest.mark.parametrize(
    "options",
    [
        {"rotary": True, "norm": False},
        {"rotary": False, "norm": True},
        {"rotary": False, "norm": False},
        {"norm": False, "softcap": 3.0, "scale": 2.0},
        {"key_lengths": [90, 7, 12]},
    ],
    ids=["rotation", "norm", "neither", "softcap that bends", "cached prefix"],
)
def test_options(options: dict, dtype: torch.dtype) -> None:
    sample = make([70, 0, 12], dtype=dtype, **options)
    out, gradients = sample.run()
    want, want_gradients = sample.exact()
    check_result(out, want, dtype)
    check_gradients(gradients, want_gradients, dtype)


def test_keys_rotated_in_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other form that the tile table can ask for."""
    monkeypatch.setattr(launch, "lookup", lambda *_: Tile(64, 32, 4, 2, rotate_keys=True))
    sample = make([70, 0, 12])
    check_result(sample.run()[0], sample.exact()[0], torch.float32)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("width", [72, 128])
def test_keys_copied_by_the_engine_of_newer_gpus(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours hold NaN: the copies know no mask and must stay inside of the segment."""
    if launch.device_arch(DEVICE) < 90 and DEVICE.type == "cuda":
        pytest.skip("no copy engine")
    monkeypatch.setattr(launch, "lookup", lambda *_: Tile(64, 32, 4, 2, copies=True))
    sample = make([70, 0, 32, 12], width=width)
    want, _ = sample.exact()
    got, _ = sample.run()
    check_result(got, want, torch.float32)
    for x in (sample.problem.k, sample.problem.v):
        x[:70] = float("nan")
    poisoned, _ = launch.forward(sample.problem)
    assert torch.equal(poisoned[70:], got[70:])


def test_one_query_of_each_item() -> None:
    """The pooling attention: segments of one query and many keys, neither normed nor rotated."""
    sample = make([1, 1, 1], key_lengths=[2, 40, 150], rotary=False, norm=False)
    out, gradients = sample.run()
    want, want_gradients = sample.exact()
    check_result(out, want, torch.float32)
    check_gradients(gradients, want_gradients, torch.float32)


def test_queries_without_keys_give_zeros() -> None:
    sample = make([4, 3], key_lengths=[0, 9])
    out, gradients = sample.run()
    assert not out[:4].any()
    assert not gradients.q[:4].any()


def test_nearly_one_hot() -> None:
    """Large scores: one key takes all, and the error of a score counts in full."""
    sample = make([100], norm=False, scale=8.0)
    out, _ = sample.run()
    assert worst_row(out, sample.exact()[0], 1e-3) < 4e-4
