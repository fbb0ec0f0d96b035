"""Decoded voxels to what was asked of them: Gaussians, a picture or a turn of them, or how near they come to views."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from media import wire
from media.types import PosedPictures, UInt8Array, Voxels
from model.gsplat_cuda import render
from model.image_metrics import psnr, ssim
from model.orbit import look_at, orbit
from model.splat_decoder import SplatDecoder
from model.splats import Splats
from service.view import View
from service.worker.payloads import Output, splatted


class LateError(Exception):
    """Nobody waits any longer."""


class Splatter:
    """Holds the Gaussian decoder of this worker. Synchronous: the model's thread calls it."""

    def __init__(self, decoder: SplatDecoder) -> None:
        self._decoder = decoder

    def run(
        self, voxels: Voxels, view: Mapping[str, Any] | None, pictures: PosedPictures | None, deadline: float
    ) -> Output:
        """Return the Gaussians of one voxel set, or with a view (View.to_json; empty: none) pixels of them.

        pictures: the answer says how near the Gaussians, seen from there, come to them. deadline: in Unix time, looked
        at before each picture. Raises ModelError, LateError.
        """
        (splats,) = self._decoder.decode([voxels])
        meta: dict[str, wire.JSON] = {"decoder": self._decoder.name, "note": self._decoder.note}
        if view:
            asked = View.from_json(view)
            return Output(
                arrays={"pixels": draw(splats, asked, deadline)}, meta={"kind": "voxels", "fps": asked.fps, **meta}
            )
        if pictures is not None:
            meta |= compare(splats, pictures, deadline)
        return splatted(splats.to_record(), meta)


@torch.inference_mode()
def draw(splats: Splats, view: View, deadline: float = math.inf) -> UInt8Array:
    """Render one picture, or one turn: uint8 [T, side, side, 3]. Raises LateError."""
    if view.frames == 1:
        camera, lens = look_at(view.azimuth, view.elevation, view.distance, view.fov)
        cameras = camera[None]
    else:
        cameras, lenses = orbit(
            view.frames, elevation=view.elevation, distance=view.distance, angle=view.fov, azimuth=view.azimuth
        )
        lens = lenses[0]
    background = (1.0, 1.0, 1.0) if view.background == "white" else (0.0, 0.0, 0.0)
    look = _Look(splats, lens, view.side, background, deadline)
    return np.stack([_pixels(look(camera)) for camera in cameras])


@torch.inference_mode()
def compare(splats: Splats, pictures: PosedPictures, deadline: float = math.inf) -> dict[str, wire.JSON]:
    """Mean PSNR in dB and SSIM over the views, on black, rendered values cut to 0..1. Raises LateError."""
    side = pictures.pictures.shape[1]
    scores: list[tuple[float, float]] = []
    for picture, camera, intrinsics in zip(
        pictures.pictures, pictures.world_to_camera, pictures.intrinsics, strict=True
    ):
        look = _Look(splats, torch.tensor(intrinsics), side, (0.0, 0.0, 0.0), deadline)
        seen = look(torch.tensor(camera)).cpu()
        wanted = torch.tensor(picture).float() / 255
        scores.append((float(psnr(seen, wanted)), float(ssim(seen, wanted))))
    mean = np.mean(scores, axis=0)
    return {
        "psnr_db": round(float(mean[0]), 3),
        "ssim": round(float(mean[1]), 4),
        "views": len(scores),
        "held_out": pictures.held_out,
    }


class _Look(nn.Module):
    """One picture. A module, because the worker's watchdog takes the start of one as a sign of life."""

    def __init__(
        self,
        splats: Splats,
        intrinsics: Tensor,
        side: int,
        background: tuple[float, float, float],
        deadline: float,
    ) -> None:
        super().__init__()
        self._splats, self._intrinsics, self._side = splats, intrinsics, side
        self._background, self._deadline = background, deadline

    def forward(self, camera: Tensor) -> Tensor:
        """RGB in 0..1, [side, side, 3]."""
        if time.time() > self._deadline:
            raise LateError("the request's time was over before its pictures were drawn")
        device, side = self._splats.xyz01.device, self._side
        seen = render(
            self._splats,
            camera.to(device),
            self._intrinsics.to(device),
            height=side,
            width=side,
            background=self._background,
        )
        return seen.colour.clamp(0, 1)


def _pixels(colour: Tensor) -> UInt8Array:
    pixels: UInt8Array = (colour * 255).round().to(torch.uint8).cpu().numpy()
    return pixels
