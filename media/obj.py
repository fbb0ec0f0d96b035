"""Wavefront OBJ and MTL: text to triangles and paints. Which files lie beside an OBJ is for its caller to know."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from media.errors import MediaError
from media.limits import Limits
from media.types import Mesh, UInt8Array


@dataclass
class Paint:
    """One material of an MTL file."""

    colour: list[float] = field(default_factory=lambda: [0.8, 0.8, 0.8, 1.0])
    texture: str | None = None


def read_obj(data: bytes, limits: Limits) -> tuple[Mesh, list[str], list[str]]:
    """Parse the geometry; returns the mesh (material_of_face: into the names), the names, and the MTL files it names.

    Polygons become fans. Raises MediaError for what is no number, or an index that is not there.
    """
    points: list[list[float]] = []
    tints: list[list[float]] = []
    places: list[list[float]] = []
    corners: list[tuple[int, int]] = []
    owners: list[int] = []
    names: dict[str, int] = {"": 0}
    libraries: list[str] = []
    current, number = 0, 0
    try:
        for line in data.decode("utf-8", "replace").replace("\\\n", " ").splitlines():
            number += 1
            word, *rest = line.split() or [""]
            if word == "v":
                points.append([float(value) for value in rest[:3]])
                if len(rest) >= 6:
                    tints.append([float(value) for value in rest[3:6]])
            elif word == "vt":
                places.append([float(rest[0]), float(rest[1]) if len(rest) > 1 else 0.0])
            elif word == "f":
                ring = [_corner(text, len(points), len(places)) for text in rest]
                for step in range(1, len(ring) - 1):
                    corners += (ring[0], ring[step], ring[step + 1])
                    owners.append(current)
                if len(owners) > limits.mesh_faces:
                    raise _too_many("faces", len(owners), limits.mesh_faces)
            elif word == "usemtl":
                current = names.setdefault(" ".join(rest), len(names))
            elif word == "mtllib":
                libraries.append(" ".join(rest))
            if len(points) > limits.mesh_vertices:
                raise _too_many("vertices", len(points), limits.mesh_vertices)
    except (ValueError, IndexError):
        raise MediaError("corrupt_media", f"line {number} of the OBJ file cannot be read") from None
    if any(len(point) != 3 for point in points):
        raise MediaError("corrupt_media", "the OBJ file has a vertex without three coordinates")
    if not owners:
        raise MediaError("empty_object", f"the OBJ file has {len(points)} vertices but no faces: there is no surface")
    # A vertex may have other texture coordinates in each face: a vertex of ours is a pair of both.
    pairs, inverse = np.unique(np.array(corners, np.int64), axis=0, return_inverse=True)
    uv = None
    if places and (pairs[:, 1] >= 0).any():
        uv = np.asarray([*places, [0.0, 0.0]], np.float32)[pairs[:, 1]]
    mesh = Mesh(
        vertices=np.asarray(points, np.float64).astype(np.float32)[pairs[:, 0]],
        faces=inverse.reshape(-1, 3).astype(np.int32),
        material_of_face=np.asarray(owners, np.int32),
        uv=uv,
        colours=_tints(tints, pairs[:, 0]) if len(tints) == len(points) else None,
    )
    return mesh, list(names), libraries


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
                paint.colour[:3] = [min(1.0, max(0.0, float(value))) for value in rest[:3]]
            elif word == "map_Kd" and rest:
                # Options like "-s 1 1 1" come before the name, which may hold spaces.
                paint.texture = " ".join(rest) if not rest[0].startswith("-") else rest[-1]
        except ValueError:
            continue
    return paints


def _corner(text: str, points: int, places: int) -> tuple[int, int]:
    first, _, rest = text.partition("/")
    second = rest.partition("/")[0]
    return _index(first, points), _index(second, places) if second else -1


def _index(text: str, count: int) -> int:
    value = int(text)
    index = value - 1 if value > 0 else count + value
    if not 0 <= index < count:
        raise MediaError("corrupt_media", f"a face of the OBJ file names entry {value} of {count}")
    return index


def _tints(tints: list[list[float]], rows: npt.NDArray[np.int64]) -> UInt8Array:
    rgb = np.asarray(tints)[rows]
    if rgb.max(initial=0.0) > 1:
        rgb = rgb / 255
    alpha = np.ones((len(rgb), 1))
    return (np.concatenate([rgb, alpha], axis=1).clip(0, 1) * 255).round().astype(np.uint8)


def _too_many(what: str, count: int, most: int) -> MediaError:
    return MediaError(
        "item_too_large",
        f"the mesh has {count} {what} or more; at most {most} are allowed",
        limit=most,
        actual=count,
    )
