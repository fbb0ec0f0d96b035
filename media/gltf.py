"""glTF files (.glb, .gltf) to one mesh: all instances of the scene laid out, with base colours and their textures."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from media.errors import MediaError
from media.gltf_check import COMPONENT_TYPES, COMPONENTS, TRIANGLES, Beside, Gltf, check_gltf, outside, plain_accessor
from media.limits import Limits
from media.mesh_parts import (
    UNPAINTED,
    Float64,
    Int64,
    blended,
    check_indices,
    checked_vertices,
    no_faces,
    placed,
    rgba_bytes,
    usable_uv,
    without_texture,
)
from media.textures import Textures
from media.types import Float32Array, Material, Mesh, UInt8Array

_WHITE: Final = (1.0, 1.0, 1.0, 1.0)
_PLAIN: Final = 2
"""Materials before those of the file: for surfaces without one, and for those that only have colours at vertices."""


def read_gltf(data: bytes, format: str, limits: Limits, beside: Beside | None = None) -> Mesh:
    """Read one file, in its own axes. beside: gives the files that it names by a relative path. Raises MediaError."""
    gltf = check_gltf(data, format, limits, beside)
    try:
        with np.errstate(all="ignore"):  # what becomes infinite is found where vertices are checked
            return _Reader(gltf, limits, beside).mesh()
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, struct.error):
        raise MediaError("corrupt_media", f"the {format} file breaks the rules of glTF") from None


class _Reader:
    def __init__(self, gltf: Gltf, limits: Limits, beside: Beside | None) -> None:
        self._gltf, self._document = gltf, gltf.document
        self._beside = beside
        self._textures = Textures(limits)
        self._notes: list[str] = []
        self._is_painted = False

    def mesh(self) -> Mesh:
        nodes = self._document.get("nodes", [])
        meshes: dict[int, Mesh | None] = {}
        parts: list[Mesh] = []
        line = [(root, np.eye(4)) for root in self._gltf.roots]
        for number, parent in line:
            node = nodes[number]
            transform = parent @ _transform(node)
            line += [(child, transform) for child in node.get("children", [])]
            if "mesh" not in node:
                continue
            if "skin" in node:
                self._notes.append("skins are not applied: the mesh is taken as it is at rest")
            key = node["mesh"]
            if key not in meshes:
                meshes[key] = _joined([self._part(part) for part in self._document["meshes"][key]["primitives"]])
            if (part := meshes[key]) is not None:
                moved = part.vertices.astype(np.float64) @ transform[:3, :3].T + transform[:3, 3]
                parts.append(replace(part, vertices=checked_vertices(moved)))
        mesh = _joined(parts)
        if mesh is None:
            no_faces(0)
        if not self._is_painted:
            return replace(mesh, material_of_face=None, uv=None, colours=None)
        assert mesh.material_of_face is not None
        used, owner = np.unique(mesh.material_of_face, return_inverse=True)
        mesh = replace(
            mesh,
            materials=tuple(self._material(int(number), mesh.uv) for number in used),
            material_of_face=owner.astype(np.int32),
        )
        return replace(mesh, notes=tuple(dict.fromkeys([*self._notes, *self._textures.notes])))

    def _part(self, primitive: dict[str, Any]) -> Mesh | None:
        """One primitive; material_of_face counts from _PLAIN. None if it is no surface."""
        mode = TRIANGLES.get(primitive.get("mode", 4))
        if mode is None:
            return None
        attributes = primitive["attributes"]
        count = self._document["accessors"][attributes["POSITION"]]["count"]
        corners = self._stored(primitive["indices"])[:, 0] if "indices" in primitive else np.arange(count)
        faces = _triangles(corners.astype(np.int64), mode)
        if len(faces) == 0:
            return None
        check_indices(faces, count)
        # Many primitives may share one long list of vertices: each takes only its own of them.
        rows, inverse = np.unique(faces, return_inverse=True)
        colours = uv = None
        if "COLOR_0" in attributes:
            colours = rgba_bytes(_display(self._values(attributes["COLOR_0"], rows, 3, 4)))
        material = 0 if colours is None else 1
        if "material" in primitive:
            material = _PLAIN + int(primitive["material"])
            uv = self._uv(self._document["materials"][primitive["material"]], attributes, rows)
        self._is_painted |= colours is not None or self._says_something(material)
        return Mesh(
            vertices=self._values(attributes["POSITION"], rows, 3).astype(np.float32),
            faces=inverse.reshape(-1, 3).astype(np.int32),
            material_of_face=np.full(len(faces), material, np.int32),
            uv=None if uv is None else uv.astype(np.float32),
            colours=colours,
        )

    def _stored(self, number: int) -> npt.NDArray[Any]:
        """An accessor as it is stored, [n, components]."""
        accessor = plain_accessor(self._document, number)
        kind = np.dtype(COMPONENT_TYPES[accessor["componentType"]])
        width = COMPONENTS[accessor["type"]]
        stride = self._document["bufferViews"][accessor["bufferView"]].get("byteStride", 0) or width * kind.itemsize
        view, offset = self._gltf.view(accessor["bufferView"]), accessor.get("byteOffset", 0)
        return np.ndarray((accessor["count"], width), kind, view, offset, (stride, kind.itemsize))

    def _values(self, number: int, rows: Int64, *widths: int) -> Float64:
        """Rows of an accessor with so many components, [n, width]; normalised integers as fractions."""
        stored = self._stored(number)[rows]
        if stored.shape[1] not in widths:
            raise ValueError("another number of components")
        if self._document["accessors"][number].get("normalized") and stored.dtype.kind != "f":
            return (stored / np.iinfo(stored.dtype).max).clip(-1, 1)
        return stored.astype(np.float64)

    def _uv(self, material: dict[str, Any], attributes: dict[str, int], rows: Int64) -> Float64 | None:
        info = _base(material)[1]
        if info is None:
            return None
        change = info.get("extensions", {}).get("KHR_texture_transform", {})
        name = f"TEXCOORD_{int(change.get('texCoord', info.get('texCoord', 0)))}"
        if name not in attributes:
            return None
        uv = self._values(attributes[name], rows, 2) * change.get("scale", [1, 1])
        angle = float(change.get("rotation", 0))
        cos, sin = np.cos(angle), np.sin(angle)
        uv = uv @ np.array([[cos, -sin], [sin, cos]]) + change.get("offset", [0, 0])
        uv[:, 1] = 1 - uv[:, 1]  # theirs count from the top
        return usable_uv(uv)

    def _says_something(self, number: int) -> bool:
        if number < _PLAIN:
            return False
        factor, info = _base(self._document["materials"][number - _PLAIN])
        return factor is not None or info is not None

    def _material(self, number: int, uv: Float32Array | None) -> Material:
        if number < _PLAIN:
            return UNPAINTED if number == 0 else Material()
        entry = self._document["materials"][number - _PLAIN]
        factor, info = _base(entry)
        red, green, blue, alpha = (
            np.nan_to_num(np.array(_WHITE if factor is None else factor, np.float64)).clip(0, 1).tolist()
        )
        red, green, blue = _display(np.array([red, green, blue])).tolist()
        texture = None if info is None else self._texture(info)
        if info is not None and texture is None:
            material = without_texture(alpha)
        else:
            material = placed(Material(colour=(red, green, blue, alpha), texture=texture), uv)
        if entry.get("alphaMode") == "MASK":
            return replace(material, cutout=float(np.nan_to_num(entry.get("alphaCutoff", 0.5))))
        return blended(material, self._notes) if entry.get("alphaMode") == "BLEND" else material

    def _texture(self, info: dict[str, Any]) -> UInt8Array | None:
        texture = self._document["textures"][info["index"]]
        webp = texture.get("extensions", {}).get("EXT_texture_webp", {})
        number = webp.get("source", texture.get("source"))
        if number is None:
            self._notes.append("a texture in a format that is not offered is left out: grey is used in its place")
            return None
        return self._textures.get(str(number), self._image)

    def _image(self, number: str) -> bytes | None:
        image = self._document["images"][int(number)]
        if "uri" in image:
            return outside(image["uri"], "an image", self._beside)
        return bytes(self._gltf.view(image["bufferView"]))


def _base(material: dict[str, Any]) -> tuple[Any, dict[str, Any] | None]:
    """Factor and texture of the base colour; None where the file does not say it."""
    older = material.get("extensions", {}).get("KHR_materials_pbrSpecularGlossiness")
    if older is not None:
        return older.get("diffuseFactor"), older.get("diffuseTexture")
    plain = material.get("pbrMetallicRoughness", {})
    return plain.get("baseColorFactor"), plain.get("baseColorTexture")


def _display(colours: Float64) -> Float64:
    """Linear light, in which glTF keeps plain colours, to sRGB, in which pictures are; a fourth column is alpha."""
    light = np.nan_to_num(colours).clip(0, 1)
    shown = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055).round(6)
    if colours.shape[-1] == 4:
        shown[..., 3] = light[..., 3]
    return shown


def _transform(node: dict[str, Any]) -> Float64:
    if "matrix" in node:
        return np.array(node["matrix"], np.float64).reshape(4, 4).T
    x, y, z, w = np.array(node.get("rotation", [0, 0, 0, 1]), np.float64)
    transform = np.eye(4)
    transform[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    transform[:3, :3] *= np.array(node.get("scale", [1, 1, 1]), np.float64)
    transform[:3, 3] = node.get("translation", [0, 0, 0])
    return transform


def _triangles(corners: Int64, mode: str) -> Int64:
    if mode == "list":
        return corners[: len(corners) // 3 * 3].reshape(-1, 3)
    step = np.arange(max(0, len(corners) - 2))
    if mode == "fan":
        return corners[np.stack([np.zeros_like(step), step + 1, step + 2], axis=1)]
    # Every second triangle of a strip runs the other way round.
    return corners[np.stack([step, step + 1 + step % 2, step + 2 - step % 2], axis=1)]


def _joined(parts: Sequence[Mesh | None]) -> Mesh | None:
    found = [part for part in parts if part is not None]
    if not found:
        return None
    starts = np.cumsum([0, *(len(part.vertices) for part in found[:-1])])
    return Mesh(
        vertices=np.concatenate([part.vertices for part in found]),
        faces=np.concatenate([part.faces + np.int32(start) for part, start in zip(found, starts, strict=True)]),
        material_of_face=np.concatenate([part.material_of_face for part in found if part.material_of_face is not None]),
        uv=_filled([part.uv for part in found], found, np.zeros(2, np.float32)),
        colours=_filled([part.colours for part in found], found, np.full(4, 255, np.uint8)),
    )


def _filled(arrays: list[Any], parts: list[Mesh], missing: npt.NDArray[Any]) -> Any:
    """The parts' arrays together; `missing` for every vertex of a part that has none, None where no part has one."""
    if all(array is None for array in arrays):
        return None
    return np.concatenate(
        [
            np.tile(missing, (len(part.vertices), 1)) if array is None else array
            for array, part in zip(arrays, parts, strict=True)
        ]
    )
