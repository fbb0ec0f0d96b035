"""The same promises on a CUDA device: `pytest -m gpu`."""

from pathlib import Path

import numpy as np
import pytest
import torch

from model import Tokenizer, weights
from model.network import build
from model.verify import SHIPPED, find_cases, rowwise_error, run_case
from tests.bench.batch_independence import measure, real_items
from tests.model.samples import mixed_items, small_config, small_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.parametrize("folder", find_cases(SHIPPED), ids=lambda folder: folder.name)
def test_shipped_vectors_in_float32(folder: Path) -> None:
    rows, _ = run_case(folder, torch.device("cuda"))
    assert all(row.passed for row in rows), [row for row in rows if not row.passed]


def test_weights_go_straight_to_the_device(tmp_path: Path) -> None:
    weights.save(build(small_config()), tmp_path / "small.safetensors")
    net = weights.load(tmp_path / "small.safetensors", device="cuda", dtype=torch.bfloat16)
    assert all(p.is_cuda and p.dtype == torch.bfloat16 for p in net.parameters())


def test_cpu_and_gpu_agree() -> None:
    items = mixed_items(np.random.default_rng(0))
    cpu = small_tokenizer()
    want = cpu.encode(items, {"latents", "embedding"})
    gpu = Tokenizer(small_tokenizer().net.to("cuda"), name=cpu.name, revision=cpu.revision)
    for got, exact in zip(gpu.encode(items, {"latents", "embedding"}), want, strict=True):
        assert rowwise_error(got.latents, exact.latents) < 1e-4
        assert rowwise_error(got.embedding[None], exact.embedding[None]) < 1e-4


@pytest.mark.parametrize("name", ["tiny-continuous", "tiny-discrete"])
def test_batch_independence(name: str) -> None:
    figures = measure(Tokenizer.load(name, device="cuda", dtype="float32"), real_items(), mixes=20)
    assert max(figures.errors.values()) <= 1e-4
    assert figures.codes_differing == 0 or figures.largest_margin <= 1e-3
