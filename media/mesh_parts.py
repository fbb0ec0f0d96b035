"""What the readers of mesh files share: checks of what a file claims, numbers out of text, polygons, paint."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, Final, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

from media.errors import MediaError
from media.limits import Limits
from media.types import Float32Array, Material, Mesh, UInt8Array

Float64: TypeAlias = npt.NDArray[np.float64]
Int64: TypeAlias = npt.NDArray[np.int64]

FARTHEST: Final = 1e6
"""Coordinates beyond it are taken for damage."""
GREY: Final = 0.8
UNPAINTED: Final = Material(colour=(GREY, GREY, GREY, 1.0), is_shaded=True)
"""What a surface is painted with that nothing is said about, or whose texture is not there, beside others that have a
colour."""
CUTOUT_OF_BLEND: Final = 0.5


def check_counts(vertices: int, faces: int, limits: Limits) -> None:
    """Raise MediaError if a mesh has more of either than is allowed."""
    for what, count, most in (("vertices", vertices, limits.mesh_vertices), ("faces", faces, limits.mesh_faces)):
        if count > most:
            raise MediaError(
                "item_too_large",
                f"the mesh has {count} {what} or more; at most {most} are allowed",
                limit=most,
                actual=count,
            )


def check_room(format: str, what: str, count: int, size: int) -> None:
    """Raise MediaError if a file says that it has more of something than its bytes can hold: two each, at least."""
    if 2 * count > size:
        raise MediaError("corrupt_media", f"the {format} file says {count} {what}, more than its bytes can hold")


def shown(name: str) -> str:
    """A name out of a file, short and printable."""
    return repr("".join(character for character in name[:80] if character.isprintable()))


def no_faces(vertices: int) -> NoReturn:
    """Raise the MediaError for a file without a surface."""
    raise MediaError(
        "empty_object",
        f"the mesh has {vertices} points and no faces: there is no surface, and points are not taken",
    )


def checked_vertices(values: npt.NDArray[Any]) -> Float32Array:
    """[n, 3] as float32. Raises MediaError for what is not finite, or far out."""
    if not np.isfinite(values).all():
        raise MediaError("non_finite_input", "the mesh has a vertex that is not finite")
    farthest = float(np.abs(values).max(initial=0.0))
    if farthest > FARTHEST:
        raise MediaError(
            "corrupt_media",
            f"the mesh has coordinates beyond {FARTHEST:g}, up to {farthest:.3g}",
            limit=FARTHEST,
            actual=farthest,
        )
    return values.astype(np.float32)


def check_indices(faces: Int64, vertices: int) -> None:
    """Raise MediaError for faces with a corner that is not there."""
    if len(faces) and (faces.min() < 0 or faces.max() >= vertices):
        bad = int(faces.min() if faces.min() < 0 else faces.max())
        raise MediaError("corrupt_media", f"a face names vertex {bad}; there are {vertices}, counted from 0")


def numbers(text: bytes) -> Float64:
    """All numbers of a text, parted by white space. Raises ValueError for anything else in it."""
    text = text.strip()
    if not text:
        return np.zeros(0)
    with warnings.catch_warnings():
        # Before numpy 2.3 it only warns, and gives what came before the damage.
        warnings.simplefilter("error", DeprecationWarning)
        try:
            return np.fromstring(text.decode("latin-1"), dtype=np.float64, sep=" ")
        except DeprecationWarning:
            raise ValueError("not a number") from None


def whole(values: npt.NDArray[Any]) -> Int64:
    """As integers. Raises MediaError for what cannot be an index."""
    if not (np.abs(values.astype(np.float64)) < 2**31).all():
        raise MediaError("corrupt_media", "a face of the mesh has a number that is no index")
    return values.astype(np.int64)


def fans(corners: Int64, sizes: Int64, limits: Limits) -> tuple[Int64, Int64]:
    """Polygons to triangles around their first corner.

    corners: [n], those of all polygons in a row. sizes: [P], corners of each; under 3 it gives no triangle.
    Returns [F, 3] and, for each triangle, its polygon, [F]. Raises MediaError if there are too many, or none.
    """
    triangles = np.maximum(sizes - 2, 0)
    check_counts(0, int(triangles.sum()), limits)
    if not triangles.any():
        raise MediaError("empty_object", "no face of the mesh has three corners: there is no surface")
    owner = np.repeat(np.arange(len(sizes)), triangles)
    step = np.arange(len(owner)) - np.repeat(np.cumsum(triangles) - triangles, triangles)
    first = (np.cumsum(sizes) - sizes)[owner]
    return corners[np.stack([first, first + step + 1, first + step + 2], axis=1)], owner


def rgba_bytes(colours: npt.NDArray[Any]) -> UInt8Array:
    """[..., 3 or 4] to uint8 RGBA. Floats are 0..1, integers span their type."""
    if colours.dtype.kind == "f":
        colours = (np.nan_to_num(colours).clip(0, 1) * 255).round()
    elif colours.dtype.itemsize > 1:
        colours = colours >> 8 * (colours.dtype.itemsize - 1)
    pixels = colours.astype(np.uint8)
    if pixels.shape[-1] == 4:
        return np.ascontiguousarray(pixels)
    return np.concatenate([pixels, np.full((*pixels.shape[:-1], 1), 255, np.uint8)], axis=-1)


def usable_uv(values: Float64) -> Float64:
    """Texture coordinates, with 0 for those that are not finite or so far out that nothing is left of their place."""
    return np.where(np.abs(values) < FARTHEST, values, 0.0)


def placed(material: Material, uv: Float32Array | None) -> Material:
    """The material as it is; without texture coordinates, with its texture's average colour in place of it."""
    if material.texture is None or uv is not None:
        return material
    means = (material.texture.reshape(-1, 4).mean(axis=0) / 255).tolist()
    red, green, blue, alpha = (part * mean for part, mean in zip(material.colour, means, strict=True))
    return replace(material, colour=(red, green, blue, alpha), texture=None)


def without_texture(alpha: float) -> Material:
    """What stands for a material whose texture is not there: its own colour is a leftover, mostly black or white."""
    return replace(UNPAINTED, colour=(*UNPAINTED.colour[:3], alpha))


def blended(material: Material, notes: list[str]) -> Material:
    """A half-transparent material, which cannot be drawn as such, with a cutout; as it is if it is opaque after all."""
    if material.colour[3] >= 1 and (material.texture is None or material.texture[..., 3].min() == 255):
        return material
    notes.append(f"half-transparent surfaces are drawn opaque, and not at all where alpha is under {CUTOUT_OF_BLEND}")
    return replace(material, cutout=CUTOUT_OF_BLEND)


def coloured(vertices: Float32Array, faces: Int64, of_vertex: UInt8Array | None, of_face: UInt8Array | None) -> Mesh:
    """A mesh of which only colours of its vertices [P, 4], or else of its faces [F, 4], say how it looks."""
    if of_vertex is None and of_face is not None:
        # Every face gets corners of its own, so that they can have its colour.
        vertices, faces = vertices[faces.reshape(-1)], np.arange(faces.size).reshape(-1, 3)
        of_vertex = np.repeat(of_face, 3, axis=0)
    is_painted = of_vertex is not None
    return Mesh(
        vertices=vertices,
        faces=faces.astype(np.int32),
        materials=(Material(),) if is_painted else (),
        material_of_face=np.zeros(len(faces), np.int32) if is_painted else None,
        colours=of_vertex,
    )
