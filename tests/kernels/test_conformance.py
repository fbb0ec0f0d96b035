"""The published network's numbers with the kernels where its attention is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model.kernels import attention, launch, ops
from model.verify import SHIPPED, find_cases, run_case
from tests.kernels.samples import DEVICE
from tests.paths import CONFORMANCE

FOLDERS = [SHIPPED, *([CONFORMANCE] if CONFORMANCE.is_dir() else [])]
CASES = [case for folder in FOLDERS for case in find_cases(folder) if case.name.startswith("core_")]


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_vectors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def packed_attention(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(len(arguments[0]))
        return launch.forward(launch.Problem(*arguments, launch.device_arch(DEVICE)))

    if DEVICE.type == "cpu":  # where starts are Python numbers, the CPU has a path of its own
        starts_of = attention._starts
        monkeypatch.setattr(attention, "_starts", lambda *given: torch.tensor(starts_of(*given), dtype=torch.int32))
    monkeypatch.setattr(ops, "packed_attention", packed_attention)
    rows, _ = run_case(folder, DEVICE)
    assert calls
    assert all(row.passed for row in rows), [row for row in rows if not row.passed]
