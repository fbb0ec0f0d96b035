"""A linear way round both stacks, for the small bundled models: they start at the PCA solution and learn the rest.

Not part of the published architecture; ModelConfig.linear_path adds it, with tensors of its own. A clip's token
holds four different frames, an image's token one and three grey ones, so each has its own bases. N tokens, P values
of a patch, L latent channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import FSQ_LEVELS, ModelConfig
from model.fsq import CENTRES
from model.kernels import fixed_linear
from model.packed import PackedTokens

NEIGHBOURS = ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1))
"""Rows and columns from a token to the eight around it."""

NEIGHBOUR_RANK = 64


class Basis(nn.Module):
    """One affine way in, analysis (x - mean), and out: synthesis z + bias, and what the neighbours' z say about x.

    values: how many of a patch's values it sees, from the first on. fixed: as in Linear.
    """

    fixed = False

    def __init__(self, values: int, latent_channels: int) -> None:
        super().__init__()
        self.values = values
        self.mean = nn.Parameter(torch.zeros(values))
        self.analysis = nn.Parameter(torch.zeros(latent_channels, values))
        self.bias = nn.Parameter(torch.zeros(values))
        self.synthesis = nn.Parameter(torch.zeros(values, latent_channels))
        self.gather = nn.Parameter(torch.zeros(NEIGHBOUR_RANK, len(NEIGHBOURS) * latent_channels))
        self.spread = nn.Parameter(torch.zeros(values, NEIGHBOUR_RANK))

    def analyse(self, patches: Tensor) -> Tensor:
        """Coefficients [n, L] of patches [n, values]."""
        shift = -(self.analysis @ self.mean)
        return (fixed_linear if self.fixed else F.linear)(patches, self.analysis, shift)

    def synthesise(self, latents: Tensor, differences: Tensor, count: int) -> Tensor:
        """The first `count` values of patches, or all if there are fewer. latents: [n, L]; differences: [n, 8 L]."""
        if self.fixed:
            own = fixed_linear(latents, self.synthesis, self.bias)
            return (own + fixed_linear(fixed_linear(differences, self.gather), self.spread))[:, :count]
        own = F.linear(latents, self.synthesis[:count], self.bias[:count])
        return torch.addmm(own, differences @ self.gather.T, self.spread[:count].T)


class LinearPath(nn.Module):
    """Added to what encoder and decoder say. still: images and voxels; moving: clips."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.still = Basis(config.frame_values, config.latent_channels)
        self.moving = Basis(config.patch_values, config.latent_channels)

    def encode(self, patches: Tensor, moving: Tensor) -> Tensor:
        """Coefficients of each patch. patches: [N, P]; moving: bool [N]. Returns [N, L]."""

        def part(basis: Basis, rows: Tensor | slice) -> Tensor:
            return basis.analyse(patches[rows, : basis.values])

        return self._by_kind(part, moving)

    def decode(self, latents: Tensor, packed: PackedTokens, values: int) -> Tensor:
        """The first `values` values of each patch; those that the basis does not know are 0. latents: [N, L]."""
        differences = neighbour_differences(latents, packed)

        def part(basis: Basis, rows: Tensor | slice) -> Tensor:
            both = basis.synthesise(latents[rows], differences[rows], values)
            return F.pad(both, (0, values - both.shape[1]))

        return self._by_kind(part, packed.moving)

    def _by_kind(self, part: Callable[[Basis, Tensor | slice], Tensor], moving: Tensor) -> Tensor:
        """Each token through the basis of its kind; without a gather where all are of one kind."""
        clips = int(moving.sum())
        if clips in (0, len(moving)):
            return part(self.moving if clips else self.still, slice(None))
        still_rows, moving_rows = (~moving).nonzero()[:, 0], moving.nonzero()[:, 0]
        still, clip = part(self.still, still_rows), part(self.moving, moving_rows)
        out = still.new_empty(len(moving), still.shape[1])
        return out.index_copy(0, still_rows, still).index_copy(0, moving_rows, clip)


def neighbour_differences(latents: Tensor, packed: PackedTokens) -> Tensor:
    """What the eight tokens around each one have more than it has; 0 where there is none, and for voxels.

    latents: [N, L] of the tokens of `packed`. Returns [N, 8 L] in the order of NEIGHBOURS.
    """
    t, x, y, z = packed.coords.long().unbind(1)
    lengths = torch.tensor(packed.starts, device=x.device).diff()
    window = torch.arange(len(lengths), device=x.device).repeat_interleave(lengths)
    # One number for each place, with a margin of one so that no neighbour of a border is another token's place.
    sizes = [int(axis.max()) + 3 for axis in (t, x, y, z)]

    def place(dx: int, dy: int) -> Tensor:
        return (((window * sizes[0] + t) * sizes[1] + x + 1 + dx) * sizes[2] + y + 1 + dy) * sizes[3] + z

    places, order = place(0, 0).sort()
    own = torch.arange(len(x), device=x.device)
    # A neighbouring voxel is not a neighbouring piece of one picture.
    pictured = packed.moving | (t == 0)
    parts = []
    for dx, dy in NEIGHBOURS:
        wanted = place(dx, dy)
        slot = torch.searchsorted(places, wanted).clamp(max=len(places) - 1)
        rows = torch.where((places[slot] == wanted) & pictured, order[slot], own)
        parts.append(latents[rows] - latents)
    return torch.cat(parts, dim=1)


class DigitTable(nn.Module):
    """How many base-4 digits each coefficient gets, and how fine they are.

    Cells are centred on whole steps, so that a coefficient near 0 comes back as 0 and smooth areas stay smooth; with
    an even number of cells, one more lies below 0 than above.

    step: [L] width of a cell of coefficient k. component: int [L] the coefficient that channel c is a digit of.
    power: int [L] which digit, 0 the least significant.
    """

    step: Tensor
    component: Tensor
    power: Tensor

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        self.register_buffer("step", torch.ones(latent_channels))
        self.register_buffer("component", torch.arange(latent_channels, dtype=torch.int32))
        self.register_buffer("power", torch.zeros(latent_channels, dtype=torch.int32))

    def forward(self, coefficients: Tensor) -> Tensor:
        """Write each coefficient in base 4, one digit a channel. [N, L] to [N, L] of z in the middle of FSQ levels.

        A strong coefficient gets many digits, a weak one none: 96 bits a token go where the variance is.
        """
        counts = torch.bincount(self.component, minlength=len(self.step))
        cells = (FSQ_LEVELS**counts).to(coefficients)
        index = torch.floor(coefficients / self.step + (cells + 1) / 2)
        index = index.clamp(min=torch.zeros_like(cells), max=cells - 1)
        digits = index.long()[:, self.component.long()] // FSQ_LEVELS ** self.power.long() % FSQ_LEVELS
        return coefficients.new_tensor(CENTRES)[digits]


class Digits(nn.Module):
    """Coefficients to z for FSQ; gradients do not pass. still, moving: as in LinearPath."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.still = DigitTable(config.latent_channels)
        self.moving = DigitTable(config.latent_channels)

    def forward(self, coefficients: Tensor, moving: Tensor) -> Tensor:
        """coefficients: [N, L]; moving: bool [N]. Returns float32 [N, L]."""
        coefficients = coefficients.float()
        return torch.where(moving[:, None], self.moving(coefficients), self.still(coefficients))
