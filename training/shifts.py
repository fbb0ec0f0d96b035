"""Shifts of a drawn object: other light, other materials, noisy depth, fewer views, parts of views hidden.

V views. S side of a picture. n pixels of a view that show the surface.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from media.archive import open_archive
from media.asset_sniff import asset_format
from media.cameras import Cameras
from media.errors import MediaError
from media.limits import Limits
from media.mesh import load_mesh, load_mesh_archive
from media.mesh_parts import GREY
from media.mesh_views import SIDE, VIEWS, normalize, on_black, render_views, sphere_cameras
from media.multiview import GRID, Views, surface_points
from media.types import Material, Mesh, UInt8Array

Floats = npt.NDArray[np.float64]

LIMITS = Limits.local()
TURN = 0.6
"""Of the held-out cameras around z, as in training.gaussians."""
AMBIENT = 0.25
"""Of a lamp: what a surface keeps that it does not reach."""
FROM_SIDE, FROM_BELOW = (-0.9, 0.4, 0.1), (0.2, -0.3, -0.9)
"""Towards the lamps. The light of an unpainted mesh comes from above, a little from the front right."""
LUMA = np.array([0.299, 0.587, 0.114])
OFF_MIDDLE = np.array([0.513, 0.529, 0.541])
"""Where the checks begin: flat faces like to lie at round numbers, and would flicker between two cubes."""


@dataclass(frozen=True, kw_only=True)
class Surface:
    """What the pixels of a view show, float64 [n, 3] each.

    colour: 0..1, as drawn. albedo: 0..1, without light. place: in the world. normal: unit, on the side that is seen.
    """

    colour: Floats
    albedo: Floats
    place: Floats
    normal: Floats


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One mesh, drawn: `given` makes its voxels, `held` (twice the side that is scored) is what they are judged by.

    given_normals, held_normals: the same pictures with (normal + 1) / 2 as colour. is_painted: whether the file says
    how the mesh looks; if not it is drawn grey under a light.
    """

    name: str
    given: Views
    held: Views
    given_normals: Sequence[UInt8Array]
    held_normals: Sequence[UInt8Array]
    is_painted: bool


Paint = Callable[[Surface], Floats]
"""New colours [n, 3] of a surface; beyond 0..1 they are cut."""
Spoil = Callable[[Views, np.random.Generator], Views]
"""What is left of the views that were taken."""


@dataclass(frozen=True, kw_only=True)
class Shift:
    """One level of one kind of shift: paint changes the object, spoil only what is known of it.

    what: for readers of a report.
    """

    group: str
    level: str
    what: str
    paint: Paint | None = None
    spoil: Spoil | None = None

    @property
    def name(self) -> str:
        """Group and level."""
        return f"{self.group}: {self.level}"

    def apply(self, drawn: Drawn, seed: int) -> tuple[Views, UInt8Array]:
        """What the voxels are made of, and the held-out pictures to be reached, uint8 [V, S, S, 3] on black.

        All levels of a group draw the same chance for an object, so that they differ in strength alone.
        """
        given, held = drawn.given, drawn.held
        if self.paint is not None:
            given = painted(given, drawn.given_normals, self.paint, is_painted=drawn.is_painted)
            held = painted(held, drawn.held_normals, self.paint, is_painted=drawn.is_painted)
        if self.spoil is not None:
            key = zlib.crc32(f"{drawn.name} {self.group}".encode())
            given = self.spoil(given, np.random.default_rng([seed, key]))
        return given, np.stack([halved(on_black(picture)) for picture in held.images])


def read_mesh(path: Path) -> Mesh:
    """A mesh file, or a zip of one. Raises ValueError, naming the file."""
    try:
        data = path.read_bytes()
        form = asset_format(data) or ""
        if form == "safetensors":
            raise ValueError(f"{path} is a voxel pack; shifts change how a mesh is drawn, and need one")
        return load_mesh_archive(open_archive(data, LIMITS), LIMITS) if form == "zip" else load_mesh(data, form, LIMITS)
    except MediaError as error:
        raise ValueError(f"{path}: {error.detail}") from None


def draw(path: Path, held: int, side: int) -> Drawn:
    """Read and draw a mesh as serving does, and `held` views of side x side pixels that make no voxel."""
    mesh = normalize(read_mesh(path))
    cameras, others = sphere_cameras(VIEWS), sphere_cameras(held, turn=TURN)
    bare = with_normals(mesh)
    # Twice the side, halved later: an edge of the target is as soft as one of the Gaussians.
    return Drawn(
        name=path.name,
        given=render_views(mesh, cameras, SIDE),
        held=render_views(mesh, others, 2 * side),
        given_normals=render_views(bare, cameras, SIDE).images,
        held_normals=render_views(bare, others, 2 * side).images,
        is_painted=mesh.material_of_face is not None,
    )


def with_normals(mesh: Mesh) -> Mesh:
    """The same surface, holes included, whose colour is (normal + 1) / 2: drawing it tells each pixel's normal."""
    corners = mesh.faces.reshape(-1)
    vertices = mesh.vertices[corners]
    a, b, c = vertices.reshape(-1, 3, 3).astype(np.float64).swapaxes(0, 1)
    normal = np.cross(b - a, c - a)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-30)
    colours = np.full((len(corners), 4), 255, np.uint8)
    colours[:, :3] = ((normal + 1) * 127.5).round().astype(np.uint8).repeat(3, axis=0)
    if mesh.colours is not None:
        colours[:, 3] = mesh.colours[corners, 3]
    owner = mesh.material_of_face
    return replace(
        mesh,
        vertices=vertices,
        faces=np.arange(len(corners), dtype=np.int32).reshape(-1, 3),
        uv=None if mesh.uv is None else mesh.uv[corners],
        colours=colours,
        materials=(Material(),) if owner is None else tuple(_whitened(material) for material in mesh.materials),
        material_of_face=np.zeros(len(mesh.faces), np.int32) if owner is None else owner,
    )


def _whitened(material: Material) -> Material:
    texture = material.texture
    if texture is not None:
        texture = texture.copy()
        texture[..., :3] = 255
    return replace(material, colour=(1.0, 1.0, 1.0, material.colour[3]), texture=texture, is_shaded=False)


def painted(views: Views, normals: Sequence[UInt8Array], paint: Paint, *, is_painted: bool) -> Views:
    """The same views of an object with other colours. normals: as Drawn has them."""
    images = []
    for image, coded, depth, pose, points in zip(
        views.images, normals, views.depths, views.cameras.world_to_camera, surface_points(views), strict=True
    ):
        there = depth >= 0
        place = points.astype(np.float64)
        colour = image[there][:, :3] / 255
        # Of the two sides of a face the one that is seen is lit.
        normal = coded[there][:, :3] / 127.5 - 1
        normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-30)
        eye = -pose[:3, :3].T.astype(np.float64) @ pose[:3, 3]
        normal[((place - eye) * normal).sum(axis=1) > 0] *= -1
        albedo = colour if is_painted else np.full_like(colour, GREY)
        found = paint(Surface(colour=colour, albedo=albedo, place=place, normal=normal))
        out = image.copy()
        out[there, :3] = (found.clip(0, 1) * 255).round().astype(np.uint8)
        images.append(out)
    return replace(views, images=images)


def halved(picture: UInt8Array) -> UInt8Array:
    """[2 S, 2 S, 3] to [S, S, 3], means of 2 x 2 pixels."""
    side = len(picture) // 2
    blocks = picture.reshape(side, 2, side, 2, 3).astype(np.uint16)
    return ((blocks.sum(axis=(1, 3)) + 2) // 4).astype(np.uint8)


def lamp(towards: Sequence[float], strength: float) -> Paint:
    """A lamp far away, mixed into the drawing as it was. strength: 0..1, 1 is the lamp alone."""
    direction = np.asarray(towards) / np.linalg.norm(towards)

    def paint(surface: Surface) -> Floats:
        light = AMBIENT + (1 - AMBIENT) * (surface.normal @ direction).clip(min=0)
        return (1 - strength) * surface.colour + strength * surface.albedo * light[:, None]

    return paint


def tinted(factor: Sequence[float]) -> Paint:
    """Colours times RGB."""
    return lambda surface: surface.colour * np.asarray(factor)


def saturated(strength: float) -> Paint:
    """Colours away from the grey of their luma. strength: 0 is grey, 1 changes nothing."""

    def paint(surface: Surface) -> Floats:
        grey = (surface.colour @ LUMA)[:, None]
        return grey + strength * (surface.colour - grey)

    return paint


def swapped(surface: Surface) -> Floats:
    """Red to green, green to blue, blue to red: a third of the way around the hues."""
    return surface.colour[:, [2, 0, 1]]


def flat(surface: Surface) -> Floats:
    """One grey all over: only the outline is to be seen."""
    return np.full_like(surface.colour, 0.5)


def checks(side: float) -> Paint:
    """Cubes of two colours. side: of a cube, of the object's longest side."""
    colours = np.array([[0.9, 0.8, 0.2], [0.1, 0.2, 0.5]])

    def paint(surface: Surface) -> Floats:
        cube = np.floor((surface.place + OFF_MIDDLE) / side).astype(np.int64)
        return colours[cube.sum(axis=1) % 2]

    return paint


def noisy(sigma: float) -> Spoil:
    """Gaussian noise on every depth. sigma: in cells of the voxel grid."""

    def spoil(views: Views, chance: np.random.Generator) -> Views:
        depths = []
        for depth in views.depths:
            moved = depth + (sigma / GRID) * chance.standard_normal(depth.shape)
            depths.append(np.where(depth >= 0, np.maximum(moved, 0), depth).astype(depth.dtype))
        return replace(views, depths=depths)

    return spoil


def spread(count: int) -> Spoil:
    """Every so many of the views, which lie on a spiral: spread over all sides, fewer ones among the more."""
    return lambda views, _: _chosen(views, np.arange(0, len(views.depths), len(views.depths) // count))


def one_side(count: int) -> Spoil:
    """The views that look from +x."""

    def spoil(views: Views, _: np.random.Generator) -> Views:
        # The third row of a camera's matrix is where it looks.
        return _chosen(views, np.sort(np.argsort(views.cameras.world_to_camera[:, 2, 0], kind="stable")[:count]))

    return spoil


def _chosen(views: Views, rows: npt.NDArray[np.int64]) -> Views:
    return Views(
        images=[views.images[row] for row in rows],
        depths=[views.depths[row] for row in rows],
        cameras=Cameras(world_to_camera=views.cameras.world_to_camera[rows], intrinsics=views.cameras.intrinsics[rows]),
    )


def hidden(share: float) -> Spoil:
    """In each view something stands before the object, from a side of its own: nothing is known there.

    share: of the object's pixels, in every view. Picture and depth are empty there; of two shares the larger hides
    what the smaller does.
    """

    def spoil(views: Views, chance: np.random.Generator) -> Views:
        images, depths = [], []
        for image, depth in zip(views.images, views.depths, strict=True):
            angle = chance.uniform(0, 2 * np.pi)
            rows, columns = np.nonzero(depth >= 0)
            order = np.argsort(rows * np.sin(angle) + columns * np.cos(angle), kind="stable")
            gone = order[: round(share * len(order))]
            image, depth = image.copy(), depth.copy()
            image[rows[gone], columns[gone]] = 0
            depth[rows[gone], columns[gone]] = -1
            images.append(image)
            depths.append(depth)
        return replace(views, images=images, depths=depths)

    return spoil


SHIFTS: tuple[Shift, ...] = (
    Shift(group="light", level="side, half", what="half a lamp from the side", paint=lamp(FROM_SIDE, 0.5)),
    Shift(group="light", level="side", what="a lamp from the side alone", paint=lamp(FROM_SIDE, 1.0)),
    Shift(group="light", level="below", what="a lamp from below alone", paint=lamp(FROM_BELOW, 1.0)),
    Shift(group="light", level="dim", what="half as bright", paint=tinted((0.5, 0.5, 0.5))),
    Shift(group="light", level="glaring", what="1.6 times as bright, cut at white", paint=tinted((1.6, 1.6, 1.6))),
    Shift(group="light", level="warm", what="candle colour: green 0.75, blue 0.45", paint=tinted((1.0, 0.75, 0.45))),
    Shift(group="material", level="grey", what="saturation 0", paint=saturated(0.0)),
    Shift(group="material", level="vivid", what="saturation 2", paint=saturated(2.0)),
    Shift(group="material", level="swapped", what="red to green to blue to red", paint=swapped),
    Shift(group="material", level="flat", what="one grey, no texture, no light", paint=flat),
    Shift(group="material", level="checks 1/8", what="cubes of two colours, 8 a side", paint=checks(1 / 8)),
    Shift(group="material", level="checks 1/32", what="cubes of two colours, 32 a side", paint=checks(1 / 32)),
    Shift(
        group="noise", level="0.25 cells", what="on every depth, deviation of a quarter of a cell", spoil=noisy(0.25)
    ),
    Shift(group="noise", level="0.5 cells", what="of half a cell", spoil=noisy(0.5)),
    Shift(group="noise", level="1 cell", what="of a cell, 1/64 of the object's longest side", spoil=noisy(1.0)),
    Shift(group="views", level="12", what="every second of the 24", spoil=spread(12)),
    Shift(group="views", level="6", what="every fourth", spoil=spread(6)),
    Shift(group="views", level="3", what="every eighth", spoil=spread(3)),
    Shift(group="views", level="6, one side", what="the six that look from +x", spoil=one_side(6)),
    Shift(
        group="occlusion",
        level="10 %",
        what="10 % of the object hidden in each view, from a side of its own",
        spoil=hidden(0.10),
    ),
    Shift(
        group="occlusion",
        level="25 %",
        what="25 % of the object hidden in each view, from a side of its own",
        spoil=hidden(0.25),
    ),
    Shift(
        group="occlusion",
        level="50 %",
        what="50 % of the object hidden in each view, from a side of its own",
        spoil=hidden(0.50),
    ),
)
GROUPS = tuple(dict.fromkeys(shift.group for shift in SHIFTS))
OF_THE_OBJECT = tuple(dict.fromkeys(shift.group for shift in SHIFTS if shift.paint is not None))
"""Groups that change the object itself: its reconstruction is compared with the changed object."""
