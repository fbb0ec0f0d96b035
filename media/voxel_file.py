"""Ready-made voxels: coords and feats out of an .npz or a safetensors file."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from media.archive import Archive, open_archive
from media.errors import MediaError
from media.limits import Limits
from media.multiview import GRID
from media.npy_file import load_npy
from media.safetensors_file import SafetensorsError, read
from media.types import Float32Array, Voxels

FEATURES = 768
NAMES = ("coords", "feats")


def is_voxel_archive(names: tuple[str, ...]) -> bool:
    """Whether a zip file's members are those of an .npz with voxels."""
    return "coords.npy" in names


def load_voxel_archive(archive: Archive) -> Voxels:
    """Read the members coords.npy and feats.npy. Raises MediaError."""
    missing = [name for name in NAMES if f"{name}.npy" not in archive.names]
    if missing:
        raise MediaError("corrupt_media", f"the npz file has no array {missing[0]!r}; voxels are coords and feats")
    return _voxels(*(load_npy(archive.read(f"{name}.npy"), f"the array {name!r}") for name in NAMES))


def load_voxels(data: bytes, limits: Limits) -> Voxels:
    """Read an .npz or a safetensors file.

    coords: integers [n, 3], 0..63 (x, y, z), each place once. feats: floats [n, 768] in 0..1, or uint8 (k / 255):
    16 x 16 RGB a voxel, rows from the top. Raises MediaError.
    """
    if data.startswith(b"PK"):
        return load_voxel_archive(open_archive(data, limits))
    try:
        tensors, _ = read(data)
        found = {name: tensors[name].numpy() for name in NAMES if name in tensors}
    except SafetensorsError as error:
        raise MediaError("corrupt_media", f"the safetensors file is damaged: {error}") from None
    if len(found) < len(NAMES):
        tokens = "latents" in tensors or "codes" in tensors
        hint = "it holds tokens: /decode takes them" if tokens else "voxels are coords and feats"
        raise MediaError("corrupt_media", f"the safetensors file has no tensors coords and feats; {hint}")
    return _voxels(found["coords"], found["feats"])


def _voxels(coords: npt.NDArray[Any], feats: npt.NDArray[Any]) -> Voxels:
    if coords.ndim != 2 or coords.shape[1] != 3 or coords.dtype.kind not in "iu":
        raise MediaError("corrupt_media", f"coords are {coords.dtype} {list(coords.shape)}; wanted integers [n, 3]")
    count = len(coords)
    if count == 0:
        raise MediaError("empty_object", "there is no voxel in coords")
    if feats.shape != (count, FEATURES) or (feats.dtype.kind != "f" and feats.dtype != np.uint8):
        raise MediaError(
            "corrupt_media",
            f"feats are {feats.dtype} {list(feats.shape)} for {count} voxels; wanted floats or uint8 "
            f"[{count}, {FEATURES}]",
        )
    low, high = int(coords.min()), int(coords.max())
    if low < 0 or high >= GRID:
        raise MediaError("corrupt_media", f"coords go from {low} to {high}; wanted 0 to {GRID - 1}")
    places = (coords.astype(np.int64) * (GRID**2, GRID, 1)).sum(axis=1)
    order = places.argsort(kind="stable")
    if (np.diff(places[order]) == 0).any():
        raise MediaError("corrupt_media", "a place stands twice in coords")
    values: Float32Array = (feats / np.float32(255 if feats.dtype == np.uint8 else 1)).astype(np.float32)
    if not np.isfinite(values).all():
        raise MediaError("non_finite_input", "feats hold a number that is not finite")
    if values.min() < 0 or values.max() > 1:
        raise MediaError("corrupt_media", f"feats go from {values.min():g} to {values.max():g}; wanted 0 to 1")
    notes = () if (order == np.arange(count)).all() else ("sorted by x, y, z",)
    return Voxels(
        coords=np.ascontiguousarray(coords[order], np.int32),
        feats=np.ascontiguousarray(values[order], np.float32),
        notes=notes,
    )
