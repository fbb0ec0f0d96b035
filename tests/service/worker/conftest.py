"""A real network of the tiny size with random weights: what the worker does must not depend on training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from model import Tokenizer, weights
from model.config import VARIANTS
from model.network import ATokenNet
from service.queue.server import PrivateRedis


@dataclass(frozen=True)
class WeightFiles:
    """Files with random weights, by variant."""

    continuous: Path
    discrete: Path


@pytest.fixture(scope="session")
def weight_files(tmp_path_factory: pytest.TempPathFactory) -> WeightFiles:
    folder = tmp_path_factory.mktemp("weights")
    paths = {}
    for variant in ("tiny-continuous", "tiny-discrete"):
        torch.manual_seed(7)
        paths[variant] = folder / f"random-{variant}.safetensors"
        net = ATokenNet(VARIANTS[variant])
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.abs().max() == 0:
                    parameter.normal_(0, 0.02)
        weights.save(net, paths[variant])
    return WeightFiles(paths["tiny-continuous"], paths["tiny-discrete"])


@pytest.fixture(scope="session")
def continuous(weight_files: WeightFiles) -> Tokenizer:
    return Tokenizer.load(str(weight_files.continuous), device="cpu")


@pytest.fixture(scope="session")
def discrete(weight_files: WeightFiles) -> Tokenizer:
    return Tokenizer.load(str(weight_files.discrete), device="cpu")


@pytest.fixture
def redis() -> Iterator[PrivateRedis]:
    with PrivateRedis() as server:
        yield server
