"""The loss of Gaussians: rendered views against pictures.

Terms and weights are those of the published Gaussian decoder's training class (facts-training 3), but that its third
term is multi-scale SSIM and ours SSIM of one scale. L1 with 1 - SSIM of renders: Kerbl et al. 2023, arXiv 2308.04079;
LPIPS: Zhang et al. 2018, arXiv 1801.03924. H, W: rows and columns of a view.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.image_metrics import ssim
from model.rasterizer import render
from model.splats import Splats
from training.perceptual import LPIPS
from training.vgg import VGG16


@dataclass(frozen=True, kw_only=True)
class RenderedWeights:
    """As in the published Gaussian decoder's training class, whose regulariser counts 0.

    ssim: of 1 - SSIM, of one scale. The published class has 1 - MS-SSIM there: five scales, each half the one before,
    which views of 160 pixels and less do not have (the window has 11). Its LPIPS is shown values in 0..1, ours those in
    -1..1 that LPIPS was fitted on.
    """

    l1: float = 1.0
    lpips: float = 0.2
    ssim: float = 0.2
    regulariser: float = 0.0


def rendered_loss(
    splats: Splats,
    picture: Tensor,
    world_to_camera: Tensor,
    intrinsics: Tensor,
    *,
    weights: RenderedWeights,
    perceptual: tuple[VGG16, LPIPS] | None = None,
) -> Tensor:
    """L1 + LPIPS + (1 - SSIM) of one view, and mean scale + 1 - mean opacity. A scalar.

    picture: uint8 [H, W, 3], on black. world_to_camera: [4, 4]; intrinsics: [3, 3], normalised. perceptual: networks of
    the LPIPS term, which is left out without them.
    """
    height, width = picture.shape[:2]
    seen = render(splats, world_to_camera, intrinsics, height=height, width=width).colour
    wanted = picture.to(seen.dtype) / 255
    loss = weights.l1 * (seen - wanted).abs().mean() + weights.ssim * (1 - ssim(seen.clamp(0, 1), wanted))
    if perceptual is not None and weights.lpips:
        vgg, heads = perceptual
        pair = (values.permute(2, 0, 1)[None] * 2 - 1 for values in (seen, wanted))
        loss = loss + weights.lpips * heads(vgg, *pair).mean()
    if weights.regulariser:
        size = splats.scales().mean() + 1 - splats.opacities().mean()
        loss = loss + weights.regulariser * size
    assert isinstance(loss, torch.Tensor)
    return loss
