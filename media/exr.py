"""One channel of an OpenEXR file from a stranger: a depth map."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from media.errors import MediaError
from media.limits import Limits
from media.types import Float32Array

MAGIC = b"\x76\x2f\x31\x01"
CHANNELS = ("R", "Z", "Y", "V")
"""In the order of preference; else the first by name. Published depth files repeat the depth in R, G and B."""


def read_exr(data: bytes, what: str, limits: Limits) -> Float32Array:
    """float32 [H, W]. what: its name for errors. Raises MediaError; unsupported_codec without the OpenEXR package."""
    try:
        import OpenEXR
    except ImportError:
        raise MediaError(
            "unsupported_codec", f"{what} is an EXR, which this installation does not read: send .npy"
        ) from None
    if not data.startswith(MAGIC):
        raise MediaError("corrupt_media", f"{what} is called .exr, but is none")
    try:
        header = OpenEXR.File(io.BytesIO(data), header_only=True, num_threads=0).header()
        low, high = (np.asarray(corner, np.int64) for corner in header["dataWindow"])
        width, height = (int(side) for side in high - low + 1)
        if not (0 < width <= limits.view_side and 0 < height <= limits.view_side):
            raise MediaError(
                "image_too_large",
                f"{what} says that it is {width}x{height} pixels; at most {limits.view_side} a side are allowed",
                limit=limits.view_side,
                actual=max(width, height),
            )
        channels: dict[str, Any] = OpenEXR.File(io.BytesIO(data), separate_channels=True, num_threads=0).channels()
        name = next((name for name in CHANNELS if name in channels), min(channels))
        pixels = np.asarray(channels[name].pixels)
        if pixels.shape != (height, width) or pixels.dtype.kind != "f":
            raise MediaError("corrupt_media", f"{what} has no channel of floats in its full size")
        return pixels.astype(np.float32)
    except MediaError:
        raise
    except Exception:
        raise MediaError("corrupt_media", f"{what} is a damaged EXR file") from None
