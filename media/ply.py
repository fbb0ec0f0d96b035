"""Gaussians to PLY, in the layout that viewers of 3D Gaussian splats read."""

from __future__ import annotations

from typing import Final

import numpy as np

from media.errors import MediaError
from media.types import Gaussians

COLUMNS: Final = (
    *("x", "y", "z", "nx", "ny", "nz"),
    *("f_dc_0", "f_dc_1", "f_dc_2", "opacity"),
    *("scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
)
"""Properties of a vertex, all float32: the published order. Normals are 0; there is no SH beyond degree 0."""


def encode_ply(gaussians: Gaussians) -> bytes:
    """Binary little-endian PLY, 68 bytes a Gaussian behind a short header; z up, as the record is.

    Raises MediaError for arrays of another shape or with a number that is not finite.
    """
    count = len(gaussians)
    table = np.zeros((count, len(COLUMNS)), "<f4")
    filled = 0
    for name, width, gap in (
        ("positions", 3, 3),
        ("colours", 3, 0),
        ("opacities", 1, 0),
        ("scales", 3, 0),
        ("rotations", 4, 0),
    ):
        array = getattr(gaussians, name)
        wanted = (count,) if width == 1 else (count, width)
        if array.shape != wanted or array.dtype != np.float32:
            raise MediaError(
                "invalid_parameter", f"{name} must be float32 {list(wanted)}, not {array.dtype} {list(array.shape)}"
            )
        rows = array.reshape(count, width)
        bad = ~np.isfinite(rows).all(axis=1)
        if bad.any():
            row = int(np.argmax(bad))
            raise MediaError("non_finite_input", f"{name} row {row} is {rows[row].tolist()}; only finite numbers fit")
        table[:, filled : filled + width] = rows
        filled += width + gap
    properties = "".join(f"property float {name}\n" for name in COLUMNS)
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {count}\n{properties}end_header\n"
    return header.encode("ascii") + table.tobytes()
