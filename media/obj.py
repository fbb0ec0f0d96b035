"""Wavefront OBJ and MTL: text to triangles and paints. Which files lie beside an OBJ is for its caller to know."""

from __future__ import annotations

import io
from array import array
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from media.errors import MediaError
from media.limits import Limits
from media.mesh_parts import check_counts, checked_vertices, fans, no_faces, rgba_bytes, usable_uv
from media.types import Mesh, UInt8Array


@dataclass(frozen=True, kw_only=True)
class ObjFile:
    """mesh: its material_of_face is into `materials`, the names in order of use ("" for none), and has no Material.

    libraries: the MTL files it names, each line of them as it stands.
    """

    mesh: Mesh
    materials: list[str]
    libraries: list[str]


@dataclass
class Paint:
    """One material of an MTL file. colour: RGBA as it stands there; texture: a path, as it stands there."""

    colour: tuple[float, float, float, float] = (0.8, 0.8, 0.8, 1.0)
    texture: str | None = None


def read_obj(data: bytes, limits: Limits) -> ObjFile:
    """Read the geometry of one OBJ file. Polygons become fans; lines and points are passed over. Raises MediaError."""
    points, tints, places = array("d"), array("d"), array("d")
    corners, corner_places, sizes, owners = array("q"), array("q"), array("q"), array("q")
    names: dict[str, int] = {}
    libraries: list[str] = []
    current, number = "", 0
    text = data.replace(b"\\\r\n", b" ").replace(b"\\\n", b" ")
    try:
        for line in io.TextIOWrapper(io.BytesIO(text), "utf-8", "replace"):
            number += 1
            word, *rest = line.split() or [""]
            if word == "v":
                x, y, z = rest[:3]
                points.extend((float(x), float(y), float(z)))
                if len(rest) >= 6:
                    tints.extend([float(value) for value in rest[3:6]])
            elif word == "vt":
                places.extend((float(rest[0]), float(rest[1]) if len(rest) > 1 else 0.0))
            elif word == "f":
                for corner in rest:
                    first, _, others = corner.partition("/")
                    second = others.partition("/")[0]
                    corners.append(_index(int(first), len(points) // 3))
                    corner_places.append(_index(int(second), len(places) // 2) if second else -1)
                sizes.append(len(rest))
                owners.append(names.setdefault(current, len(names)))
                check_counts(0, len(sizes), limits)
            elif word == "usemtl":
                current = " ".join(rest)
            elif word == "mtllib":
                libraries.append(" ".join(rest))
            if len(points) > 3 * limits.mesh_vertices:
                check_counts(len(points) // 3, 0, limits)
    except (ValueError, IndexError, OverflowError):
        raise MediaError("corrupt_media", f"line {number} of the OBJ file cannot be read") from None
    if not sizes:
        no_faces(len(points) // 3)
    picked, polygon = fans(np.arange(len(corners)), np.frombuffer(sizes, np.int64), limits)
    vertex, place = (np.frombuffer(column, np.int64)[picked] for column in (corners, corner_places))
    if vertex.min() < 0 or vertex.max() >= len(points) // 3:
        named = f"entry {vertex.max() + 1}" if vertex.min() >= 0 else "an entry before the first"
        raise MediaError("corrupt_media", f"a face of the OBJ file names {named} of {len(points) // 3} vertices")
    if (place < -1).any() or place.max() >= len(places) // 2:
        raise MediaError("corrupt_media", "a face of the OBJ file names texture coordinates that are not there")
    # A vertex may have other texture coordinates in each face: a vertex of ours is a pair of both.
    stride = len(places) // 2 + 1
    pairs, faces = np.unique(vertex * stride + place + 1, return_inverse=True)
    rows, places_of = pairs // stride, pairs % stride - 1
    uv = None
    if (places_of >= 0).any():
        found = np.concatenate([np.frombuffer(places).reshape(-1, 2), np.zeros((1, 2))])[places_of]
        uv = usable_uv(found).astype(np.float32)
    mesh = Mesh(
        vertices=checked_vertices(np.frombuffer(points).reshape(-1, 3))[rows],
        faces=faces.reshape(-1, 3).astype(np.int32),
        material_of_face=np.frombuffer(owners, np.int64)[polygon].astype(np.int32),
        uv=uv,
        colours=_colours(np.frombuffer(tints).reshape(-1, 3)[rows]) if len(tints) == len(points) else None,
    )
    return ObjFile(mesh=mesh, materials=list(names), libraries=libraries)


def read_mtl(data: bytes) -> dict[str, Paint]:
    """Materials by name; lines that are not understood are passed over."""
    paints: dict[str, Paint] = {}
    paint = Paint()
    for line in data.decode("utf-8", "replace").splitlines():
        word, *rest = line.split() or [""]
        try:
            if word == "newmtl":
                paint = paints.setdefault(" ".join(rest), Paint())
            elif word == "Kd":
                red, green, blue = (_part(value) for value in rest[:3])
                paint.colour = (red, green, blue, paint.colour[3])
            elif word == "d":
                # "-halo" may stand before it. Tr is passed over: writers do not agree on which end of it is opaque.
                paint.colour = (*paint.colour[:3], _part(rest[-1]))
            elif word == "map_Kd":
                # Options like "-s 1 1 1" stand before the name, which may hold spaces.
                paint.texture = " ".join(rest) if not rest[0].startswith("-") else rest[-1]
        except (ValueError, IndexError):
            continue
    return paints


def _index(value: int, count: int) -> int:
    """From 0; negative ones count back from the last. 0 is none, and becomes one that is not there."""
    return value - 1 if value > 0 else count + value if value < 0 else -(2**40)


def _part(text: str) -> float:
    value = float(text)
    if value != value:
        raise ValueError("not a number")
    return min(1.0, max(0.0, value))


def _colours(tints: npt.NDArray[np.float64]) -> UInt8Array:
    """0..1, or 0..255 as some write them."""
    return rgba_bytes(tints / 255 if tints.max(initial=0.0) > 1 else tints)
