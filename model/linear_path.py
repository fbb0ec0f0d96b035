"""A linear way round both stacks, for the small bundled models: they start at the PCA solution and learn the rest.

Not part of the published architecture; ModelConfig.linear_path adds it, with tensors of its own. A clip's token
holds four different frames, an image's token one and three grey ones, so each has its own bases. N tokens, P values
of a patch, D components, L latent channels. Without experts (experts.py) the components are the latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.experts import DigitExperts, Experts, steady_linear
from model.kernels import fixed_linear
from model.packed import PackedTokens

NEIGHBOURS = ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1))
"""Rows and columns from a token to the eight around it."""

NEIGHBOUR_RANK = 64

MARK_QUIET = 14
"""Distance of two values of a mark over the deviation of its posterior: half of it is 7 deviations."""


class Basis(nn.Module):
    """One affine way in, analysis (x - mean), and out: synthesis c + bias, and what the neighbours' c say about x.

    values: how many of a patch's values it sees, from the first on. seen: how many components of each neighbour count,
    from the first on. fixed: as in Linear, for synthesise; analyse is always so without gradients.
    """

    fixed = False

    def __init__(self, values: int, components: int, seen: int) -> None:
        super().__init__()
        self.values = values
        self.mean = nn.Parameter(torch.zeros(values))
        self.analysis = nn.Parameter(torch.zeros(components, values))
        self.bias = nn.Parameter(torch.zeros(values))
        self.synthesis = nn.Parameter(torch.zeros(values, components))
        self.gather = nn.Parameter(torch.zeros(NEIGHBOUR_RANK, len(NEIGHBOURS) * seen))
        self.spread = nn.Parameter(torch.zeros(values, NEIGHBOUR_RANK))

    def analyse(self, patches: Tensor) -> Tensor:
        """Components [n, D] of patches [n, values]."""
        shift = -(self.analysis @ self.mean)
        return steady_linear(patches, self.analysis, shift)

    def synthesise(self, components: Tensor, differences: Tensor, count: int) -> Tensor:
        """The first `count` values of patches, or all if there are fewer.

        components: [n, D]; differences: [n, 8 seen].
        """
        if self.fixed:
            own = fixed_linear(components, self.synthesis, self.bias)
            return (own + fixed_linear(fixed_linear(differences, self.gather), self.spread))[:, :count]
        own = F.linear(components, self.synthesis[:count], self.bias[:count])
        return torch.addmm(own, differences @ self.gather.T, self.spread[:count].T)


class LinearPath(nn.Module):
    """Added to what encoder and decoder say. still: images and voxels; moving: clips.

    It stays in float32 whatever the dtype of the stacks (weights.load sees to it): components have the scale of pixels
    and are subtracted from each other, and bfloat16 would cost up to 3 dB.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.seen = config.latent_channels
        self.components = config.components if config.experts else config.latent_channels
        self.still = Basis(config.frame_values, self.components, self.seen)
        self.moving = Basis(config.patch_values, self.components, self.seen)
        self.still_experts, self.moving_experts = _experts(config), _experts(config)
        self.marks = config.marks
        self.mark_logvar = 2 * math.log(self.still_experts.mark_step / MARK_QUIET) if self.still_experts else 0.0

    def encode(self, patches: Tensor, moving: Tensor) -> Tensor:
        """Latents of each patch. patches: [N, P]; moving: bool [N]. Returns [N, L] in the dtype of the path."""
        patches = patches.to(self.still.mean.dtype)

        def part(clips: bool, rows: Tensor | slice) -> Tensor:
            basis, experts = self.of_kind(clips)
            components = basis.analyse(patches[rows, : basis.values])
            return components if experts is None else experts.encode(components)

        return _by_kind(part, moving)

    def correct(self, latents: Tensor, correction: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents with what the encoder has to say, which leaves marks alone. All [N, L].

        Noise on a mark would pass for another expert long before a gradient told of it, so it is fixed and small.
        """
        if not self.marks:
            return latents + correction, logvar
        marks = latents[:, -self.marks :]
        quiet = logvar.new_full(marks.shape, self.mark_logvar)
        mean = torch.cat([latents[:, : -self.marks] + correction[:, : -self.marks], marks], dim=1)
        return mean, torch.cat([logvar[:, : -self.marks], quiet], dim=1)

    def recall(self, latents: Tensor, moving: Tensor) -> Tensor:
        """Components that latents stand for. latents: [N, L]; moving: bool [N]. Returns [N, D]."""
        latents = latents.to(self.still.mean.dtype)

        def part(clips: bool, rows: Tensor | slice) -> Tensor:
            _, experts = self.of_kind(clips)
            return latents[rows] if experts is None else experts.decode(latents[rows])

        return _by_kind(part, moving)

    def levels_of(self, latents: Tensor, moving: Tensor) -> Tensor:
        """z in the middle of FSQ levels, float32 [N, L], of latents [N, L]; only for codes. No gradient passes."""

        def part(clips: bool, rows: Tensor | slice) -> Tensor:
            _, experts = self.of_kind(clips)
            assert isinstance(experts, DigitExperts)
            return experts.levels_of(latents[rows])

        return _by_kind(part, moving)

    def decode(self, latents: Tensor, packed: PackedTokens, values: int) -> Tensor:
        """The first `values` values of each patch; those that the basis does not know are 0. latents: [N, L]."""
        components = self.recall(latents, packed.moving)
        differences = neighbour_differences(components[:, : self.seen], packed)

        def part(clips: bool, rows: Tensor | slice) -> Tensor:
            basis, _ = self.of_kind(clips)
            both = basis.synthesise(components[rows], differences[rows], values)
            return F.pad(both, (0, values - both.shape[1]))

        return _by_kind(part, packed.moving)

    def straighten(self) -> None:
        """Undo what half precision did to the experts of a file."""
        for experts in (self.still_experts, self.moving_experts):
            if experts is not None:
                experts.straighten()

    def of_kind(self, clips: bool) -> tuple[Basis, Experts | None]:
        """The bases of clips, or of all else."""
        return (self.moving, self.moving_experts) if clips else (self.still, self.still_experts)


def _experts(config: ModelConfig) -> Experts | None:
    if not config.experts:
        return None
    return DigitExperts(config) if config.bottleneck == "fsq" else Experts(config)


def _by_kind(part: Callable[[bool, Tensor | slice], Tensor], moving: Tensor) -> Tensor:
    """part(clips, rows) of each kind; without a gather where all tokens are of one kind."""
    clips = int(moving.sum())
    if clips in (0, len(moving)):
        return part(bool(clips), slice(None))
    still_rows, moving_rows = (~moving).nonzero()[:, 0], moving.nonzero()[:, 0]
    still, clip = part(False, still_rows), part(True, moving_rows)
    out = still.new_empty(len(moving), still.shape[1])
    return out.index_copy(0, still_rows, still).index_copy(0, moving_rows, clip)


def neighbour_differences(values: Tensor, packed: PackedTokens) -> Tensor:
    """What the eight tokens around each one have more than it has; 0 where there is none, and for voxels.

    values: [N, L] of the tokens of `packed`. Returns [N, 8 L] in the order of NEIGHBOURS.
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
        parts.append(values[rows] - values)
    return torch.cat(parts, dim=1)
