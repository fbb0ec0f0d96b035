"""The .splat file of web viewers: 32 bytes a Gaussian, no header, the most visible first.

position 3 x float32, standard deviations 3 x float32, RGB and opacity 4 x uint8, quaternion (w, x, y, z) 4 x uint8 as
128 q + 128. Axes are those of the PLY.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from media.errors import MediaError
from media.splat_arrays import SH0, check_gaussians, opacity_bytes, opacity_logits, to_bytes, unit_rotations
from media.types import Gaussians

ROW: Final = np.dtype([("position", "<f4", 3), ("scale", "<f4", 3), ("colour", "u1", 4), ("rotation", "u1", 4)])

# What float32 holds without loss of digits, as logarithms.
_LEAST, _MOST = -87.0, 88.0


def encode_splat(gaussians: Gaussians) -> bytes:
    """32 bytes a Gaussian, by falling volume times opacity: viewers draw what has arrived.

    Colours outside 0..1 and scales beyond float32 (logarithms outside -87..88) are clipped.
    Raises MediaError for arrays of another shape, a number that is not finite, or a quaternion of length 0.
    """
    check_gaussians(gaussians)
    rotations = unit_rotations(gaussians.rotations)
    log_scales = gaussians.scales.astype(np.float64)
    # Logarithm of volume times sigmoid(opacity): neither overflows there.
    weight = log_scales.sum(axis=1) - np.logaddexp(0, -gaussians.opacities.astype(np.float64))
    table = np.empty(len(gaussians), ROW)
    table["position"] = gaussians.positions
    table["scale"] = np.exp(np.clip(log_scales, _LEAST, _MOST))
    table["colour"][:, :3] = to_bytes(255 * (0.5 + SH0 * gaussians.colours.astype(np.float64)))
    table["colour"][:, 3] = opacity_bytes(gaussians.opacities)
    table["rotation"] = to_bytes(128 * rotations + 128)
    return table[np.argsort(-weight, kind="stable")].tobytes()


def decode_splat(data: bytes) -> Gaussians:
    """Read a .splat file, in its order.

    Raises MediaError for a length that is no multiple of 32, a number that is not finite, a scale below 0, or a
    quaternion of length 0: the format has no other mark by which another file could be told.
    """
    if len(data) % ROW.itemsize:
        raise MediaError("corrupt_media", f"a .splat file has 32 bytes a Gaussian; {len(data)} is no multiple of 32")
    table = np.frombuffer(data, ROW)
    if not (np.isfinite(table["position"]).all() and np.isfinite(table["scale"]).all()):
        raise MediaError("non_finite_input", "the .splat file has a position or scale that is not finite")
    if (table["scale"] < 0).any():
        raise MediaError("corrupt_media", "the .splat file has a scale below 0")
    rotations = (table["rotation"].astype(np.float32) - 128) / 128
    if not rotations.any(axis=1).all():
        raise MediaError("corrupt_media", "the .splat file has a quaternion of length 0")
    return Gaussians(
        positions=table["position"].astype(np.float32),
        colours=((table["colour"][:, :3] / 255 - 0.5) / SH0).astype(np.float32),
        opacities=opacity_logits(table["colour"][:, 3]),
        scales=np.log(np.maximum(table["scale"], np.exp(_LEAST), dtype=np.float64)).astype(np.float32),
        rotations=rotations.astype(np.float32, copy=False),
    )
