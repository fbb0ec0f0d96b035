"""Mesh files to triangles and what they are painted with: GLB, glTF, PLY, STL, OFF through trimesh, OBJ by our reader.

Bytes only: nothing is opened or fetched beside them. What a header claims is compared with what is there first.
"""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import trimesh
from PIL import Image as PILImage
from trimesh.visual import ColorVisuals, TextureVisuals

from media.archive import Archive
from media.asset_sniff import asset_format
from media.errors import MediaError
from media.gltf_check import check_gltf
from media.image import decode_rgba
from media.limits import Limits
from media.obj import Paint, read_mtl, read_obj
from media.ply import is_gaussian_ply
from media.types import Float32Array, Int32Array, Material, Mesh, UInt8Array

Up = Literal["y", "z"]
MESH_FORMATS: Final = ("glb", "gltf", "obj", "ply", "stl", "off")
Y_UP: Final = ("glb", "gltf", "obj")
"""By the glTF standard, and by the custom of OBJ files; of the others z is taken to be up."""
FARTHEST = 1e6
CUTOUT_OF_BLEND = 0.5

_PLY_ELEMENT = re.compile(rb"^element\s+(\w+)\s+(\d+)\s*$", re.MULTILINE)
_TEXTURE_FORMATS = ("PNG", "JPEG", "WEBP")


def load_mesh(data: bytes, format: str, limits: Limits, *, up: Up | None = None) -> Mesh:
    """Read one mesh file. up: its axis that is up, None by format. The result is z up, not moved or scaled.

    Raises MediaError.
    """
    _check_bytes(len(data), limits)
    if format == "obj":
        mesh, names, libraries = read_obj(data, limits)
        mesh = replace(mesh, notes=("textures and materials are in other files: send a zip",) if libraries else ())
        return _finish(_plain(mesh, names), format, limits, up)
    return _finish(_through_trimesh(data, format, limits), format, limits, up)


def load_mesh_archive(archive: Archive, limits: Limits, *, up: Up | None = None) -> Mesh:
    """Read the one mesh in a zip; an OBJ with its MTL files and textures. Raises MediaError."""
    found = [name for name in archive.names if PurePosixPath(name).suffix.lower().lstrip(".") in MESH_FORMATS]
    if len(found) != 1:
        what = (
            "no mesh (.glb .gltf .obj .ply .stl .off) and no transforms.json" if not found else f"{len(found)} meshes"
        )
        raise MediaError("corrupt_media", f"the zip file holds {what}; send one asset")
    (name,) = found
    data = archive.read(name, limits.mesh_bytes)
    suffix = PurePosixPath(name).suffix.lower().lstrip(".")
    if suffix != "obj":
        if asset_format(data) != suffix:
            raise MediaError("corrupt_media", f"the member of the zip file that is called .{suffix} is none")
        return load_mesh(data, suffix, limits, up=up)
    mesh, names, libraries = read_obj(data, limits)
    notes: list[str] = []
    paints: dict[str, Paint] = {}
    for library in libraries:
        content = _beside(archive, name, library)
        if content is None:
            notes.append(f"the material file {_shown(library)} is missing: what it paints is grey")
        else:
            paints |= read_mtl(content)
    painted = any(used in paints for used in names)
    if not painted and mesh.colours is None:
        return _finish(replace(_plain(mesh, names), notes=tuple(notes)), "obj", limits, up)
    materials = tuple(_material(archive, name, paints.get(used), limits, notes) for used in names)
    return _finish(replace(mesh, materials=materials, notes=tuple(notes)), "obj", limits, up)


def _check_bytes(size: int, limits: Limits) -> None:
    if size > limits.mesh_bytes:
        raise MediaError(
            "item_too_large",
            f"the mesh file has {size} bytes; at most {limits.mesh_bytes} are allowed",
            limit=limits.mesh_bytes,
            actual=size,
        )


def _plain(mesh: Mesh, names: list[str]) -> Mesh:
    """A mesh of which only vertex colours, if any, say how it looks."""
    if mesh.colours is None:
        return replace(mesh, material_of_face=None, uv=None)
    return replace(mesh, materials=tuple(Material() for _ in names), uv=None)


def _material(archive: Archive, name: str, paint: Paint | None, limits: Limits, notes: list[str]) -> Material:
    if paint is None:
        return Material(colour=(0.8, 0.8, 0.8, 1.0))
    red, green, blue, alpha = paint.colour
    if paint.texture is None:
        return Material(colour=(red, green, blue, alpha))
    content = _beside(archive, name, paint.texture.replace("\\", "/"))
    texture = None
    if content is None:
        notes.append(f"the texture {_shown(paint.texture)} is missing: its plain colour is used")
    else:
        try:
            texture = _rgba(decode_rgba(content, limits))
        except MediaError as error:
            notes.append(f"the texture {_shown(paint.texture)} is left out ({error.detail}): its plain colour is used")
    if texture is None:
        return Material(colour=(red, green, blue, alpha))
    # The colour of a textured material is a leftover in most files: many have black there.
    return Material(texture=texture, cutout=CUTOUT_OF_BLEND if texture[..., 3].min() < 128 else 0.0)


def _beside(archive: Archive, name: str, wanted: str) -> bytes | None:
    """A file by its path as the OBJ gives it, else by its bare name; never outside of the archive."""
    path = PurePosixPath(name).parent / wanted.removeprefix("./")
    if str(path) in archive.names:
        return archive.read(str(path))
    bare = [other for other in archive.names if PurePosixPath(other).name.lower() == PurePosixPath(wanted).name.lower()]
    return archive.read(bare[0]) if bare else None


def _through_trimesh(data: bytes, format: str, limits: Limits) -> Mesh:
    if format in ("glb", "gltf"):
        check_gltf(data, format, limits)
    elif format == "ply":
        _check_ply(data, limits)
    elif format == "off":
        _check_off(data, limits)
    try:
        loaded = trimesh.load_scene(io.BytesIO(data), file_type=format, process=False, allow_remote=False)
        return _of_scene(loaded, limits)
    except MediaError:
        raise
    except MemoryError:
        raise MediaError("decode_limit", "the mesh needs more memory than a decoder may take") from None
    except Exception:
        raise MediaError("corrupt_media", f"the {format} file is damaged or cut short") from None


def _of_scene(scene: trimesh.Scene, limits: Limits) -> Mesh:
    """All instances of a scene in one mesh."""
    parts: list[Mesh] = []
    notes: list[str] = []
    known: dict[int, Material] = {}
    faces = vertices = 0
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        geometry = scene.geometry[name]
        if not isinstance(geometry, trimesh.Trimesh) or len(geometry.faces) == 0:
            continue
        faces, vertices = faces + len(geometry.faces), vertices + len(geometry.vertices)
        for what, count, most in (("faces", faces, limits.mesh_faces), ("vertices", vertices, limits.mesh_vertices)):
            if count > most:
                raise MediaError(
                    "item_too_large",
                    f"the mesh has {count} {what} or more; at most {most} are allowed",
                    limit=most,
                    actual=count,
                )
        moved = geometry.vertices @ transform[:3, :3].T + transform[:3, 3]
        parts.append(_of_geometry(geometry, moved.astype(np.float32), known, limits, notes))
    if not parts:
        raise MediaError("empty_object", "the file has no faces: there is no surface, points alone are not taken")
    return replace(_joined(parts), notes=tuple(dict.fromkeys(notes)))


def _of_geometry(
    geometry: trimesh.Trimesh, vertices: Float32Array, known: dict[int, Material], limits: Limits, notes: list[str]
) -> Mesh:
    faces = np.asarray(geometry.faces, np.int64)
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise MediaError("corrupt_media", f"a face names vertex {int(faces.max())} of {len(vertices)}")
    mesh = Mesh(vertices=vertices, faces=faces.astype(np.int32))
    visual = geometry.visual
    painted = np.zeros(len(faces), np.int32)
    if isinstance(visual, TextureVisuals) and _says_something(visual.material):
        material = known.get(id(visual.material))
        if material is None:
            material = known[id(visual.material)] = _of_material(visual.material, limits, notes)
        uv = None if visual.uv is None else np.asarray(visual.uv, np.float32)[:, :2]
        if uv is not None and (len(uv) != len(vertices) or not np.isfinite(uv).all()):
            uv = None
        colours = visual.vertex_attributes.get("color") if hasattr(visual, "vertex_attributes") else None
        return replace(
            mesh,
            materials=(material,),
            material_of_face=painted,
            uv=uv,
            colours=_vertex_colours(colours, len(vertices)),
        )
    if isinstance(visual, ColorVisuals) and visual.kind == "vertex":
        colours = _vertex_colours(visual.vertex_colors, len(vertices))
        return replace(mesh, materials=(Material(),), material_of_face=painted, colours=colours)
    if isinstance(visual, ColorVisuals) and visual.kind == "face":
        # Every face gets corners of its own, so that they can have its colour.
        colours = np.repeat(np.asarray(visual.face_colors, np.uint8), 3, axis=0)
        own = np.arange(3 * len(faces), dtype=np.int32).reshape(-1, 3)
        return Mesh(
            vertices=vertices[faces.reshape(-1)],
            faces=own,
            materials=(Material(),),
            material_of_face=painted,
            colours=_vertex_colours(colours, len(colours)),
        )
    return mesh


def _says_something(material: Any) -> bool:
    """Whether a material is of the file: trimesh invents one with a small white picture where there is none."""
    picture = _picture_of(material)
    return (picture is not None and picture.format is not None) or _factor_of(material) is not None


def _picture_of(material: Any) -> Any:
    return getattr(material, "baseColorTexture", None) or getattr(material, "image", None)


def _factor_of(material: Any) -> Any:
    factor = getattr(material, "baseColorFactor", None)
    if factor is None and hasattr(material, "baseColorFactor") and _picture_of(material) is None:
        return (1.0, 1.0, 1.0, 1.0)  # what glTF says of a material that does not say it
    return factor


def _of_material(material: Any, limits: Limits, notes: list[str]) -> Material:
    picture, factor = _picture_of(material), _factor_of(material)
    colour = (1.0, 1.0, 1.0, 1.0)
    if factor is not None:
        values = np.asarray(factor, np.float64).reshape(-1)
        values = values / 255 if np.asarray(factor).dtype.kind in "ui" else values
        red, green, blue, alpha = (*values[:3].clip(0, 1).tolist(), *values[3:4].clip(0, 1).tolist(), 1.0)[:4]
        colour = (red, green, blue, alpha)
    texture = None if picture is None else _texture(picture, limits, notes)
    mode = getattr(material, "alphaMode", None)
    cutoff = getattr(material, "alphaCutoff", None)
    cutout = 0.0
    if mode == "MASK":
        cutout = 0.5 if cutoff is None else float(cutoff)
    elif mode == "BLEND":
        cutout = CUTOUT_OF_BLEND
        notes.append("half-transparent surfaces are drawn opaque, and where they are under half not at all")
    return Material(colour=colour, texture=texture, cutout=cutout)


def _texture(picture: PILImage.Image, limits: Limits, notes: list[str]) -> UInt8Array | None:
    """trimesh opened it but did not decode it yet."""
    width, height = picture.size
    if picture.format not in _TEXTURE_FORMATS or width * height > limits.image_pixels:
        notes.append(f"a texture ({picture.format}, {width} x {height} pixels) is left out: its plain colour is used")
        return None
    try:
        return np.asarray(picture.convert("RGBA"))
    except (OSError, ValueError, SyntaxError):
        notes.append("a texture is damaged: its plain colour is used")
        return None


def _vertex_colours(colours: Any, count: int) -> UInt8Array | None:
    if colours is None:
        return None
    array = np.asarray(colours)
    if array.ndim != 2 or len(array) != count or array.shape[1] not in (3, 4):
        return None
    if array.dtype.kind == "f":
        array = (array.clip(0, 1) * 255).round()
    elif array.dtype == np.uint16:
        array = array // 257
    return _rgba(array.astype(np.uint8))


def _rgba(pixels: npt.NDArray[np.uint8]) -> UInt8Array:
    if pixels.shape[-1] == 4:
        return np.ascontiguousarray(pixels)
    return np.concatenate([pixels, np.full((*pixels.shape[:-1], 1), 255, np.uint8)], axis=-1)


def _joined(parts: list[Mesh]) -> Mesh:
    """One mesh of several; a part that nothing paints is grey beside parts that are painted."""
    if len(parts) == 1:
        return parts[0]
    materials: list[Material] = []
    owners: list[Int32Array] = []
    starts = np.cumsum([0, *(len(part.vertices) for part in parts[:-1])])
    for part in parts:
        own = part.material_of_face
        owners.append(len(materials) + (np.zeros(len(part.faces), np.int32) if own is None else own))
        materials += part.materials or (Material(colour=(0.8, 0.8, 0.8, 1.0)),)
    is_painted = any(part.material_of_face is not None for part in parts)
    return Mesh(
        vertices=np.concatenate([part.vertices for part in parts]),
        faces=np.concatenate([part.faces + np.int32(start) for part, start in zip(parts, starts, strict=True)]),
        materials=tuple(materials) if is_painted else (),
        material_of_face=np.concatenate(owners).astype(np.int32) if is_painted else None,
        uv=_filled([part.uv for part in parts], parts, np.zeros(2, np.float32)),
        colours=_filled([part.colours for part in parts], parts, np.full(4, 255, np.uint8)),
    )


def _filled(arrays: list[Any], parts: list[Mesh], missing: npt.NDArray[Any]) -> Any:
    """The parts' arrays together; `missing` for every vertex of a part that has none, None where no part has one."""
    if all(array is None for array in arrays):
        return None
    rows = [len(part.vertices) for part in parts]
    return np.concatenate(
        [np.tile(missing, (count, 1)) if array is None else array for array, count in zip(arrays, rows, strict=True)]
    )


def _finish(mesh: Mesh, format: str, limits: Limits, up: Up | None) -> Mesh:
    vertices = mesh.vertices
    used = vertices[np.unique(mesh.faces)]
    if not np.isfinite(used).all():
        raise MediaError("non_finite_input", "the mesh has a vertex that is not finite")
    if np.abs(used).max() > FARTHEST:
        raise MediaError("corrupt_media", f"the mesh has coordinates beyond {FARTHEST:g}")
    if np.ptp(used, axis=0).max() <= 0 or not _has_area(mesh):
        raise MediaError("empty_object", "the mesh has no surface: all its faces are without area")
    axis = up or ("y" if format in Y_UP else "z")
    notes = mesh.notes
    if axis == "y":
        vertices = np.stack([vertices[:, 0], -vertices[:, 2], vertices[:, 1]], axis=1)
    if up is None:
        notes = (*notes, f"{axis} is taken to be up, as is usual in {format} files (`up` says otherwise)")
    return replace(mesh, vertices=np.ascontiguousarray(vertices, np.float32), notes=notes)


def _has_area(mesh: Mesh) -> bool:
    a, b, c = (mesh.vertices[mesh.faces[:, corner]].astype(np.float64) for corner in range(3))
    return bool((np.cross(b - a, c - a) != 0).any())


def _check_ply(data: bytes, limits: Limits) -> None:
    if is_gaussian_ply(data):
        raise MediaError(
            "unsupported_media_type",
            "this PLY holds Gaussian splats, which is what /decode gives; send a mesh, posed renders or voxels",
        )
    head, end, _ = data[: 1 << 16].partition(b"end_header")
    if not end:
        raise MediaError("corrupt_media", "the PLY file's header has no end")
    counts = {name: int(count) for name, count in _PLY_ELEMENT.findall(head)}
    room = len(data) - len(head)
    for name, most in ((b"vertex", limits.mesh_vertices), (b"face", limits.mesh_faces)):
        count, what = counts.get(name, 0), name.decode()
        # Whatever its form, an entry takes at least two bytes.
        if 2 * count > room:
            raise MediaError("corrupt_media", f"the PLY file says {count} x {what}, more than its bytes can hold")
        if count > most:
            raise MediaError(
                "item_too_large",
                f"the PLY file has {count} x {what}; at most {most} are allowed",
                limit=most,
                actual=count,
            )
    if not counts.get(b"face"):
        raise MediaError("empty_object", f"the PLY file has {counts.get(b'vertex', 0)} points and no faces: no surface")


def _check_off(data: bytes, limits: Limits) -> None:
    words = [word for line in data[:4096].splitlines()[:50] for word in line.partition(b"#")[0].split()]
    numbers = [int(word) for word in words[:5] if word.isdigit()][:2]
    if len(numbers) < 2:
        raise MediaError("corrupt_media", "the OFF file does not say how many vertices and faces it has")
    for what, count, most in zip(
        ("vertices", "faces"), numbers, (limits.mesh_vertices, limits.mesh_faces), strict=True
    ):
        if 2 * count > len(data):
            raise MediaError("corrupt_media", f"the OFF file says {count} {what}, more than its bytes can hold")
        if count > most:
            raise MediaError(
                "item_too_large",
                f"the OFF file has {count} {what}; at most {most} are allowed",
                limit=most,
                actual=count,
            )


def _shown(name: str) -> str:
    return repr("".join(character for character in name[:80] if character.isprintable()))
