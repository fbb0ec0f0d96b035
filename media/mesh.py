"""Mesh files to triangles and what they are painted with: GLB, glTF, OBJ, PLY, STL, OFF, and zips of one of them.

Bytes only: nothing is opened or fetched beside them. What a header claims is compared with what is there first.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath
from typing import Final, Literal, TypeAlias

import numpy as np

from media.archive import Archive
from media.asset_sniff import asset_format
from media.errors import MediaError
from media.gltf import read_gltf
from media.gltf_check import Beside
from media.limits import Limits
from media.mesh_parts import UNPAINTED, blended, placed, shown, without_texture
from media.obj import ObjFile, Paint, read_mtl, read_obj
from media.off import read_off
from media.ply_mesh import read_ply_mesh
from media.stl import read_stl
from media.textures import Textures
from media.types import Material, Mesh

Up: TypeAlias = Literal["y", "z"]
MESH_FORMATS: Final = ("glb", "gltf", "obj", "ply", "stl", "off")
UP: Final[dict[str, Up]] = {"glb": "y", "gltf": "y", "obj": "y", "ply": "z", "stl": "z", "off": "z"}
"""By the standard of glTF; by custom for the others."""

_FACES_AT_ONCE = 1 << 16


def sniff_mesh(data: bytes) -> str | None:
    """One of MESH_FORMATS by content alone, None for anything else. Never raises."""
    found = asset_format(data)
    return found if found in MESH_FORMATS else None


def load_mesh(data: bytes, format: str, limits: Limits, *, up: Up | None = None) -> Mesh:
    """Read one mesh file. up: its axis that is up, None by format. The result is z up, not moved or scaled.

    format: one of MESH_FORMATS. Raises MediaError.
    """
    _check_bytes(len(data), limits)
    try:
        if format in ("glb", "gltf"):
            mesh = read_gltf(data, format, limits)
        elif format == "obj":
            mesh = _without_library(read_obj(data, limits))
        else:
            mesh = _read_plain(data, format, limits)
        return _finish(mesh, format, up)
    except MemoryError:
        raise _too_much_memory() from None


def load_mesh_archive(archive: Archive, limits: Limits, *, up: Up | None = None) -> Mesh:
    """Read the one mesh in a zip, with its MTL files, buffers and textures. Raises MediaError."""
    found = [name for name in archive.names if _suffix(name) in MESH_FORMATS]
    if len(found) != 1:
        nothing = "no mesh (.glb .gltf .obj .ply .stl .off), and no transforms.json or cameras.json of posed renders"
        what = nothing if not found else f"{len(found)} meshes"
        raise MediaError("corrupt_media", f"the zip file holds {what}; send one asset")
    (name,) = found
    data = archive.read(name, limits.mesh_bytes)
    format = _suffix(name)
    if format != "obj" and sniff_mesh(data) != format:
        raise MediaError("corrupt_media", f"the member of the zip file that is called .{format} is none")
    beside = _files_beside(archive, name, limits)
    try:
        if format == "gltf":
            return _finish(read_gltf(data, format, limits, beside), format, up)
        if format == "obj":
            return _finish(_painted(read_obj(data, limits), beside, limits), format, up)
    except MemoryError:
        raise _too_much_memory() from None
    return load_mesh(data, format, limits, up=up)


def _read_plain(data: bytes, format: str, limits: Limits) -> Mesh:
    if format == "ply":
        return read_ply_mesh(data, limits)
    if format == "stl":
        return read_stl(data, limits)
    if format == "off":
        return read_off(data, limits)
    raise MediaError("unsupported_media_type", f"the mesh format {format[:20]!r} is not one of {', '.join(UP)}")


def _without_library(file: ObjFile) -> Mesh:
    """An OBJ of which only vertex colours, if any, say how it looks."""
    notes = ("its materials are in other files: send a zip of all for its colours",) if file.libraries else ()
    if file.mesh.colours is None:
        return replace(file.mesh, material_of_face=None, uv=None, notes=notes)
    return replace(file.mesh, materials=tuple(Material() for _ in file.materials), uv=None, notes=notes)


def _painted(file: ObjFile, beside: Beside, limits: Limits) -> Mesh:
    """An OBJ with what lies beside it."""
    notes: list[str] = []
    paints: dict[str, Paint] = {}
    for line in file.libraries:
        # A name may have spaces, and a line several names.
        whole = beside(line)
        for library, content in [(line, whole)] if whole else [(word, beside(word)) for word in line.split()]:
            if content is None:
                notes.append(f"the material file {shown(library)} is missing: what it paints is grey")
            else:
                paints |= read_mtl(content)
    if not any(used in paints for used in file.materials):
        return replace(_without_library(file), notes=tuple(notes))
    textures = Textures(limits)
    plain = UNPAINTED if file.mesh.colours is None else Material()
    materials = []
    for used in file.materials:
        paint = paints.get(used)
        if paint is None:
            materials.append(plain)
            continue
        material = Material(colour=paint.colour)
        if paint.texture is not None:
            # The colour of a textured material is a leftover in most files: many have its average there, or black.
            texture, alpha = textures.get(paint.texture, beside), paint.colour[3]
            textured = Material(colour=(1.0, 1.0, 1.0, alpha), texture=texture)
            material = without_texture(alpha) if texture is None else placed(textured, file.mesh.uv)
        materials.append(blended(material, notes))
    return replace(file.mesh, materials=tuple(materials), notes=tuple(dict.fromkeys([*notes, *textures.notes])))


def _files_beside(archive: Archive, name: str, limits: Limits) -> Beside:
    """Finds a file by its path as the member `name` gives it, else by its bare name; never outside of the archive."""

    def find(wanted: str) -> bytes | None:
        path = PurePosixPath(name).parent / wanted.replace("\\", "/")
        if str(path) in archive.names:
            return archive.read(str(path), limits.mesh_bytes)
        found = [other for other in archive.names if PurePosixPath(other).name.lower() == path.name.lower()]
        return archive.read(found[0], limits.mesh_bytes) if found else None

    return find


def _finish(mesh: Mesh, format: str, up: Up | None) -> Mesh:
    """Turn it z up. Raises MediaError for a mesh without a surface."""
    if not _has_area(mesh):
        raise MediaError("empty_object", "the mesh has no surface: all its faces are without area")
    axis = up or UP[format]
    vertices, notes = mesh.vertices, mesh.notes
    if axis == "y":
        vertices = np.stack([vertices[:, 0], -vertices[:, 2], vertices[:, 1]], axis=1)
    if up is None and format not in ("glb", "gltf"):
        notes = (*notes, f"{axis} is taken to be up, as is usual in {format} files (`up` says otherwise)")
    return replace(mesh, vertices=vertices, notes=notes)


def _has_area(mesh: Mesh) -> bool:
    vertices = mesh.vertices.astype(np.float64)
    for start in range(0, len(mesh.faces), _FACES_AT_ONCE):
        corners = vertices[mesh.faces[start : start + _FACES_AT_ONCE]]
        if np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]).any():
            return True
    return False


def _check_bytes(size: int, limits: Limits) -> None:
    if size > limits.mesh_bytes:
        raise MediaError(
            "item_too_large",
            f"the mesh file has {size} bytes; at most {limits.mesh_bytes} are allowed",
            limit=limits.mesh_bytes,
            actual=size,
        )


def _too_much_memory() -> MediaError:
    return MediaError("decode_limit", "the mesh needs more memory than a decoder may take")


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower().lstrip(".")
