"""Where there is no GPU, the kernels of this folder run in triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

INTERPRETED = not torch.cuda.is_available()

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]  # triton is made for Linux only
elif INTERPRETED:
    # Triton reads the variable when it is imported and the setting when kernels are; processes that tests start, and
    # that compile kernels, must inherit neither.
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    del os.environ["TRITON_INTERPRET"]
    triton.knobs.propagate_env = False
    triton.knobs.runtime.interpret = True
    triton.knobs.propagate_env = True

    from tests.kernels import interpreter_bf16

    interpreter_bf16.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU the whole folder is a GPU test: `pytest -m gpu` runs the compiled kernels through it."""
    for item in items:
        if not INTERPRETED and item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's time goes by the number of operations, whatever their size."""
    if INTERPRETED:
        from model.kernels import launch
        from model.kernels.tiles import Tile

        monkeypatch.setattr(launch, "lookup", lambda *_: Tile(128, 64, 4, 1))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory that a kernel should have written holds NaN until it did."""
    empty = torch.empty

    def poison(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poison)
        yield
