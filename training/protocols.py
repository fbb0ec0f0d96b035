"""How things are measured: one preset a published table. What is known of it and what is our choice are kept apart.

Figures of one model move by 6 dB with size, crop and length of a clip, so that no number is printed without its line.
Source: facts-training 7 and 8; paper tables 4, 6 and 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import PIL.Image

from media.types import UInt8Array
from training.data import centre_crop

Kind = Literal["image", "video", "asset"]

FILTERS = {
    "bilinear": PIL.Image.Resampling.BILINEAR,
    "bicubic": PIL.Image.Resampling.BICUBIC,
    "lanczos": PIL.Image.Resampling.LANCZOS,
}
"""All of Pillow: on 8-bit pixels, with antialias."""

SSIM = "SSIM with a Gaussian window of 11 x 11"
LPIPS = "LPIPS of VGG at the size of the pictures"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is done to a file before the model sees it, and how many there should be.

    kind: None is whatever the folder holds. table: of the paper. items: of the whole set. short_side: sides are scaled
    so that the shorter has so many pixels, None: they stay; enlarge: also those that are smaller. crop: side of the
    square cut from the middle. frames: most of a clip, from its start. views, side: held-out pictures of an asset.
    known, ours: what the paper says; what it does not say, and is done here.
    """

    name: str
    kind: Kind | None
    table: str = ""
    items: int | None = None
    short_side: int | None = None
    enlarge: bool = False
    filter: str = "bilinear"
    crop: int | None = None
    frames: int | None = None
    views: int = 0
    side: int = 0
    known: tuple[str, ...] = ()
    ours: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what fit could not do."""
        if self.filter not in FILTERS:
            raise ValueError(f"filter {self.filter!r}; there are {', '.join(FILTERS)}")
        for name in ("short_side", "crop"):
            side = getattr(self, name)
            if side is not None and side < 16:
                raise ValueError(f"{name} {side}; wanted 16 pixels or more")

    def fit(self, frames: UInt8Array) -> UInt8Array:
        """Frames uint8 [T, H, W, 3] at the size that the model and every metric see."""
        height, width = frames.shape[1:3]
        shorter = min(height, width)
        if self.short_side is not None and (shorter > self.short_side or (self.enlarge and shorter < self.short_side)):
            scale = self.short_side / shorter
            frames = resized(frames, round(height * scale), round(width * scale), self.filter)
        return np.ascontiguousarray(frames if self.crop is None else centre_crop(frames, self.crop))

    def line(self, kind: Kind) -> str:
        """What has to stand beside every number of it; kind: of the items."""
        parts = []
        if kind != "asset":
            size = (
                "as it is"
                if self.short_side is None
                else f"{'' if self.enlarge else 'at most '}{self.short_side} px (Pillow {self.filter}, antialias)"
            )
            parts.append(f"short side {size}")
            parts.append("no crop" if self.crop is None else f"centre crop {self.crop} px, whole patches of 16")
        if kind == "video":
            parts.append("whole clips" if self.frames is None else f"first {self.frames} frames")
            parts.append("one MSE a clip, SSIM and LPIPS means over its frames, then means over clips")
        elif kind == "image":
            parts.append("means over pictures")
        else:
            parts.append(f"{self.views} held-out views of {self.side} px on black, means over views")
        parts.append("PSNR from 8-bit pixels in float against what the model saw")
        parts.append(SSIM)
        return f"{self.name}: " + "; ".join(parts)

    def sources(self) -> str:
        """What is known of the published table and what is our choice."""
        known = f"known of the paper's {self.table}: {'; '.join(self.known)}. " if self.table else ""
        return f"{known}our choice: {'; '.join(self.ours)}."


def resized(frames: UInt8Array, height: int, width: int, filter: str) -> UInt8Array:
    """Frames uint8 [T, H, W, 3] at another size. filter: of FILTERS."""
    size, method = (width, height), FILTERS[filter]
    return np.stack([np.asarray(PIL.Image.fromarray(frame).resize(size, method)) for frame in frames])


_FVD = "rFVD as TokenBench's authors: first 300 frames, short side 224 bilinear, centre crop, I3D"
_SQUARE = "resize and centre crop to 256 x 256, one script for all models"

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="imagenet-256",
            kind="image",
            table="table 4, ImageNet",
            items=50_000,
            short_side=256,
            enlarge=True,
            crop=256,
            known=(_SQUARE,),
            ours=("all 50,000 of the validation set", "filter", SSIM, LPIPS),
        ),
        Protocol(
            name="coco-256",
            kind="image",
            table="table 4, COCO",
            items=5_000,
            short_side=256,
            enlarge=True,
            crop=256,
            known=(_SQUARE,),
            ours=("all 5,000 of val2017", "filter", SSIM, LPIPS),
        ),
        Protocol(
            name="davis",
            kind="video",
            table="table 6, DAVIS",
            items=50,
            short_side=1080,
            known=("50 clips", "1080p"),
            ours=("whole clips", "no crop", "no context across windows of 16 frames", SSIM, LPIPS, _FVD),
        ),
        Protocol(
            name="tokenbench",
            kind="video",
            table="table 6, TokenBench",
            items=471,
            short_side=720,
            frames=300,
            known=("471 clips", "720p"),
            ours=("first 300 frames", "no crop", "no context across windows of 16 frames", SSIM, LPIPS, _FVD),
        ),
        Protocol(
            name="toys4k",
            kind="asset",
            table="table 8, Toys4k",
            views=6,
            side=256,
            known=("means over rendered views",),
            ours=("which objects", "6 views of 256 px on black from cameras that made no voxel", SSIM, LPIPS),
        ),
        Protocol(
            name="plain",
            kind=None,
            crop=256,
            frames=16,
            views=6,
            side=256,
            ours=("everything: files as they are, no published table is measured so",),
        ),
    )
}
"""Presets by name."""
