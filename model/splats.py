"""Gaussians: how the decoder's outputs split into attributes, and what each attribute means.

M Gaussians; G of them a voxel. Source: conformance/gs_decoder_tiny and conformance/gs_ply.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from media.types import Float32Array, Gaussians
from model.config import GaussianConfig

OUTPUTS = {"offset": 3, "features_dc": 3, "scaling": 3, "rotation": 4, "opacity": 1}
"""Numbers of one Gaussian, in the order of the outputs: all offsets of a voxel, then all its colours, and so on."""

SH_DEGREE_0 = 0.28209479177387814


@dataclass(frozen=True)
class Splats:
    """M Gaussians before activation, float32 or float64, after the multipliers.

    xyz01: [M, 3], in 0..1 across the grid. features_dc: [M, 3]. scaling: [M, 3]. rotation: [M, 4]. opacity: [M, 1].
    """

    xyz01: Tensor
    features_dc: Tensor
    scaling: Tensor
    rotation: Tensor
    opacity: Tensor
    config: GaussianConfig

    def positions(self) -> Tensor:
        """[M, 3], in units of the world, where the grid spans -0.5 to 0.5."""
        return self.xyz01 - 0.5

    def colours(self) -> Tensor:
        """RGB [M, 3], 0 or more; not clamped above."""
        return (0.5 + SH_DEGREE_0 * self.features_dc).clamp(min=0)

    def scales(self) -> Tensor:
        """Standard deviations along the own axes, [M, 3], in units of the world."""
        bias = math.log(math.expm1(self.config.initial_scale))
        return (F.softplus(self.scaling + bias).square() + self.config.smallest_scale**2).sqrt()

    def quaternions(self) -> Tensor:
        """(w, x, y, z), [M, 4], not normalised."""
        return self.rotation + self.rotation.new_tensor([1, 0, 0, 0])

    def rotations(self) -> Tensor:
        """Unit quaternions (w, x, y, z), [M, 4]."""
        return F.normalize(self.quaternions(), dim=-1)

    def opacity_logits(self) -> Tensor:
        """[M, 1]; the sigmoid of them is the opacity."""
        chance = self.config.initial_opacity
        return self.opacity + math.log(chance / (1 - chance))

    def opacities(self) -> Tensor:
        """[M, 1], in 0..1."""
        return self.opacity_logits().sigmoid()

    def covariances(self) -> Tensor:
        """R S^2 R^T, [M, 3, 3]."""
        half = rotation_matrices(self.rotations()) * self.scales()[:, None, :]
        return half @ half.transpose(1, 2)

    def to_record(self) -> Gaussians:
        """The plain record that a PLY file is written from. Opacities stay finite, unlike in published files."""
        return Gaussians(
            positions=_float32(self.positions()),
            colours=_float32(self.features_dc),
            opacities=_float32(self.opacity_logits()[:, 0]),
            scales=_float32(self.scales().log()),
            rotations=_float32(self.quaternions()),
        )


def split_outputs(outputs: Tensor, places: Tensor, perturbation: Tensor, config: GaussianConfig) -> Splats:
    """Outputs of the decoder [N, 14 G] for voxels at the integers places [N, 3]; perturbation: [G, 3]."""
    sizes = [config.gaussians * width for width in OUTPUTS.values()]
    offset, colour, scaling, rotation, opacity = (
        part.unflatten(1, (config.gaussians, width)) * factor
        for part, width, factor in zip(outputs.split(sizes, dim=1), OUTPUTS.values(), config.multipliers, strict=True)
    )
    centres = (places.to(outputs.dtype) + 0.5) / config.grid
    moved = torch.tanh(offset + perturbation.to(outputs.dtype)) * (0.5 * config.reach / config.grid)
    flat = partial(torch.flatten, start_dim=0, end_dim=1)
    return Splats(flat(centres[:, None] + moved), flat(colour), flat(scaling), flat(rotation), flat(opacity), config)


def perturbation(config: GaussianConfig) -> Tensor:
    """What is added to the offsets so that outputs of 0 fill their cell evenly: Hammersley points, float32 [G, 3]."""
    count = config.gaussians
    points = np.array([[g / count, _radical_inverse(g, 2), _radical_inverse(g, 3)] for g in range(count)])
    return torch.from_numpy(np.arctanh((2 * points - 1) / config.reach).astype(np.float32))


def rotation_matrices(unit: Tensor) -> Tensor:
    """[M, 3, 3] of unit quaternions (w, x, y, z), [M, 4]."""
    w, x, y, z = unit.unbind(-1)
    rows = [
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    ]
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def _radical_inverse(number: int, base: int) -> float:
    """The digits of the number, mirrored at the point."""
    value, place = 0.0, 1.0
    while number:
        place /= base
        number, digit = divmod(number, base)
        value += digit * place
    return value


def _float32(x: Tensor) -> Float32Array:
    array: Float32Array = x.detach().float().cpu().contiguous().numpy()
    return array
