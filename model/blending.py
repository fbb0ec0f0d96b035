"""Ellipses in tiles of pixels, blended from front to back, with the gradient: the inner loop of the rasterizer.

Inside a tile the logarithm of an ellipse's alpha is a polynomial of the pixel's place, with six coefficients. The
pixels' monomials are the same in every tile, so one matrix product evaluates all pairs of a tile and an ellipse, and
one more brings all their gradients back. The backward pass computes alphas again instead of keeping them.

m ellipses, P pairs, g tiles at work at once, K ellipses of each of them, S pixels a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.projection import SMALLEST_ALPHA

LARGEST_ALPHA = 0.99
SMALLEST_LIGHT = 1e-4
"""A pixel takes no ellipse that would leave it less than this share of what lies behind."""

_CHUNK = 32
# Values of a temporary: the caches of a core, or enough to fill a GPU.
_BLOCK = {"cpu": 1 << 19, "cuda": 1 << 24}


class Tiles(NamedTuple):
    """The tiles that ellipses meet, those with most of them first."""

    side: int
    place: Tensor
    """Index of the tile, rows of tiles first, [t]."""
    start: Tensor
    """Of the tile's part of pairs, [t]."""
    length: Tensor
    """Of that part, [t], at least 1."""
    pairs: Tensor
    """Ellipses, [P], nearest first within a tile."""


def blend(table: Tensor, tiles: Tiles, height: int, width: int) -> Tensor:
    """RGB over nothing, and alpha: [H, W, 4]. table: [m, 9], shapes and colours of the ellipses."""
    blended: Tensor = _Blend.apply(table, tiles, height, width)  # type: ignore[no-untyped-call]
    return blended


class _Blend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, tiles: Tiles, height: int, width: int) -> Tensor:
        work = _Work(table, tiles, width)
        pixels = table.new_zeros(work.all_tiles(height), 4, work.pixels)
        used = torch.zeros_like(tiles.length)
        for group in work.groups(tiles.length):
            light = table.new_ones(len(group), work.pixels)
            blended = pixels.new_zeros(len(group), 4, work.pixels)
            alive = torch.arange(len(group), device=table.device)
            for first in range(0, int(tiles.length[group[0]]), _CHUNK):
                goes_on = (tiles.length[group[alive]] > first) & (light.amax(dim=1) > 0)
                if not goes_on.all():
                    alive, light = alive[goes_on], light[goes_on]
                if not len(alive):
                    break
                tile = group[alive]
                used[tile] = (tiles.length[tile] - first).clamp(max=_CHUNK) + first
                chosen, coefficients = work.gather(tile, first)
                alpha = work.alphas(coefficients)
                weight, light = _pass_light(alpha, 1 - alpha, light)
                blended.index_add_(0, alive, torch.bmm(work.colours(chosen).transpose(1, 2), weight))
            pixels[tiles.place[group]] = blended
        ctx.save_for_backward(table, used, pixels)
        ctx.tiles, ctx.size = tiles, (height, width)
        return work.join(pixels, height)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        table, used, pixels = ctx.saved_tensors
        tiles, (height, width) = ctx.tiles, ctx.size
        work = _Work(table, tiles, width)
        slope = work.split(gradient, height)
        # What lies behind the ellipse at work, weighted by the gradient: at first everything.
        rest = (slope * pixels).sum(dim=1)
        total = table.new_zeros(len(table) + 1, 9)
        order = torch.sort(used, descending=True, stable=True).indices
        for group in work.groups(used, order):
            here = tiles.place[group]
            light, behind, along = table.new_ones(len(group), work.pixels), rest[here], slope[here]
            for first in range(0, int(used[group[0]]), _CHUNK):
                length = int((used[group] > first).sum())
                group, light, behind, along = group[:length], light[:length], behind[:length], along[:length]
                chosen, coefficients = work.gather(group, first)
                alpha = work.alphas(coefficients)
                through = 1 - alpha
                capped = alpha >= LARGEST_ALPHA if work.capped else None
                before = light
                weight, light = _pass_light(alpha, through.clone(), before, keep_alpha=True)
                value = torch.bmm(work.colours(chosen), along).mul_(weight)
                remaining = behind[:, None] - value.cumsum(dim=1)
                behind = remaining[:, -1] * (light > 0)
                # d/d log(alpha): what it adds, less what it hides.
                value -= alpha.div_(through).mul_(remaining)
                if capped is not None:
                    value.masked_fill_(capped, 0)
                moments = (value.flatten(0, 1) @ work.monomials.T).unflatten(0, chosen.shape)
                colour = torch.bmm(weight, along[:, :3].transpose(1, 2))
                rows = torch.cat([work.chain(coefficients, moments), colour], dim=2)
                total.index_add_(0, chosen.flatten(), rows.flatten(0, 1))
        return total[:-1], None, None, None


class _Local(NamedTuple):
    """A pair's ellipse seen from the middle of its tile."""

    x: Tensor
    y: Tensor
    conic: tuple[Tensor, Tensor, Tensor]
    polynomial: Tensor  # [g, K, 6]


class _Work:
    """What forward and backward share: which ellipses, and their alphas."""

    def __init__(self, table: Tensor, tiles: Tiles, width: int) -> None:
        # The last row stands for "no ellipse", where a tile has less than its chunk.
        none = table.new_zeros(1, table.shape[1])
        none[0, 5] = -1e4
        self.table = torch.cat([table, none])
        self.tiles = tiles
        self.pixels = tiles.side**2
        self.across = -(-width // tiles.side)
        self.width = width
        self.capped = bool((table[:, 5] > torch.tensor(LARGEST_ALPHA).log()).any())
        along = torch.arange(tiles.side, device=table.device, dtype=table.dtype) - (tiles.side - 1) / 2
        y, x = (part.flatten() for part in torch.meshgrid(along, along, indexing="ij"))
        self.monomials = torch.stack([torch.ones_like(x), x, y, -x * x / 2, -x * y, -y * y / 2])  # [6, S]

    def all_tiles(self, height: int) -> int:
        return self.across * -(-height // self.tiles.side)

    def groups(self, count: Tensor, order: Tensor | None = None) -> Sequence[Tensor]:
        """Tiles of about as many ellipses, as many as a block of memory holds."""
        order = torch.arange(len(count), device=count.device) if order is None else order
        block = _BLOCK.get(count.device.type, _BLOCK["cpu"])
        return order.split(max(1, block // (_CHUNK * self.pixels))) if len(order) else ()

    def gather(self, tile: Tensor, first: int) -> tuple[Tensor, _Local]:
        """The ellipses of each tile from the first on, [g, K], and what they look like there."""
        count = self.tiles.length[tile, None]
        place = first + torch.arange(min(_CHUNK, int(count.max()) - first), device=tile.device)
        missing = place >= count
        pair = (self.tiles.start[tile, None] + place).masked_fill_(missing, 0)
        chosen = self.tiles.pairs[pair].masked_fill_(missing, len(self.table) - 1)
        x, y, xx, xy, yy, log_alpha = self.table[:, :6].index_select(0, chosen.flatten()).T.unflatten(1, chosen.shape)
        middle = (self.tiles.side - 1) / 2
        x = x - (self.tiles.place[tile, None] % self.across * self.tiles.side + middle)
        y = y - (self.tiles.place[tile, None] // self.across * self.tiles.side + middle)
        px, py = xx * x + xy * y, xy * x + yy * y
        polynomial = torch.stack([log_alpha - (px * x + py * y) / 2, px, py, xx, xy, yy], dim=2)
        return chosen, _Local(x, y, (xx, xy, yy), polynomial)

    def alphas(self, local: _Local) -> Tensor:
        """[g, K, S], 0 where an ellipse is too faint to count."""
        alpha = (local.polynomial.flatten(0, 1) @ self.monomials).unflatten(0, local.x.shape).exp_()
        if self.capped:
            alpha.clamp_(max=LARGEST_ALPHA)
        return torch.threshold_(alpha, SMALLEST_ALPHA, 0)

    def chain(self, local: _Local, moments: Tensor) -> Tensor:
        """Gradients of shapes, [g, K, 6], from those of the polynomial."""
        x, y, (xx, xy, yy) = local.x, local.y, local.conic
        one, along_x, along_y, d_xx, d_xy, d_yy = moments.unbind(2)
        # The constant is log_alpha - (xx x^2 + 2 xy x y + yy y^2) / 2, the linear terms are its slopes.
        back_x, back_y = along_x - one * x, along_y - one * y
        return torch.stack(
            [
                xx * back_x + xy * back_y,
                xy * back_x + yy * back_y,
                d_xx + x * (along_x - one * x / 2),
                d_xy + y * along_x + x * along_y - one * x * y,
                d_yy + y * (along_y - one * y / 2),
                one,
            ],
            dim=2,
        )

    def colours(self, chosen: Tensor) -> Tensor:
        """[g, K, 4]: RGB and a 1 that adds up to alpha."""
        rgb = self.table[:, 6:].index_select(0, chosen.flatten()).unflatten(0, chosen.shape)
        return torch.cat([rgb, rgb.new_ones(*chosen.shape, 1)], dim=2)

    def join(self, pixels: Tensor, height: int) -> Tensor:
        """[tiles, 4, S] to [H, W, 4]."""
        side = self.tiles.side
        grid = pixels.reshape(-1, self.across, 4, side, side).permute(0, 3, 1, 4, 2)
        return grid.flatten(2, 3).flatten(0, 1)[:height, : self.width].contiguous()

    def split(self, picture: Tensor, height: int) -> Tensor:
        """[H, W, 4] to [tiles, 4, S], 0 beyond the picture."""
        side = self.tiles.side
        whole = picture.new_zeros(-(-height // side) * side, self.across * side, 4)
        whole[:height, : self.width] = picture
        grid = whole.reshape(-1, side, self.across, side, 4).permute(0, 2, 4, 1, 3)
        return grid.reshape(-1, 4, self.pixels)


def _pass_light(alpha: Tensor, through: Tensor, light: Tensor, *, keep_alpha: bool = False) -> tuple[Tensor, Tensor]:
    """Weights [g, K, S] and the light left behind the chunk [g, S], 0 where the pixel takes no more.

    light: before the chunk. Overwrites through and alpha; keep_alpha: alpha is only set to 0 where it does not count.
    """
    through[:, 0] *= light
    after = torch.cumprod(through, dim=1, out=through)
    left = after[:, -1]
    ends = left < SMALLEST_LIGHT
    if (ends & (light > 0)).any():
        alpha.masked_fill_(after < SMALLEST_LIGHT, 0)
        left = left.masked_fill(ends, 0)
    weight = alpha.clone() if keep_alpha else alpha
    weight[:, 0] *= light
    weight[:, 1:] *= after[:, :-1]
    return weight, left
