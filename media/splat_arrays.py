"""What the files of Gaussian splats have in common: checked arrays, and bytes for opacity and unit quaternions."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from media.errors import MediaError
from media.types import Float32Array, Gaussians, UInt8Array

Float64Array = npt.NDArray[np.float64]

WIDTHS: Final = {"positions": 3, "colours": 3, "opacities": 1, "scales": 3, "rotations": 4}
"""Numbers of a Gaussian in each array of the record."""

SH0: Final = 0.28209479177387814


def check_gaussians(gaussians: Gaussians) -> None:
    """Raise MediaError, naming array and row, for another shape or dtype or a number that is not finite."""
    count = len(gaussians)
    for name, width in WIDTHS.items():
        array: npt.NDArray[Any] = getattr(gaussians, name)
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


def unit_rotations(rotations: Float32Array) -> Float64Array:
    """Quaternions of length 1, float64 [M, 4]. Raises MediaError for one of length 0."""
    wide = rotations.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    if not lengths.all():
        raise MediaError(
            "invalid_parameter", f"rotations row {int(np.argmin(lengths))} has length 0; a quaternion needs a direction"
        )
    unit: Float64Array = wide / lengths
    return unit


def to_bytes(values: npt.NDArray[np.floating]) -> UInt8Array:
    """The nearest of 0..255; what lies outside becomes the end that it is next to."""
    nearest: UInt8Array = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return nearest


def opacity_bytes(opacities: Float32Array) -> UInt8Array:
    """Opacity 0..1 of what is before the sigmoid, in steps of 1/255."""
    return to_bytes(255 * np.exp(-np.logaddexp(0, -opacities.astype(np.float64))))


def opacity_logits(stored: UInt8Array) -> Float32Array:
    """Inverse of opacity_bytes. 0 and 255 stand for half a step within: their logarithm would not be finite."""
    share = np.clip(stored.astype(np.float64), 0.5, 254.5) / 255
    return np.log(share / (1 - share)).astype(np.float32)
