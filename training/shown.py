"""Clips and meshes with what the image teacher says of their frames and views, for the bundled models.

F features of the teacher. Meshes are drawn and voxelized once and kept in a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from media.archive import open_archive
from media.asset_sniff import asset_format
from media.errors import MediaError
from media.limits import Limits
from media.mesh import load_mesh, load_mesh_archive
from media.mesh_views import SIDE as VIEW_SIDE
from media.mesh_views import VIEWS, normalize, render_views, sphere_cameras
from media.multiview import voxelize
from media.types import UInt8Array, Video, Voxels
from training.config import DataConfig
from training.data import Library, random_clip
from training.packaged import ImageTeacher
from training.views import SIDE

LIMITS = Limits.local()
CLIP_FRAMES, CLIP_SIDE = 8, 96
TAUGHT_FRAMES = (0, 4, 7)
TAUGHT_VIEWS = 8
SKIPPED = "large_bunny"
"""A finer copy of a mesh of the eval split."""


@dataclass(frozen=True)
class ShownClips:
    """frames: uint8 [M, T, H, W, 3]; features: float16 [M, F], mean over frames."""

    frames: Tensor
    features: Tensor

    def item(self, number: int) -> Video:
        """Clip `number`."""
        return Video(frames=self.frames[number].numpy())


@dataclass(frozen=True)
class ShownSets:
    """Voxels of meshes, and features float16 [M, F], mean over views on white; F is 0 without a teacher."""

    voxels: tuple[Voxels, ...]
    features: Tensor


def cached_clips(
    library: Library, teacher: Callable[[], ImageTeacher], count: int, seed: int, cache: Path
) -> ShownClips:
    """`count` clips through the teacher, from the file `cache` if it is there."""
    if not cache.is_file():
        rng, net = np.random.default_rng(seed), teacher()
        frames, features = [], []
        for _ in range(count):
            clip = random_clip(rng, library, DataConfig(), CLIP_FRAMES, CLIP_SIDE)
            frames.append(torch.from_numpy(clip))
            features.append(_mean_of(net, clip[list(TAUGHT_FRAMES)]))
        _save({"frames": torch.stack(frames), "features": torch.stack(features)}, cache)
    return ShownClips(**torch.load(cache, weights_only=True, mmap=True))


def cached_sets(meshes: Path, teacher: Callable[[], ImageTeacher] | None, cache: Path) -> ShownSets:
    """Every mesh of a folder, voxelized as in serving, from the file `cache` if it is there."""
    if not cache.is_file():
        net = None if teacher is None else teacher()
        found: dict[str, list[Tensor]] = {"coords": [], "feats": [], "features": []}
        for path in sorted(meshes.iterdir()):
            if path.name.startswith(SKIPPED):
                continue
            try:
                voxels, pictures = _drawn(path)
            except MediaError:  # a broken mesh teaches nothing; the folder has some for tests
                continue
            found["coords"].append(torch.from_numpy(voxels.coords))
            found["feats"].append(torch.from_numpy(voxels.feats))
            found["features"].append(torch.zeros(0) if net is None else _mean_of(net, pictures))
        _save(found, cache)
    kept = torch.load(cache, weights_only=True, mmap=True)
    pairs = zip(kept["coords"], kept["feats"], strict=True)
    sets = tuple(Voxels(coords=coords.numpy(), feats=feats.numpy()) for coords, feats in pairs)
    return ShownSets(sets, torch.stack(kept["features"]) if sets else torch.zeros(0, 0))


def some_of(rng: np.random.Generator, voxels: Voxels, most: int) -> Voxels:
    """At most so many voxels, from all over: enough to say what an object is."""
    if len(voxels.coords) <= most:
        return voxels
    rows = np.sort(rng.permutation(len(voxels.coords))[:most])
    return Voxels(coords=voxels.coords[rows], feats=voxels.feats[rows])


def _drawn(path: Path) -> tuple[Voxels, UInt8Array]:
    """Voxels of a mesh and pictures of it on white, uint8 [V, S, S, 3]. Raises MediaError."""
    data = path.read_bytes()
    format = asset_format(data) or ""
    mesh = load_mesh_archive(open_archive(data, LIMITS), LIMITS) if format == "zip" else load_mesh(data, format, LIMITS)
    mesh = normalize(mesh)
    voxels = voxelize(render_views(mesh, sphere_cameras(VIEWS), VIEW_SIDE))
    shown = render_views(mesh, sphere_cameras(TAUGHT_VIEWS, turn=0.3), SIDE)
    return voxels, np.stack([_on_white(image) for image in shown.images])


def _on_white(picture: UInt8Array) -> UInt8Array:
    if picture.shape[2] == 3:
        return picture
    share = picture[..., 3:] / np.float32(255)
    white: UInt8Array = (picture[..., :3] * share + 255 * (1 - share)).round().astype(np.uint8)
    return white


def _mean_of(teacher: ImageTeacher, pictures: UInt8Array) -> Tensor:
    """Mean feature of pictures [B, H, W, 3], enlarged to what the teacher wants."""
    shown = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float()
    sized = torch.nn.functional.interpolate(shown, size=(SIDE, SIDE), mode="bilinear", antialias=True)
    return teacher(sized.round().clamp(0, 255).byte().permute(0, 2, 3, 1)).features.mean(0).half()


def _save(values: object, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(values, partial)
    os.replace(partial, path)
