"""A 3D file to voxels: ready-made ones, posed renders, or a mesh that is drawn from all sides first."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

import numpy as np

from media.archive import open_archive
from media.errors import MediaError
from media.limits import Limits
from media.mesh import MESH_FORMATS, Up, load_mesh, load_mesh_archive
from media.mesh_views import SIDE, VIEWS, normalize, on_black, render_views, sphere_cameras
from media.multiview import Views, voxelize
from media.renders import is_renders, load_renders
from media.sniff import check_voxels
from media.types import Asset, Mesh, PosedPictures, Voxels
from media.voxel_file import is_voxel_archive, load_voxel_archive, load_voxels

COMPARED: Final = 6
"""Views of a mesh that its reconstruction is compared with; its voxels are made without them."""
COMPARED_SIDE: Final = 256
SMALLEST: Final = 16
"""Side of a picture, in pixels, from which on it can be compared."""


def decode_asset(
    data: bytes, format: str, limits: Limits, *, up: Up | None = None, with_pictures: bool = False
) -> Asset:
    """Turn a 3D file into voxels.

    format: of media.asset_sniff. up: axis of a mesh file that is up, None by format. with_pictures: also what a
    reconstruction is compared with: views of a mesh that were held out, or the renders that were sent, none of them
    held out, since the voxels may not depend on what else is asked; nothing for ready-made voxels. A note tells of
    both. Raises MediaError.
    """
    if format == "safetensors":
        return _checked(_of_voxels(load_voxels(data, limits), with_pictures), limits)
    if format in MESH_FORMATS:
        return _checked(_of_mesh(load_mesh(data, format, limits, up=up), with_pictures), limits)
    if format != "zip":
        raise MediaError("unsupported_media_type", f"the 3D format {format[:20]!r} is not offered")
    archive = open_archive(data, limits)
    if is_renders(archive.names):
        views, notes = load_renders(archive, limits)
        return _checked(_of_renders(views, notes, with_pictures), limits)
    if is_voxel_archive(archive.names):
        return _checked(_of_voxels(load_voxel_archive(archive), with_pictures), limits)
    return _checked(_of_mesh(load_mesh_archive(archive, limits, up=up), with_pictures), limits)


def _of_mesh(mesh: Mesh, with_pictures: bool) -> Asset:
    mesh = normalize(mesh)
    views = render_views(mesh, sphere_cameras(VIEWS), SIDE)
    if not any((depth > 0).any() for depth in views.depths):
        raise MediaError("empty_object", "nothing of the mesh can be seen: all of it is more than half transparent")
    voxels = voxelize(views)
    pictures = None
    if with_pictures:
        others = render_views(mesh, sphere_cameras(COMPARED, turn=math.pi / 5), COMPARED_SIDE)
        pictures = _pictures(others, held_out=True)
    return Asset(voxels=_noted(voxels, mesh.notes), pictures=pictures)


def _of_renders(views: Views, notes: tuple[str, ...], with_pictures: bool) -> Asset:
    voxels = _noted(voxelize(views), notes)
    if not with_pictures:
        return Asset(voxels=voxels)
    sides = [len(image) for image in views.images]
    if min(sides) < max(sides) or min(sides) < SMALLEST:
        why = f"they are {min(sides)} to {max(sides)} pixels wide, and must be equal and {SMALLEST} or more"
        return Asset(voxels=_noted(voxels, (f"the reconstruction is not scored on the renders: {why}",)))
    note = f"the reconstruction is scored on the {len(sides)} renders that made the voxels: none was held out"
    return Asset(voxels=_noted(voxels, (note,)), pictures=_pictures(views, held_out=False))


def _of_voxels(voxels: Voxels, with_pictures: bool) -> Asset:
    note = "the reconstruction is not scored: ready-made voxels come without pictures"
    return Asset(voxels=_noted(voxels, (note,)) if with_pictures else voxels)


def _pictures(views: Views, *, held_out: bool) -> PosedPictures:
    return PosedPictures(
        pictures=np.stack([on_black(image) for image in views.images]),
        world_to_camera=views.cameras.world_to_camera,
        intrinsics=views.cameras.intrinsics,
        held_out=held_out,
    )


def _noted(voxels: Voxels, notes: tuple[str, ...]) -> Voxels:
    return replace(voxels, notes=(*notes, *voxels.notes))


def _checked(asset: Asset, limits: Limits) -> Asset:
    check_voxels(len(asset.voxels.coords), limits)
    return asset
