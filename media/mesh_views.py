"""A mesh to posed pictures with depth, as voxelize takes them: normalised, drawn from all sides, painted.

V: views. S: side of a picture.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from media.cameras import Cameras
from media.mesh_parts import GREY
from media.mesh_raster import Float64, Holes, Seen, rasterize
from media.multiview import Views
from media.types import Int32Array, Mesh, UInt8Array

VIEWS, SIDE = 24, 256
"""Of the cells that 128 views of 640 pixels show these find 0.94 (0.86 of a plant); 384 pixels find 0.96 and cost twice
as much: tests/bench/mesh_views.py. The bundled Gaussian decoder was trained on these."""
DISTANCE, ANGLE = 2.0, math.radians(40)
"""Of the cameras, in sides of the cube; the object's own cube is seen whole from there, but for its corners."""
MARGIN = 1e-4
"""Left free at the faces of the cube, so that rounding puts nothing outside."""
DARKEST = 0.35
"""Share of the light on a side that is turned away from it."""
# Where the light of an unpainted surface comes from: above, a little from the front right.
LIGHT = np.array([0.35, -0.5, 0.8]) / np.linalg.norm([0.35, -0.5, 0.8])


def normalize(mesh: Mesh) -> Mesh:
    """Put the middle of its bounding box at the origin and make its longest side 1. Only what faces use counts."""
    used = mesh.vertices[np.unique(mesh.faces)].astype(np.float64)
    low, high = used.min(axis=0), used.max(axis=0)
    scale = (1 - MARGIN) / float((high - low).max())
    return replace(mesh, vertices=((mesh.vertices - (low + high) / 2) * scale).astype(np.float32))


def sphere_cameras(count: int, *, turn: float = 0.0, distance: float = DISTANCE, angle: float = ANGLE) -> Cameras:
    """Cameras spread evenly over a sphere, looking at its middle, z up. turn: of all around z, in radians.

    Two sets with counts that differ, or with other turns, share no camera.
    """
    height = 1 - (2 * np.arange(count) + 1) / count
    around = np.arange(count) * math.pi * (3 - math.sqrt(5)) + turn
    ring = np.sqrt(1 - height**2)
    back = np.stack([ring * np.cos(around), ring * np.sin(around), height], axis=1)
    right = np.stack([-np.sin(around), np.cos(around), np.zeros(count)], axis=1)
    pose = np.tile(np.eye(4), (count, 1, 1))
    pose[:, :3, :3] = np.stack([right, np.cross(right, back), -back], axis=1)
    pose[:, 2, 3] = distance
    focal = 0.5 / math.tan(angle / 2)
    intrinsics = np.tile(np.array([[focal, 0, 0.5], [0, focal, 0.5], [0, 0, 1.0]]), (count, 1, 1))
    return Cameras(world_to_camera=pose.astype(np.float32), intrinsics=intrinsics.astype(np.float32))


def render_views(mesh: Mesh, cameras: Cameras, side: int) -> Views:
    """Draw the mesh from each camera: RGBA with alpha 0 or 255, and planar depth, -1 where nothing is.

    A pixel is sampled at its top left corner, which is where voxelize takes its depth to be: the surface then lies
    where it is. Painted surfaces have their colour without any light; where nothing says how the mesh looks, or a
    texture is not there, it is grey under a light that is fixed in the world.
    """
    paint = _Paint(mesh)
    vertices = mesh.vertices.astype(np.float64)
    images, depths = [], []
    for pose, k in zip(cameras.world_to_camera.astype(np.float64), cameras.intrinsics.astype(np.float64), strict=True):
        seen = rasterize(_projected(vertices, pose, k, side), mesh.faces, side, paint if paint.has_holes else None)
        images.append(paint.picture(seen, pose))
        depths.append(seen.depth)
    return Views(images=images, depths=depths, cameras=cameras)


def _projected(vertices: Float64, pose: Float64, k: Float64, side: int) -> Float64:
    points = vertices @ pose[:3, :3].T + pose[:3, 3]
    z = points[..., 2]
    with np.errstate(all="ignore"):
        x = side * ((k[0, 0] * points[..., 0] + k[0, 1] * points[..., 1]) / z + k[0, 2])
        y = side * (k[1, 1] * points[..., 1] / z + k[1, 2])
    return np.stack([x, y, z], axis=-1)


class _Paint(Holes):
    """The colours of a mesh's surface, and where it has holes."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._is_shaded = np.array([material.is_shaded for material in mesh.materials], bool)
        self._cutouts = np.array([material.cutout for material in mesh.materials] or [0.0])
        self.has_holes = bool((self._cutouts > 0).any())

    def are_solid(self, triangles: Int32Array, weights: Float64) -> npt.NDArray[np.bool_]:
        owner = self._mesh.material_of_face
        assert owner is not None  # only materials have cutouts
        cutout = self._cutouts[owner[triangles]]
        solid = np.ones(len(triangles), bool)
        some = cutout > 0
        solid[some] = self._colours(triangles[some], weights[some])[:, 3] >= cutout[some]
        return solid

    def picture(self, seen: Seen, pose: Float64) -> UInt8Array:
        """uint8 [S, S, 4]."""
        is_there = seen.triangle >= 0
        triangles, weights = seen.triangle[is_there], seen.weights[is_there].astype(np.float64)
        owner = self._mesh.material_of_face
        if owner is None:
            colour = np.repeat(GREY * self._light(triangles, pose), 3, axis=1)
        else:
            colour = self._colours(triangles, weights)[:, :3]
            shaded = self._is_shaded[owner[triangles]]
            colour[shaded] *= self._light(triangles[shaded], pose)
        pixels = np.zeros((*seen.triangle.shape, 4), np.uint8)
        pixels[is_there, :3] = (colour * 255).round().astype(np.uint8)
        pixels[is_there, 3] = 255
        return pixels

    def _colours(self, triangles: Int32Array, weights: Float64) -> Float64:
        """RGBA in 0..1, [n, 4]."""
        mesh = self._mesh
        assert mesh.material_of_face is not None
        owner = mesh.material_of_face[triangles]
        colour = np.array([material.colour for material in mesh.materials])[owner]
        corners = mesh.faces[triangles]
        if mesh.colours is not None:
            colour = colour * (mesh.colours[corners] / 255 * weights[:, :, None]).sum(axis=1)
        if mesh.uv is not None:
            uv = (mesh.uv[corners] * weights[:, :, None]).sum(axis=1)
            for number in np.unique(owner):
                texture = mesh.materials[number].texture
                if texture is not None:
                    colour[owner == number] *= _sample(texture, uv[owner == number])
        return colour

    def _light(self, triangles: Int32Array, pose: Float64) -> Float64:
        """Share of the light that falls on each, [n, 1]."""
        a, b, c = (self._mesh.vertices[self._mesh.faces[triangles, corner]].astype(np.float64) for corner in range(3))
        normal = np.cross(b - a, c - a)
        normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-30)
        # Of the two sides of a face the one that is seen is lit, however its corners are ordered.
        eye = -pose[:3, :3].T @ pose[:3, 3]
        away = ((a - eye) * normal).sum(axis=1) > 0
        normal[away] *= -1
        light: Float64 = DARKEST + (1 - DARKEST) * (0.5 + 0.5 * (normal @ LIGHT))
        return light[:, None]


def _sample(texture: UInt8Array, uv: Float64) -> Float64:
    """Bilinear, repeated beyond 0..1; v = 0 is the lower edge. RGBA in 0..1, [n, 4]."""
    height, width = texture.shape[:2]
    x = uv[:, 0] % 1 * width - 0.5
    y = (1 - uv[:, 1]) % 1 * height - 0.5
    left, top = np.floor(x).astype(np.int64), np.floor(y).astype(np.int64)
    across, down = (x - left)[:, None], (y - top)[:, None]

    def texel(row: npt.NDArray[np.int64], column: npt.NDArray[np.int64]) -> Float64:
        found: Float64 = texture[row % height, column % width] / 255.0
        return found

    upper: Float64 = texel(top, left) * (1 - across) + texel(top, left + 1) * across
    lower = texel(top + 1, left) * (1 - across) + texel(top + 1, left + 1) * across
    mixed: Float64 = upper * (1 - down) + lower * down
    return mixed


def on_black(picture: UInt8Array) -> UInt8Array:
    """RGBA or RGB to RGB, blended with black."""
    if picture.shape[2] == 3:
        return picture
    black: UInt8Array = (picture[..., :3] * (picture[..., 3:] / 255)).round().astype(np.uint8)
    return black
