"""Cameras that look at the origin, z up: where pictures and turntables of Gaussians are taken from."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def look_at(azimuth: float, elevation: float, distance: float, fov: float) -> tuple[Tensor, Tensor]:
    """world_to_camera [4, 4] (OpenCV axes) and normalised intrinsics [3, 3], float32.

    azimuth: degrees; at 0 the camera stands on the -y side, with x to the right; counterclockwise seen from above.
    elevation: degrees above the plane of x and y, between -90 and 90. fov: full angle in degrees, square picture.
    """
    turn, rise = math.radians(azimuth), math.radians(elevation)
    right = torch.tensor([math.cos(turn), math.sin(turn), 0.0], dtype=torch.float64)
    forward = torch.tensor(
        [-math.sin(turn) * math.cos(rise), math.cos(turn) * math.cos(rise), -math.sin(rise)], dtype=torch.float64
    )
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = torch.stack([right, torch.linalg.cross(forward, right), forward])
    pose[2, 3] = distance
    focal = 0.5 / math.tan(math.radians(fov) / 2)
    intrinsics = torch.tensor([[focal, 0.0, 0.5], [0.0, focal, 0.5], [0.0, 0.0, 1.0]])
    return pose.float(), intrinsics


def orbit(count: int, *, azimuth: float, elevation: float, distance: float, fov: float) -> tuple[Tensor, Tensor]:
    """One turn of `count` cameras, the first at the azimuth: [count, 4, 4], and their intrinsics [3, 3]."""
    found = [look_at(azimuth + 360 * step / count, elevation, distance, fov) for step in range(count)]
    return torch.stack([pose for pose, _ in found]), found[0][1]
