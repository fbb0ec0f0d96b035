"""Posed views of boxes, drawn by a small ray caster that shares nothing with what it tests."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from media.cameras import Cameras, read_transforms
from media.multiview import Views

ANGLE = math.radians(40)


@dataclass(frozen=True)
class Box:
    low: tuple[float, float, float]
    high: tuple[float, float, float]
    colour: tuple[int, int, int]


# Three arms of different lengths from one corner: no turn and no mirror maps the object onto itself.
ARMS = (
    Box((-0.35, -0.35, -0.35), (0.45, -0.15, -0.15), (255, 0, 0)),
    Box((-0.35, -0.15, -0.35), (-0.15, 0.35, -0.15), (0, 255, 0)),
    Box((-0.35, -0.35, -0.15), (-0.15, -0.15, 0.2), (0, 0, 255)),
)


def directions(count: int) -> npt.NDArray[np.float64]:
    """Well-spread unit vectors, [count, 3]: a spiral over the sphere."""
    height = 1 - (2 * np.arange(count) + 1) / count
    turn = np.arange(count) * math.pi * (3 - math.sqrt(5))
    ring = np.sqrt(1 - height**2)
    return np.stack([ring * np.cos(turn), ring * np.sin(turn), height], axis=1)


def transforms(eyes: npt.NDArray[np.float64]) -> dict[str, Any]:
    """transforms.json of cameras at these places, [V, 3], that look at the origin with z up."""
    frames = []
    for number, eye in enumerate(eyes):
        back = eye / np.linalg.norm(eye)
        right = np.cross([0.0, 0.0, 1.0], back)
        right /= np.linalg.norm(right)
        pose = np.eye(4)
        pose[:3] = np.stack([right, np.cross(back, right), back, eye], axis=1)
        frames.append({"file_path": f"{number:03}.png", "camera_angle_x": ANGLE, "transform_matrix": pose.tolist()})
    return {"frames": frames}


def cameras(count: int, distance: float = 2.0) -> Cameras:
    return read_transforms(transforms(directions(count) * distance))[1]


def draw(boxes: tuple[Box, ...], count: int = 12, side: int = 128, distance: float = 2.0) -> Views:
    """RGBA pictures and float32 depth of the boxes, sampled at the corners of pixels, where voxelize expects it."""
    eyes = directions(count) * distance
    document = transforms(eyes)
    images, depths = [], []
    steps = (2 * np.arange(side) / side - 1) * math.tan(ANGLE / 2)
    for frame in document["frames"]:
        right, up, back, eye = np.array(frame["transform_matrix"])[:3].T
        rays = steps[None, :, None] * right - steps[:, None, None] * up - back
        depth = np.full((side, side), np.inf)
        pixels = np.zeros((side, side, 4), np.uint8)
        for box in boxes:
            with np.errstate(divide="ignore"):
                ends = np.sort([(box.low - eye) / rays, (box.high - eye) / rays], axis=0)
            near, far = ends[0].max(axis=-1), ends[1].min(axis=-1)
            hit = (near <= far) & (near < depth)
            depth[hit] = near[hit]
            pixels[hit] = (*box.colour, 255)
        images.append(pixels)
        depths.append(np.where(np.isinf(depth), -1, depth).astype(np.float32))
    return Views(images=images, depths=depths, cameras=read_transforms(document)[1])
