"""A small data folder of its own, so that nothing here needs the shared files, and networks at a linear start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from media.types import UInt8Array
from model.config import VARIANTS
from model.network import ATokenNet, build
from training.config import DataConfig, LossConfig
from training.data import Library, load_library
from training.pca import Components
from training.start import start_at

SMALL = DataConfig(grids=((3, 4),), image_tokens=48, clip_tokens=32, clip_frames=(8,), clip_grids=((3, 3),))


def scene(seed: int, height: int, width: int) -> UInt8Array:
    """Something with edges, shading and grain, as a photograph has."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    picture = np.stack([128 + 60 * np.sin((x * rng.normal() + y * rng.normal()) / 15 + c) for c in range(3)], axis=-1)
    for _ in range(12):
        top, left = rng.integers(height), rng.integers(width)
        picture[top : top + rng.integers(8, 60), left : left + rng.integers(8, 60)] += rng.normal(size=3) * 50
    return np.clip(picture + rng.normal(size=picture.shape) * 3, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/train with pictures, one of them a cut-out, two of them held aside; no films."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images" / "train").mkdir(parents=True)
    for seed in range(24):
        pixels = scene(seed, 130 + 3 * seed, 200 - 2 * seed)
        picture = PIL.Image.fromarray(pixels)
        if seed == 5:
            picture.putalpha(PIL.Image.fromarray(np.tri(*pixels.shape[:2], dtype=np.uint8) * 255))
        picture.save(folder / "images" / "train" / f"scene_{60 + seed}.png")
    return folder


@pytest.fixture(scope="session")
def library(data: Path) -> Library:
    """The folder, read."""
    return load_library(data)


def random_components(values: int, count: int, seed: int) -> Components:
    """Orthonormal directions that no data gave, the first of them the mean level, so that a start costs no time."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(values, count, generator=generator)
    matrix[:, 0] = 1
    vectors = torch.linalg.qr(matrix).Q.T.contiguous()
    scales = torch.logspace(1.1, -0.7, count)
    return Components(torch.randn(values, generator=generator) / 10, vectors, scales)


@pytest.fixture
def components() -> tuple[Components, Components]:
    """For stills and for clips."""
    return random_components(768, 192, 0), random_components(3072, 192, 1)


@pytest.fixture
def net(components: tuple[Components, Components]) -> ATokenNet:
    """tiny-continuous at those components."""
    torch.manual_seed(0)
    net = build(VARIANTS["tiny-continuous"])
    start_at(net, *components, LossConfig())
    return net
