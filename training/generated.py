"""Endless drawn samples: coloured shapes still, moving, and as voxel shells, each with a caption that is true.

For the smoke run and for tests; also honest extra data for the small models. Sample n of a kind is always the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from media.types import Image, UInt8Array, Video, Voxels
from training.batches import Kind, Sample

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (210, 40, 40),
    "green": (50, 160, 60),
    "blue": (50, 80, 200),
    "yellow": (230, 200, 50),
    "white": (240, 240, 240),
    "purple": (140, 60, 170),
}
SHAPES = ("disc", "square", "ring", "triangle")
SOLIDS = ("ball", "box", "rod", "plate")
MOVES = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
KINDS: tuple[Kind, ...] = ("distill", "image_rec", "video_rec", "asset_rec", "video_sem", "asset_sem")


class Generated:
    """A Source. sides: (least, most) pixels; frames: lengths of clips that are reconstructed."""

    def __init__(self, *, seed: int = 0, sides: tuple[int, int] = (32, 64), frames: Sequence[int] = (4, 8)) -> None:
        self.seed = seed
        self.sides = sides
        self.frames = tuple(frames)

    def draw(self, kind: Kind, numbers: Sequence[int]) -> list[Sample]:
        """See Source."""
        return [self._one(kind, number) for number in numbers]

    def ahead(self, kind: Kind, numbers: Sequence[int]) -> None:
        """See Source. They are drawn when they are asked for."""

    def left_out(self) -> int:
        """See Source. All can be used."""
        return 0

    def order(self) -> dict[str, str]:
        """See Source."""
        return {"drawn shapes": f"seed {self.seed}"}

    def close(self) -> None:
        """See Source. There is nothing to close."""

    def _one(self, kind: Kind, number: int) -> Sample:
        rng = np.random.default_rng([self.seed, KINDS.index(kind), number])
        colour = str(rng.choice(list(COLOURS)))
        if kind in ("asset_rec", "asset_sem"):
            solid = str(rng.choice(SOLIDS))
            return Sample(_solid(rng, solid, COLOURS[colour]), f"a {colour} {solid}")
        least, most = (side // 16 for side in self.sides)
        height, width = (16 * int(rng.integers(least, most + 1)) for _ in range(2))
        shape = str(rng.choice(SHAPES))
        ground = _ground(rng, height, width)
        radius = float(rng.uniform(0.2, 0.4)) * min(height, width)
        centre = rng.uniform(0.3, 0.7, 2) * (height, width)
        if kind in ("distill", "image_rec"):
            pixels = _paint(ground, shape, COLOURS[colour], centre, radius)
            return Sample(Image(pixels=pixels), f"a {colour} {shape}")
        move = str(rng.choice(list(MOVES)))
        speed = np.array(MOVES[move]) * rng.uniform(1, 3)
        count = int(rng.choice(self.frames))
        frames = [_paint(ground, shape, COLOURS[colour], centre + speed * t, radius) for t in range(count)]
        return Sample(Video(frames=np.stack(frames), fps=8.0), f"a {colour} {shape} moves {move}")


def hash_tokens(captions: Sequence[str], length: int = 64, words: int = 1000) -> Tensor:
    """A tokenizer without a vocabulary: each word's checksum, padded with 0. Returns int64 [B, length]."""
    rows = torch.zeros(len(captions), length, dtype=torch.int64)
    for row, caption in enumerate(captions):
        for column, word in enumerate(caption.lower().split()[:length]):
            rows[row, column] = 1 + zlib.crc32(word.encode()) % (words - 1)
    return rows


def _ground(rng: np.random.Generator, height: int, width: int) -> npt.NDArray[np.float32]:
    """A soft slope of two colours with grain."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    slope = (np.cos(angle) * x / width + np.sin(angle) * y / height)[..., None]
    ends = rng.uniform(20, 220, (2, 3)).astype(np.float32)
    grain = rng.normal(0, rng.uniform(0, 8), (height, width, 1)).astype(np.float32)
    return (ends[0] + (ends[1] - ends[0]) * slope.astype(np.float32) + grain).astype(np.float32)


def _paint(
    ground: npt.NDArray[np.float32],
    shape: str,
    colour: tuple[int, int, int],
    centre: npt.NDArray[np.float64],
    radius: float,
) -> UInt8Array:
    y, x = np.indices(ground.shape[:2]).astype(np.float32)
    dy, dx = y - centre[0], x - centre[1]
    distance = {
        "disc": np.hypot(dy, dx) - radius,
        "ring": np.abs(np.hypot(dy, dx) - 0.75 * radius) - 0.25 * radius,
        "square": np.maximum(np.abs(dy), np.abs(dx)) - 0.9 * radius,
        "triangle": np.maximum(dy - 0.6 * radius, np.abs(dx) * 0.9 - 0.5 * dy - 0.6 * radius),
    }[shape]
    cover = np.clip(0.5 - distance, 0, 1)[..., None]  # a soft edge, one pixel wide
    picture = ground * (1 - cover) + np.array(colour, np.float32) * cover
    return (picture + 0.5).clip(0, 255).astype(np.uint8)


def _solid(rng: np.random.Generator, solid: str, colour: tuple[int, int, int]) -> Voxels:
    """The surface of a solid in the 64 x 64 x 64 grid; a patch is its colour, lighter towards its upper side."""
    sizes = {"ball": (5, 5, 5), "box": (5, 4, 5), "rod": (2, 2, 9), "plate": (7, 7, 1)}[solid]
    half = np.array(sizes) * rng.uniform(0.7, 1.3)
    centre = rng.uniform(12, 52, 3)
    places = np.indices((64, 64, 64)).reshape(3, -1).T
    offset = (places - centre) / half
    depth = np.linalg.norm(offset, axis=1) if solid == "ball" else np.abs(offset).max(1)
    coords = places[(depth <= 1) & (depth > 1 - 1.2 / half.max())].astype(np.int32)
    if not len(coords):
        coords = centre.astype(np.int32)[None]
    light = 0.7 + 0.3 * (coords[:, 2] - coords[:, 2].min()) / max(1, np.ptp(coords[:, 2]))
    shade = np.linspace(1.0, 0.85, 16, dtype=np.float32)[:, None, None]
    patch = np.broadcast_to(shade * np.array(colour, np.float32) / 255, (16, 16, 3)).reshape(1, -1)
    return Voxels(coords=coords, feats=(light[:, None] * patch).astype(np.float32))
