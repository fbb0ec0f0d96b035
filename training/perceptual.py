"""Perceptual terms on feature maps: LPIPS, Gram matrices, CLIP features. B pictures; every target is a constant.

Source: AToken, arXiv 2509.14476 (3.3 to 3.5; terms, weights, 224 x 224); where it is silent, docs/decisions.md 15.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.vgg import VGG16, WIDTHS, fill, read_tensors

SIDE = 224
GRAM_LAYERS = 4
"""relu1_2, 2_2, 3_3, 4_3: the paper does not say which."""


def resample_224(pictures: Tensor, side: int = SIDE) -> Tensor:
    """Pictures [B, 3, H, W] at side x side, bilinear, antialiased, aspect not kept."""
    if pictures.shape[2:] == (side, side):
        return pictures
    return F.interpolate(pictures, (side, side), mode="bilinear", antialias=True, align_corners=False)


class LPIPS(nn.Module):
    """Learned distance of feature maps: channels of length 1, squared difference, a weight for each channel.

    Keys are those of the published heads (`lin0.model.1.weight`). Source: Zhang et al. 2018, arXiv 1801.03924.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        for index, width in enumerate(widths):
            head = nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False))
            self.add_module(f"lin{index}", nn.ModuleDict({"model": head}))
        self.count = len(widths)

    def heads(self) -> list[Tensor]:
        """Weights of the channels of every map, [C]."""
        return [self.get_parameter(f"lin{index}.model.1.weight").flatten() for index in range(self.count)]

    def of_maps(self, seen: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
        """Distance of each picture, [B], from the maps of VGG16."""
        parts = []
        for weight, a, b in zip(self.heads(), seen, wanted, strict=True):
            squared = (_unit(a) - _unit(b.detach())).square()
            parts.append((squared * weight[:, None, None]).sum(1).mean((1, 2)))
        return torch.stack(parts).sum(0)

    def forward(self, vgg: VGG16, seen: Tensor, wanted: Tensor) -> Tensor:
        """Distance of each picture, [B]. seen, wanted: [B, 3, H, W] in -1..1."""
        with torch.no_grad():
            target = vgg(wanted)
        return self.of_maps(vgg(seen), target)


def load_lpips(path: Path, widths: Sequence[int] = WIDTHS) -> LPIPS:
    """Frozen heads from the published file of the VGG form.

    Raises as load_vgg, and ValueError for negative weights: with those a distance could fall below that of equal maps.
    """
    heads = LPIPS(widths)
    fill(heads, read_tensors(path), path)
    least = min(float(weight.min()) for weight in heads.heads())
    if not least >= 0:
        raise ValueError(f"{path} has a weight of {least:g}; wanted none below 0")
    return heads


def gram_matrix(maps: Tensor) -> Tensor:
    """F F^T / (C H W) of a map [B, C, H, W]: what goes together, wherever it is. Returns [B, C, C].

    Source: Gatys et al. 2015, arXiv 1505.07376.
    """
    flat = maps.flatten(2)
    return flat @ flat.transpose(1, 2) / flat[0].numel()


def gram_loss(seen: Sequence[Tensor], wanted: Sequence[Tensor], layers: int = GRAM_LAYERS) -> Tensor:
    """Squared distance of Gram matrices, mean over entries and pictures, summed over the first `layers` maps.

    The paper (Eq. 5) gives the squared Frobenius norm and a weight of 1e3, but no normalisation. With G / (C H W) and
    the mean over entries the term grows neither with the picture nor with the width of a layer.
    """
    parts = [
        (gram_matrix(a) - gram_matrix(b.detach())).square().mean()
        for a, b in zip(seen[:layers], wanted[:layers], strict=True)
    ]
    return torch.stack(parts).sum()


def clip_perceptual(seen: Tensor, wanted: Tensor) -> Tensor:
    """1 - cosine of pooled features [B, D], mean over pictures.

    Source: AToken, arXiv 2509.14476 (3.3), which names CLIP (Radford et al. 2021, arXiv 2103.00020) and no distance:
    the cosine, by which CLIP's features are compared, is our choice.
    """
    return (1 - F.cosine_similarity(seen, wanted.detach(), dim=-1)).mean()


def _unit(maps: Tensor) -> Tensor:
    # The root of 0 has no gradient: eps inside, where the published code has it outside, differs by 1e-10.
    return maps * (maps.square().sum(1, keepdim=True) + 1e-10).rsqrt()
