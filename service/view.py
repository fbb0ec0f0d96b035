"""How an object is looked at: what the API asks of a worker that renders Gaussians, and the bounds of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Background = Literal["black", "white"]

SIDES = (16, 1024)
FRAMES = (2, 120)
MOST_PIXELS = 8 * 1024 * 1024
"""Of all frames together: so many take a CPU half a minute, in which it does nothing else."""
TURNTABLE_FRAMES, TURNTABLE_SIDE, PICTURE_SIDE = 24, 256, 512
"""Where nobody says: a frame takes a CPU about half a second at 256 pixels a side, and two at 512."""


@dataclass(frozen=True, kw_only=True)
class View:
    """A camera that looks at the middle of the object, z up; several frames are one turn around it.

    azimuth, elevation: degrees; 0, 0 looks along +y with x to the right. distance: in sides of the cube that the
    object lies in. fov: full angle in degrees, of width and height. side: of the picture, pixels.
    """

    azimuth: float = 30.0
    elevation: float = 20.0
    distance: float = 2.0
    fov: float = 40.0
    side: int = PICTURE_SIDE
    frames: int = 1
    fps: float = 12.0
    background: Background = "white"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> View:
        """Inverse of to_json; unknown keys are a TypeError."""
        return cls(**values)
