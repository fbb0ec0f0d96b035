"""Small networks with the published layout and fixed random weights."""

import numpy as np
import torch

from media.types import Image, Item, Video, Voxels
from model import ModelConfig, Tokenizer
from model.config import StackConfig
from model.network import build

torch.set_num_threads(1)


def small_config(bottleneck: str = "gaussian") -> ModelConfig:
    return ModelConfig(
        latent_channels=48,
        bottleneck=bottleneck,
        codebooks=8 if bottleneck == "fsq" else 0,
        encoder=StackConfig(width=72, blocks=2, heads=1, mlp=160, norm="layer", bias=True, qk_norm=False),
        decoder=StackConfig(width=80, blocks=2, heads=2, mlp=160, norm="rms", bias=False, qk_norm=True),
    )


def small_tokenizer(bottleneck: str = "gaussian", pass_tokens: int | None = None) -> Tokenizer:
    torch.manual_seed(0)
    net = build(small_config(bottleneck))
    torch.nn.init.normal_(net.encoder.head.probe)
    torch.nn.init.normal_(net.proj.weight, std=0.3)
    return Tokenizer(net, name=f"small-{bottleneck}", revision="0" * 64, pass_tokens=pass_tokens)


def random_image(rng: np.random.Generator, height: int, width: int) -> Image:
    return Image(pixels=rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def random_video(rng: np.random.Generator, frames: int, height: int, width: int) -> Video:
    return Video(frames=rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8), fps=24.0)


def random_voxels(rng: np.random.Generator, count: int) -> Voxels:
    cells = rng.choice(64**3, count, replace=False)
    coords = np.stack([cells // 4096, cells // 64 % 64, cells % 64], 1).astype(np.int32)
    return Voxels(coords=coords, feats=rng.random((count, 768), dtype=np.float32))


def mixed_items(rng: np.random.Generator) -> list[Item]:
    return [
        random_image(rng, 16, 16),
        random_video(rng, 21, 40, 24),
        random_image(rng, 50, 33),
        random_voxels(rng, 30),
        random_video(rng, 3, 16, 20),
        random_image(rng, 1, 70),
    ]
