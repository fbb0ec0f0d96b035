"""An ablation: rotation over the axes that a modality has, instead of all four for everybody.

Images turn by (x, y), clips by (t, x, y), assets by (x, y, z). Every axis that a modality has gets an equal part of the
channel pairs; frequencies run over the same range as in the published 4D form. D: head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.network import ATokenNet
from model.packed import PackedTokens
from model.patchify import VOXEL_T
from model.rope import BASE

AXES = {"image": (1, 2), "video": (0, 1, 2), "voxels": (1, 2, 3)}
"""Columns of the coordinates (t x y z) that turn."""


def angles(coords: Tensor, axes: tuple[int, ...], head_width: int) -> Tensor:
    """Angle of every pair, float64 [N, D / 2]: pair j belongs to axis j mod len(axes). coords: int [N, 4]."""
    pairs = torch.arange(head_width // 2, device=coords.device)
    place = torch.tensor(axes, device=coords.device)[pairs % len(axes)]
    step = (pairs // len(axes)).double() / -(-(head_width // 2) // len(axes))  # 0..1 over the pairs of an axis
    # The published 4D form goes over D / 8 frequencies down to BASE ** -(1/8).
    return coords.double()[:, place] * BASE ** (-step / 8)


def modality_table(packed: PackedTokens, head_width: int) -> Tensor:
    """As rotary_table, float32 [N, D]. What a token is follows from its place: assets live at t = 1, stills at 0."""
    voxels = ~packed.moving & (packed.coords[:, 0] == VOXEL_T)
    turned = torch.empty(len(packed), head_width // 2, dtype=torch.float64, device=packed.coords.device)
    for rows, name in ((~packed.moving & ~voxels, "image"), (packed.moving, "video"), (voxels, "voxels")):
        turned[rows] = angles(packed.coords[rows], AXES[name], head_width)
    return torch.stack((turned.cos(), turned.sin()), -1).flatten(1).float()


def use_modality_rope(net: ATokenNet) -> None:
    """From now on both stacks turn by modality. Weights trained so need it again when they are loaded."""
    for stack in (net.encoder, net.decoder):
        head_width = stack.head_width

        def rotary(packed: PackedTokens, width: int = head_width) -> Tensor:
            return modality_table(packed, width)

        object.__setattr__(stack, "rotary", rotary)
