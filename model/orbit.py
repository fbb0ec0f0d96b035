"""Cameras around an object at the origin, z up. Axes of the camera are those of OpenCV: x right, y down, z forward."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.errors import RangeError


def look_at(azimuth: float, elevation: float, distance: float, angle: float) -> tuple[Tensor, Tensor]:
    """world_to_camera [4, 4] and intrinsics [3, 3] of a square picture, float32, on the CPU. All angles in degrees.

    Azimuth 0 stands on the side of negative y and looks along +y: x is right, z is up. Positive azimuth carries the
    camera counterclockwise seen from above, so 90 stands on +x. Positive elevation lifts it, up to 90 (straight down,
    where up in the picture is where azimuth looked). angle: the full view, 0 to 180. Raises RangeError.
    """
    if not all(map(math.isfinite, (azimuth, elevation, distance, angle))):
        raise RangeError(
            f"azimuth {azimuth}, elevation {elevation}, distance {distance}, angle {angle}; must be finite"
        )
    if not (-90 <= elevation <= 90 and distance > 0 and 0 < angle < 180):
        raise RangeError(
            f"elevation {elevation}, distance {distance}, angle {angle}; wanted -90 to 90 degrees, above 0, and "
            "0 to 180 degrees"
        )
    turn, lift = math.radians(azimuth), math.radians(elevation)
    right = [math.cos(turn), math.sin(turn), 0.0]
    forward = [-math.sin(turn) * math.cos(lift), math.cos(turn) * math.cos(lift), -math.sin(lift)]
    down = [math.sin(turn) * math.sin(lift), -math.cos(turn) * math.sin(lift), -math.cos(lift)]
    # The origin lies straight ahead, at the distance.
    pose = [[*right, 0.0], [*down, 0.0], [*forward, distance], [0.0, 0.0, 0.0, 1.0]]
    focal = 0.5 / math.tan(math.radians(angle) / 2)
    return torch.tensor(pose), torch.tensor([[focal, 0.0, 0.5], [0.0, focal, 0.5], [0.0, 0.0, 1.0]])


def orbit(
    count: int, *, elevation: float, distance: float, angle: float, azimuth: float = 0.0
) -> tuple[Tensor, Tensor]:
    """world_to_camera [V, 4, 4] and intrinsics [V, 3, 3] of V cameras in equal steps, from the azimuth on."""
    if count < 1:
        raise RangeError(f"an orbit of {count} cameras; wanted 1 or more")
    cameras = [look_at(azimuth + 360 * number / count, elevation, distance, angle) for number in range(count)]
    return torch.stack([pose for pose, _ in cameras]), torch.stack([lens for _, lens in cameras])
