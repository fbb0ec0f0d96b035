"""Decoded patches back to pictures, with gradients: what perceptual terms look at, and grids that people see."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from model.config import ModelConfig
from model.packed import PackedTokens
from model.patchify import unpatchify


def window_pictures(patches: Tensor, packed: PackedTokens, model: ModelConfig) -> Iterator[Tensor]:
    """The frames of each window of images or clips, [T, H, W, 3], T = 1 of an image.

    patches: [N, values], leading values of whole frames; packed: the tokens they belong to, in raster order. Voxel sets
    have no picture: ValueError.
    """
    for (start, stop), (rows, columns) in zip(itertools.pairwise(packed.starts), packed.extents, strict=True):
        frames, rest = divmod(stop - start, rows * columns)
        if rest:
            raise ValueError(f"a window of {stop - start} tokens is no full grid of {rows} x {columns}")
        part = patches[start:stop]
        if not bool(packed.moving[start]):
            part = part[:, : model.frame_values]
        yield unpatchify(part, (frames, rows, columns), model)


def images_of(patches: Tensor, packed: PackedTokens, model: ModelConfig) -> list[Tensor]:
    """Each image of a pack of stills, [1, 3, H, W]."""
    return [frames[:1].permute(0, 3, 1, 2) for frames in window_pictures(patches, packed, model)]


def side_by_side(pairs: list[tuple[Tensor, Tensor]], height: int = 128) -> Tensor:
    """Originals over their reconstructions, uint8 [H, W, 3]. pairs: [H, W, 3] in -1..1, equal sizes in a pair."""
    columns = []
    for pair in pairs:
        column = torch.cat([picture.float().cpu() for picture in pair])
        scale = height / pair[0].shape[0]
        size = (2 * height, max(1, round(pair[0].shape[1] * scale)))
        small = torch.nn.functional.interpolate(column.permute(2, 0, 1)[None], size=size, mode="area")[0]
        columns.append(small.permute(1, 2, 0))
    grid = torch.cat(columns, dim=1)
    return grid.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
