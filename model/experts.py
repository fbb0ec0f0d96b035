"""Several linear codecs instead of one: each patch goes through the one that loses least, and marks say which.

Not part of the published architecture; ModelConfig.experts adds it to the linear path. One set of principal components
must serve edges of every direction; a set for each kind of patch keeps far more of it in as many latents. Source: VQPCA
(Kambhatla and Leen, Dimension reduction by local principal component analysis, Neural Computation 9, 1997).

E experts, D components that they share, L latent channels: first K coefficients, then the marks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import FSQ_LEVELS, ModelConfig
from model.fsq import CENTRES
from model.kernels import fixed_linear

BENT = 1e-5, 1e-2
"""Largest error of a product of two rows: more than that of float32, less than that of rows which are no such thing."""

CHUNK = 256
"""Tokens at a time: every expert is tried on each, which takes E * K values a token; a few MB stay in the cache."""


class Experts(nn.Module):
    """Components to latents and back.

    centre: [E, D]; rows: [E, K, D], orthonormal in each expert; scale: [E, K], what a unit of a latent is worth. A mark
    has `levels` equidistant values of unit variance over all of them. fixed: as in Linear, for decode; encode is always
    so without gradients, since a choice between two experts that are almost equal would magnify a sum's last bit.
    """

    fixed = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.count, self.marks, self.levels = config.experts, config.marks, config.mark_levels
        self.coefficients = config.latent_channels - config.marks
        self.centre = nn.Parameter(torch.zeros(self.count, config.components))
        self.rows = nn.Parameter(torch.zeros(self.count, self.coefficients, config.components))
        self.scale = nn.Parameter(torch.ones(self.count, self.coefficients))

    @property
    def mark_step(self) -> float:
        """Distance of two neighbouring values of a mark."""
        return float((12 / (self.levels**2 - 1)) ** 0.5)

    @torch.no_grad()
    def straighten(self) -> None:
        """Make rows that a file holds in half precision orthonormal again; others stay as they are.

        Rounding costs 0.06 dB of PSNR and 0.003 of SSIM otherwise. By Newton and Schulz, towards the nearest ones.
        """
        rows = self.rows.double()
        error = (rows @ rows.mT - torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)).abs().max()
        if BENT[0] < error < BENT[1]:
            for _ in range(3):
                rows = 1.5 * rows - 0.5 * (rows @ rows.mT) @ rows
            self.rows = nn.Parameter(rows.to(self.rows.dtype), requires_grad=self.rows.requires_grad)

    def encode(self, components: Tensor) -> Tensor:
        """Latents [n, L] of components [n, D], of the expert that gives them back with the smallest square error.

        Before what neighbours add to a patch, which is fitted afterwards.
        """
        return torch.cat([self._encode(part) for part in components.split(CHUNK)])

    def decode(self, latents: Tensor) -> Tensor:
        """Components [n, D] of latents [n, L]; a mark between two values counts as the nearer one."""
        return torch.cat([self._decode(part) for part in latents.split(CHUNK)])

    def choice(self, latents: Tensor) -> Tensor:
        """int [n], which expert the marks of latents [n, L] name."""
        digits = (latents[:, self.coefficients :].float() / self.mark_step + (self.levels - 1) / 2).round()
        digits = digits.clamp(0, self.levels - 1).long()
        return (digits * self.powers(digits)).sum(1)

    def digits_of(self, chosen: Tensor) -> Tensor:
        """int [n, marks], the number of an expert, int [n], in base `levels`, least significant first."""
        return chosen[:, None] // self.powers(chosen) % self.levels

    def powers(self, like: Tensor) -> Tensor:
        """int [marks], what each mark counts."""
        return self.levels ** torch.arange(self.marks, device=like.device)

    def marks_of(self, chosen: Tensor) -> Tensor:
        """float32 [n, marks], the latents that name expert chosen, int [n]."""
        return (self.digits_of(chosen).float() - (self.levels - 1) / 2) * self.mark_step

    def given_back(self, projected: Tensor) -> Tensor:
        """What the decoder has of a patch's projections on every expert's rows. projected: [n, E, K], in pixels."""
        return projected

    def project(self, components: Tensor) -> Tensor:
        """Coefficients with every expert, in pixels: [n, E, K] of components [n, D]."""
        shift = (self.rows @ self.centre[:, :, None]).flatten()
        flat = steady_linear(components, self.rows.flatten(0, 1), -shift)
        return flat.unflatten(1, (self.count, self.coefficients))

    def losses(self, components: Tensor, projected: Tensor, given_back: Tensor) -> Tensor:
        """Square error of every patch with every expert, less what it has with none: [n, E].

        That is |c - centre|^2 - |c|^2 less what each coefficient that is given back saves. components: [n, D];
        projected, given_back: [n, E, K].
        """
        same = given_back is projected
        saved = (projected.square() if same else given_back * (2 * projected - given_back)).flatten(0, 1)
        kept = steady_linear(saved, saved.new_ones(1, self.coefficients)).view(-1, self.count)
        return steady_linear(components, -2 * self.centre, self.centre.square().sum(1)) - kept

    def _encode(self, components: Tensor) -> Tensor:
        projected = self.project(components)
        with torch.no_grad():
            given = projected.detach()
            chosen = self.losses(components.detach(), given, self.given_back(given)).argmin(1)
        rows = torch.arange(len(chosen), device=chosen.device)
        return torch.cat([projected[rows, chosen] / self.scale[chosen], self.marks_of(chosen).to(projected)], dim=1)

    def _decode(self, latents: Tensor) -> Tensor:
        return self._components(latents[:, : self.coefficients], self.choice(latents))

    def _components(self, coefficients: Tensor, chosen: Tensor) -> Tensor:
        """[n, D] of coefficients [n, K] of the experts chosen, int [n]."""
        rows = torch.arange(len(chosen), device=chosen.device)
        # Every other expert's coefficients are 0: one product in the place of a loop over experts.
        spread = coefficients.new_zeros(len(coefficients), self.count, self.coefficients)
        spread = spread.index_put((rows, chosen), coefficients * self.scale[chosen]).flatten(1)
        return self._linear(spread, self.rows.flatten(0, 1).T) + self.centre[chosen]

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return (fixed_linear if self.fixed else F.linear)(x, weight, bias)


class DigitExperts(Experts):
    """The same for codes: coefficients in base 4, one digit a channel, and the marks in base 4 as well.

    A strong coefficient gets many digits, a weak one none: the bits of a token go where the variance is. Cells are
    centred on whole steps, so that a coefficient near 0 comes back as 0 and smooth areas stay smooth; with an even
    number of cells, one more lies below 0 than above.

    step: [E, K] width of a cell. component, power: int [E, K], the coefficient that channel c is a digit of, and which
    digit, 0 the least significant.
    """

    step: Tensor
    component: Tensor
    power: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        shape = (self.count, self.coefficients)
        self.register_buffer("step", torch.ones(shape))
        self.register_buffer("component", torch.arange(shape[1], dtype=torch.int32).repeat(shape[0], 1))
        self.register_buffer("power", torch.zeros(shape, dtype=torch.int32))

    def cells(self) -> Tensor:
        """float32 [E, K], in how many cells each coefficient may lie."""
        ones = torch.ones_like(self.step, dtype=torch.float32)
        return FSQ_LEVELS ** torch.zeros_like(ones).scatter_add(1, self.component.long(), ones)

    def given_back(self, projected: Tensor) -> Tensor:
        """As in Experts."""
        cells = self.cells().to(projected.dtype)
        unit = (self.step * self.scale).to(projected.dtype)
        return (_cell(projected / unit, cells) - (cells / 2).floor()) * unit

    def levels_of(self, latents: Tensor) -> Tensor:
        """z in the middle of FSQ levels, float32 [n, L], of coefficients and marks, [n, L]. No gradient passes."""
        chosen = self.choice(latents)
        coefficients = latents[:, : self.coefficients].float()
        index = _cell(coefficients / self.step[chosen].float(), self.cells()[chosen]).long()
        component, power = self.component[chosen].long(), self.power[chosen].long()
        digits = index.gather(1, component) // FSQ_LEVELS**power % FSQ_LEVELS
        return coefficients.new_tensor(CENTRES)[torch.cat([digits, self.digits_of(chosen)], dim=1)]

    def _decode(self, latents: Tensor) -> Tensor:
        """latents: FSQ values."""
        digits = ((latents + 1) * (FSQ_LEVELS // 2)).round().clamp(0, FSQ_LEVELS - 1).long()
        marks = digits[:, self.coefficients :]
        chosen = (marks * self.powers(marks)).sum(1)
        component, power = self.component[chosen].long(), self.power[chosen].long()
        places = digits[:, : self.coefficients] * FSQ_LEVELS**power
        index = torch.zeros_like(places).scatter_add(1, component, places)
        step = self.step[chosen].to(latents.dtype)
        return self._components((index - (self.cells()[chosen] / 2).floor()).to(latents.dtype) * step, chosen)


def steady_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias; where no gradient is wanted, a row's bits do not depend on how many others there are."""
    return F.linear(x, weight, bias) if torch.is_grad_enabled() else fixed_linear(x, weight, bias)


def _cell(coefficients: Tensor, cells: Tensor) -> Tensor:
    """Number of the cell that a coefficient lies in, in units of cells. cells: how many there are."""
    index = torch.floor(coefficients + (cells + 1) / 2)
    return index.clamp(min=torch.zeros_like(cells)).minimum(cells - 1)
