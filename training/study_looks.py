"""What a study measures of a network at each look: PSNR by modality and a Frechet distance, on samples held aside.

B pictures, N tokens, D features.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.network import ATokenNet
from training.batches import Kind, Micro, Sample, Source, micro_batches, moved
from training.chain import kinds_of
from training.feature_nets import INCEPTION, load_feature_net
from training.frechet import FeatureStats, frechet_distance
from training.packaged import PACKAGES, EfficientNetLite1
from training.perceptual import resample_224
from training.pictures import images_of
from training.stages import Stage
from training.teachers import Teachers

NAMES: dict[Kind, str] = {"image_rec": "images", "video_rec": "clips", "asset_rec": "assets"}
MOST_HEAVY = 64
"""Clips, and assets, of a look: a clip of 32 frames of 512 pixels is 25 MB."""

VGG_SIDE = 64
LITE_SIDE = 128
LITE_BATCH = 32


@dataclass(frozen=True)
class Features:
    """What a Frechet distance looks through. name: of the figure; words: for the report.

    of: pictures [1, 3, H, W] in -1..1, of any sizes, to [B, D].
    """

    name: str
    words: str
    of: Callable[[Sequence[Tensor]], Tensor]


def features_of(inception: Path | None, teachers: Teachers, random: bool, device: torch.device) -> Features:
    """Inception by path; else EfficientNet-Lite1 if its packages are installed; else the teachers' VGG.

    Raises FileNotFoundError and ValueError as load_feature_net.
    """
    if inception is not None:
        net = load_feature_net(inception, INCEPTION, device)

        def through_inception(pictures: Sequence[Tensor]) -> Tensor:
            rows: dict[int, Tensor] = {}
            for shape in dict.fromkeys(picture.shape for picture in pictures):
                where = [index for index, picture in enumerate(pictures) if picture.shape == shape]
                found = net.of_pictures(_levels(torch.cat([pictures[index] for index in where])))
                rows |= dict(zip(where, found, strict=True))
            return torch.stack([rows[index] for index in range(len(pictures))])

        return Features("rfid", str(net), through_inception)
    if all(importlib.util.find_spec(package) for package in PACKAGES):
        lite = EfficientNetLite1()

        def through_lite(pictures: Sequence[Tensor]) -> Tensor:
            squares = _levels(torch.cat([resample_224(picture.cpu(), LITE_SIDE) for picture in pictures]))
            parts = squares.permute(0, 2, 3, 1).split(LITE_BATCH)
            return torch.cat([lite(part).features for part in parts])

        return Features("fd", f"EfficientNet-Lite1 of ImageNet, at {LITE_SIDE} pixels: no FID", through_lite)

    def through_vgg(pictures: Sequence[Tensor]) -> Tensor:
        squares = torch.cat([resample_224(picture, VGG_SIDE) for picture in pictures])
        return torch.cat([maps.mean((2, 3)) for maps in teachers.vgg(squares.clamp(-1, 1))[:3]], dim=1)

    knows = "a random VGG, which sees colours and textures" if random else "VGG16 of ImageNet, three early maps"
    return Features("fd", f"{knows}, at {VGG_SIDE} pixels: no FID", through_vgg)


def wanted_of(images: int) -> dict[Kind, int]:
    """Samples of a look of so many images: a quarter as many clips and assets, MOST_HEAVY at most."""
    heavy = max(1, min(images // 4, MOST_HEAVY))
    return {"image_rec": images, "video_rec": heavy, "asset_rec": heavy}


class Looks:
    """Figures of a network on the samples of a source, the same at each look.

    counts: of each kind. tokens: of a pass. note: what is to be known of the Frechet distance, once it was measured.
    """

    def __init__(
        self, source: Source, features: Features, *, counts: Mapping[Kind, int], tokens: int, device: torch.device
    ) -> None:
        self.features = features
        self.counts = counts
        self.note = ""
        self._source = source
        self._tokens = tokens
        self._device = device
        self._given: FeatureStats | None = None

    def samples(self, kind: Kind) -> list[Sample]:
        """Those of one kind."""
        return self._source.draw(kind, range(self.counts[kind]))

    @torch.no_grad()
    def __call__(self, net: ATokenNet, stage: Stage) -> dict[str, float]:
        """PSNR in dB of items rounded to 8 bits (of voxel patches for assets), mean over items; the distance."""
        before = next(net.parameters()).device
        net.to(self._device)
        figures = {}
        for kind in kinds_of(stage):
            ratios, stats = [], FeatureStats()
            for micro in self._micros(kind, net):
                given, seen = _round_trip(net, micro, self._device)
                errors = (_rounded(given) - _rounded(seen)).square().mean(1)
                for start, stop in zip(micro.items, micro.items[1:], strict=False):
                    ratios.append(10 * float(torch.log10(255**2 / errors[start:stop].mean().clamp(min=1e-6))))
                if kind == "image_rec":
                    stats.update(self._features(seen, micro, net))
            figures[f"{NAMES[kind]}/psnr"] = sum(ratios) / len(ratios)
            if kind == "image_rec" and self.counts[kind] > 1:
                found = frechet_distance(self._originals(net), stats)
                self.note = found.warning
                figures[f"images/{self.features.name}"] = found.total
        net.to(before)
        return figures

    def _micros(self, kind: Kind, net: ATokenNet) -> list[Micro]:
        samples = self.samples(kind)
        return list(micro_batches(samples, range(len(samples)), net.config, self._tokens))

    def _features(self, patches: Tensor, micro: Micro, net: ATokenNet) -> Tensor:
        return self.features.of(images_of(patches, moved(micro.packed, self._device), net.config))

    def _originals(self, net: ATokenNet) -> FeatureStats:
        if self._given is None:
            stats = FeatureStats()
            for micro in self._micros("image_rec", net):
                stats.update(self._features(micro.packed.feats.to(self._device), micro, net))
            self._given = stats
        return self._given


def _round_trip(net: ATokenNet, micro: Micro, device: torch.device) -> tuple[Tensor, Tensor]:
    """Patches [N, values] as given, and as decoded from the mean (or the codes)."""
    packed = moved(micro.packed, device)
    moving = micro.samples[0].item.kind == "video"
    values = net.config.patch_values if moving else net.config.frame_values
    mean, _ = net.posterior(net.encode(packed), packed)
    latents = net.quantize(mean, packed.moving) if net.config.bottleneck == "fsq" else mean
    decoded = net.decode(packed.with_feats(latents), values).float()
    given = packed.feats
    return torch.nn.functional.pad(given, (0, values - given.shape[1])), decoded


def _rounded(values: Tensor) -> Tensor:
    """-1..1 to whole 0..255, as float."""
    return values.add(1).mul(127.5).round().clamp(0, 255)


def _levels(pictures: Tensor) -> Tensor:
    return _rounded(pictures).to(torch.uint8)
