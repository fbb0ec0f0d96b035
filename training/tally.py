"""Figures of a model while its items come: every metric of a kind of media, and why one is missing.

Metrics see 8-bit pixels: what the model was given, and what it gave back. B pictures, T frames, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from media.types import UInt8Array
from model import image_metrics
from training.feature_nets import FVD_FEWEST, FVD_FRAMES, Networks, fvd_frames
from training.frechet import FeatureStats, frechet_distance
from training.metrics import psnr, ssim
from training.protocols import Kind
from training.token_stats import TokenStats

BATCH = 8
"""Pictures that a network sees at once."""

METRICS: dict[Kind, tuple[str, ...]] = {
    "image": ("PSNR", "SSIM", "LPIPS", "rFID"),
    "video": ("PSNR", "SSIM", "LPIPS", "rFID", "rFVD"),
    "asset": ("PSNR", "SSIM", "LPIPS"),
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """Figures of one coding, by the name of the metric.

    values: means as the protocol says; parts: of a Frechet distance, that of the means and that of the covariances.
    tokens: of all items; frames: pictures, frames or views that were compared; lengths: fewest and most of them in an
    item. missing: why a metric is not there; warnings: of those that are.
    """

    coding: str
    items: int
    frames: int
    tokens: int
    values: dict[str, float]
    parts: dict[str, tuple[float, float]]
    missing: dict[str, str]
    warnings: dict[str, str]
    lengths: tuple[int, int]
    stats: TokenStats


class Tally:
    """Figures while items come."""

    def __init__(self, networks: Networks, kind: Kind, stats: TokenStats, coding: str) -> None:
        self.networks = networks
        self.kind = kind
        self.stats = stats
        self.coding = coding
        given = {"LPIPS": networks.lpips, "rFID": networks.inception, "rFVD": networks.i3d}
        self.missing = {
            name: networks.missing.get(name, "no network given")
            for name, net in given.items()
            if net is None and name in METRICS[kind]
        }
        self._values: dict[str, list[float]] = {"PSNR": [], "SSIM": [], "LPIPS": []}
        self._lengths: list[int] = []
        self._features = {name: (FeatureStats(), FeatureStats()) for name in ("rFID", "rFVD")}

    def pictures(self, originals: Sequence[UInt8Array], backs: Sequence[UInt8Array]) -> None:
        """Add pictures uint8 [H, W, 3] and what became of them: each an item, or the views of one asset."""
        pairs = list(zip(originals, backs, strict=True))
        for shape in dict.fromkeys(picture.shape for picture in originals):
            alike = [(a, b) for a, b in pairs if a.shape == shape]
            self._values["LPIPS"] += self._perceived(*(np.stack(side) for side in zip(*alike, strict=True)))
        self._values["PSNR"] += [psnr(a, b) for a, b in pairs]
        self._values["SSIM"] += [self._similarity(a, b) for a, b in pairs]
        self._lengths += [len(pairs)] if self.kind == "asset" else [1] * len(pairs)

    def clip(self, name: str, original: UInt8Array, pieces: Iterable[UInt8Array]) -> None:
        """Add a clip uint8 [T, H, W, 3] and what became of it, in pieces of whole frames, in order."""
        i3d, start, squares = self.networks.i3d, 0, 0.0
        found: dict[str, list[float]] = {"SSIM": [], "LPIPS": []}
        seen: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._check_length(name, len(original))
        for piece in pieces:
            part = original[start : start + len(piece)]
            if part.shape != piece.shape:
                raise ValueError(f"{name}: {piece.shape} came back of {part.shape}")
            # Of 8-bit numbers a difference wraps around: in float, a frame at a time since they may be large.
            squares += sum(float(np.square(a.astype(np.float64) - b).sum()) for a, b in zip(part, piece, strict=True))
            found["SSIM"] += [self._similarity(a, b) for a, b in zip(part, piece, strict=True)]
            found["LPIPS"] += self._perceived(part, piece)
            if "rFVD" not in self.missing and start < FVD_FRAMES:
                for frames, kept in zip((part, piece), seen, strict=True):
                    kept.append(fvd_frames(_frames_tensor(frames[: FVD_FRAMES - start])))
            start += len(piece)
        if start != len(original):
            raise ValueError(f"{name}: {start} frames came back of {len(original)}")
        mean = squares / original.size
        self._values["PSNR"].append(math.inf if mean == 0 else 10 * math.log10(255**2 / mean))
        for metric, values in found.items():
            self._values[metric] += [float(np.mean(values))] if values else []
        if i3d is not None and "rFVD" not in self.missing:
            for stats, kept in zip(self._features["rFVD"], seen, strict=True):
                stats.update(i3d.of_clips(torch.cat(kept, 1)[None]))
        self._lengths.append(len(original))

    def result(self) -> Result:
        """What came out."""
        missing = dict(self.missing)
        warnings: dict[str, str] = {}
        values = {name: float(np.mean(found)) for name, found in self._values.items() if found}
        parts: dict[str, tuple[float, float]] = {}
        finite = [value for value in self._values["PSNR"] if math.isfinite(value)]
        if exact := len(self._values["PSNR"]) - len(finite):
            rest = f", {np.mean(finite):.2f} without" if finite else ""
            warnings["PSNR"] = f"{exact} came back exactly: the mean is infinite{rest}"
        for name, sides in self._features.items():
            if name not in METRICS[self.kind] or name in missing:
                continue
            if sides[0].count < 2:
                missing[name] = f"{sides[0].count} item; a Frechet distance needs at least 2"
                continue
            distance = frechet_distance(*sides)
            values[name], parts[name] = distance.total, (distance.mean, distance.covariance)
            if distance.warning:
                warnings[name] = distance.warning
        return Result(
            coding=self.coding,
            items=len(self._lengths),
            frames=sum(self._lengths),
            tokens=self.stats.tokens,
            values=values,
            parts=parts,
            missing=missing,
            warnings=warnings,
            lengths=(min(self._lengths), max(self._lengths)),
            stats=self.stats,
        )

    def _check_length(self, name: str, frames: int) -> None:
        if frames < FVD_FEWEST and "rFVD" not in self.missing:
            self.missing["rFVD"] = f"{name} has {frames} frames, the network needs {FVD_FEWEST}"

    def _similarity(self, a: UInt8Array, b: UInt8Array) -> float:
        device = torch.device(self.networks.device)
        return ssim(a, b) if device.type == "cpu" else ssim_on(device, a, b)

    def _perceived(self, originals: UInt8Array, backs: UInt8Array) -> list[float]:
        """LPIPS of pictures of one size, uint8 [B, H, W, 3]; their features are kept."""
        lpips, inception = self.networks.lpips, self.networks.inception
        found: list[float] = []
        for start in range(0, len(originals), BATCH):
            pair = [_frames_tensor(side[start : start + BATCH]).permute(0, 3, 1, 2) for side in (originals, backs)]
            if lpips is not None:
                floats = [side.to(self.networks.device).float() / 127.5 - 1 for side in pair]
                found += lpips(floats[1], floats[0]).tolist()
            if inception is not None and "rFID" in METRICS[self.kind]:
                for stats, side in zip(self._features["rFID"], pair, strict=True):
                    stats.update(inception.of_pictures(side))
        return found


def ssim_on(device: torch.device, a: UInt8Array, b: UInt8Array) -> float:
    """training.metrics.ssim of two pictures on another device: a core takes four seconds for a frame of full HD."""
    x, y = (_frames_tensor(side).to(device, torch.float64) / 255 for side in (a, b))
    return float(image_metrics.ssim(x, y))


def _frames_tensor(frames: UInt8Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames))
