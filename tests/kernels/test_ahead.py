"""Every entry of the tile table compiles for its GPU, without spills, within its shared memory; no GPU is needed."""

import subprocess
import sys

import pytest
import torch

from model.kernels.tiles import ARCHITECTURES
from tests.kernels.ahead import Report, faults
from tests.paths import ROOT


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (Report(registers=128, stack=0, shared=99 << 10, matrix="none"), ""),
        (Report(registers=255, stack=8, shared=1024, matrix="none"), "spills 8 bytes"),
        (Report(registers=128, stack=0, shared=(99 << 10) + 1, matrix="none"), "shared memory"),
        (Report(registers=128, stack=0, shared=1024, matrix="tcgen05.mma"), "tf32"),
    ],
)
def test_what_is_a_fault(report: Report, message: str) -> None:
    found = "; ".join(faults(report, 89, torch.float32))
    assert message in found
    assert bool(found) == bool(message)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_table_compiles(arch: int) -> None:
    command = [sys.executable, "-m", "tests.kernels.ahead", str(arch)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    print(done.stdout)  # the figures: pytest -rP shows them
    assert done.returncode == 0, done.stdout + done.stderr
