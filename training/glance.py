"""A quick look at a network in the middle of a run: PSNR by kind over a few samples, and grids to see."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from media.types import Image, Video, Voxels
from model.network import ATokenNet
from model.orbit import orbit
from model.patchify import VOXEL_T
from model.rasterizer import render
from training.batches import Kind, Sample, Source, pack_samples
from training.gaussian_start import colour_start
from training.pictures import side_by_side, window_pictures

COUNT = 4
"""Items of a kind that are looked at."""

VIEWS = 3
"""Sides from which an asset is drawn."""

SIDE = 96


@torch.no_grad()
def glance(net: ATokenNet, source: Source, kinds: Sequence[Kind]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """PSNR in dB of each kind (of items rounded to 8 bits; of voxel patches for assets), and a grid uint8 [H, W, 3]."""
    device = next(net.parameters()).device
    scores: dict[str, float] = {}
    grids: dict[str, Tensor] = {}
    for kind in kinds:
        errors, pairs = [], []
        for sample in source.draw(kind, range(COUNT)):
            given, seen = _round_trip(net, sample, device)
            errors.append(float((_levels(given) - _levels(seen)).square().mean()))
            pairs += _views(sample, given, seen, net)
        scores[f"{kind}/psnr"] = float(np.mean([10 * np.log10(255**2 / max(error, 1e-10)) for error in errors]))
        grids[kind] = side_by_side(pairs)
    return scores, grids


def _levels(values: Tensor) -> Tensor:
    """-1..1 to whole 0..255, as float."""
    return values.add(1).mul(127.5).round().clamp(0, 255)


def _round_trip(net: ATokenNet, sample: Sample, device: torch.device) -> tuple[Tensor, Tensor]:
    """Patches as given and as decoded from the mean (or the codes), of the values that the item has."""
    packed = pack_samples([sample], [0], net.config).packed
    values = net.config.patch_values if sample.item.kind == "video" else net.config.frame_values
    mean, _ = net.posterior(net.encode(packed), packed)
    latents = net.quantize(mean, packed.moving) if net.config.bottleneck == "fsq" else mean
    decoded = net.decode(packed.with_feats(latents), values)
    given = packed.feats
    return torch.nn.functional.pad(given, (0, values - given.shape[1])), decoded.float()


def _views(sample: Sample, given: Tensor, seen: Tensor, net: ATokenNet) -> list[tuple[Tensor, Tensor]]:
    if isinstance(sample.item, Voxels):
        return _turntable(sample.item, given, seen)
    packed = pack_samples([sample], [0], net.config).packed
    pairs = []
    for before, after in zip(
        window_pictures(given, packed, net.config), window_pictures(seen, packed, net.config), strict=True
    ):
        frames = range(0, len(before), max(1, len(before) // 3)) if isinstance(sample.item, Video) else [0]
        pairs += [(before[t], after[t]) for t in frames]
    assert isinstance(sample.item, Image | Video)
    return pairs


def _turntable(item: Voxels, given: Tensor, seen: Tensor) -> list[tuple[Tensor, Tensor]]:
    """An asset from several sides, every voxel as solid Gaussians in its colour: no decoder has a say in it."""
    splatter = colour_start()
    coords = torch.nn.functional.pad(torch.from_numpy(item.coords), (1, 0), value=VOXEL_T)
    pairs = []
    for camera, intrinsics in zip(*orbit(VIEWS, elevation=20, distance=2, angle=45, azimuth=30), strict=True):
        views = []
        for feats in (given, seen):
            splats = splatter.splats(splatter(feats.clamp(-1, 1), coords), coords)
            colour = render(splats, camera, intrinsics, height=SIDE, width=SIDE).colour
            views.append(colour.clamp(0, 1) * 2 - 1)
        pairs.append((views[0], views[1]))
    return pairs
