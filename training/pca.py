"""Principal components of patches.

N patches, P values of a patch, K components.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from media.types import Image, UInt8Array, Video
from model.config import ModelConfig
from model.patchify import layout_of, patchify
from training.config import DataConfig
from training.data import Library, films_of, flatten, picture_paths, random_clip, read_picture

PICTURE_PATCHES = 256
"""Patches drawn of each picture, at most: pictures count alike, whatever their size."""

FILM_PATCHES = 3000
PANNED_CLIPS = 250


@dataclass(frozen=True)
class Components:
    """mean: [P]; vectors: [K, P], orthonormal rows; scales: [K] standard deviations, largest first. float32."""

    mean: Tensor
    vectors: Tensor
    scales: Tensor

    def encode(self, patches: Tensor) -> Tensor:
        """[N, P] to coefficients of unit variance, [N, K]."""
        return (patches - self.mean) @ (self.vectors / self.scales[:, None]).T

    def decode(self, coefficients: Tensor) -> Tensor:
        """Inverse of encode as far as K components go."""
        return coefficients @ (self.vectors * self.scales[:, None]) + self.mean

    def first(self, count: int) -> Components:
        """The strongest `count` components."""
        return Components(self.mean, self.vectors[:count], self.scales[:count])


def fit_components(parts: Iterable[Tensor], count: int) -> Components:
    """PCA of patches that come in parts [n, P]; one pass, float64 sums."""
    total, sums, products = 0, None, None
    for part in parts:
        if sums is None or products is None:
            sums = torch.zeros(part.shape[1], dtype=torch.float64)
            products = torch.zeros(part.shape[1], part.shape[1], dtype=torch.float64)
        total += len(part)
        sums += part.sum(0, dtype=torch.float64)
        products += part.T @ part
    if sums is None or products is None:
        raise ValueError("no patches to fit components to")
    mean = sums / total
    values, vectors = torch.linalg.eigh(products / total - torch.outer(mean, mean))
    order = torch.arange(len(values) - 1, len(values) - 1 - count, -1)
    scales = values[order].clamp(min=1e-10).sqrt()
    return Components(mean.float(), vectors[:, order].T.contiguous().float(), scales.float())


def still_patches(data: Path, config: ModelConfig, most: int | None = PICTURE_PATCHES) -> Iterator[Tensor]:
    """Whole patches of every training picture, cut-outs over white: [n, 768] of each, in -1..1.

    most: patches drawn of each picture; None takes all, and large pictures then count for more.
    """
    rng = np.random.default_rng(0)
    for path in picture_paths(data / "images" / "train"):
        part = patches_of(np.asarray(flatten(read_picture(path))), config)
        yield part if most is None else part[torch.from_numpy(rng.permutation(len(part))[:most])]


def moving_patches(data: Path, config: ModelConfig, panned: int = PANNED_CLIPS) -> Iterator[Tensor]:
    """Patches [n, 3072] of the training films, and of photographs panned and zoomed."""
    rng = np.random.default_rng(1)
    for _, film in films_of(data / "videos" / "train"):
        frames = film[: len(film) // 4 * 4]
        part = patches_of(frames, config)
        yield part[torch.from_numpy(rng.permutation(len(part))[:FILM_PATCHES])]
    pictures = tuple(read_picture(path) for path in picture_paths(data / "images" / "train")[::3])
    library = Library(pictures=pictures, films=())
    for _ in range(panned):
        yield patches_of(random_clip(rng, library, DataConfig(panned=1.0), 4, 128), config)


def patches_of(pixels: UInt8Array, config: ModelConfig) -> Tensor:
    """Whole patches of a picture [H, W, 3] ([n, 768]) or clip [T, H, W, 3] ([n, 3072])."""
    item = Image(pixels=pixels) if pixels.ndim == 3 else Video(frames=pixels)
    layout = layout_of(item, config, "crop")
    if 0 in layout.grid:
        return torch.zeros(0, config.frame_values if pixels.ndim == 3 else config.patch_values)
    feats = patchify(item, layout, config)
    return feats[:, : config.frame_values] if pixels.ndim == 3 else feats
