"""What must hold of a glTF file before its meshes are laid out: sizes that are there, a tree, nothing from outside."""

from __future__ import annotations

import binascii
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias
from urllib.parse import unquote

from media.errors import MediaError
from media.limits import Limits
from media.mesh_parts import check_counts

Beside: TypeAlias = Callable[[str], bytes | None]
"""Gives the file of that relative path beside the glTF file, None if there is none."""

COMPONENTS: Final = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
COMPONENT_TYPES: Final = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
TRIANGLES: Final = {4: "list", 5: "strip", 6: "fan"}
"""Modes of primitives that make a surface."""

_COMPRESSED: Final = ("KHR_draco_mesh_compression", "EXT_meshopt_compression", "KHR_meshopt_compression")
_UNDERSTOOD: Final = (
    *("KHR_mesh_quantization", "KHR_texture_transform", "EXT_texture_webp", "KHR_lights_punctual"),
    *("KHR_materials_", "KHR_animation_", "KHR_xmp"),  # and what they begin
)
_JSON_BYTES: Final = 16 * 1024 * 1024
_JSON_CHUNK, _BINARY_CHUNK = 0x4E4F534A, 0x004E4942


@dataclass(frozen=True, kw_only=True)
class Gltf:
    """A file that was checked. roots: the nodes that the scene starts from; from there on they form trees."""

    document: dict[str, Any]
    buffers: list[memoryview]
    roots: list[int]

    def view(self, number: int) -> memoryview:
        """The bytes of a bufferView."""
        view = self.document["bufferViews"][number]
        start = int(view.get("byteOffset", 0))
        return self.buffers[int(view["buffer"])][start : start + int(view["byteLength"])]


def check_gltf(data: bytes, format: str, limits: Limits, beside: Beside | None = None) -> Gltf:
    """Read a .glb or .gltf file as far as its structure, and raise MediaError if that breaks a rule.

    beside: for what it names by a relative path; without it such a file is refused, as it is with any other address.
    """
    try:
        document, binary = _split(data) if format == "glb" else (_parse(data), None)
        _check_extensions(document)
        buffers = [
            _buffer(buffer, binary if number == 0 else None, beside)
            for number, buffer in enumerate(_listed(document, "buffers"))
        ]
        _check_views(document, buffers)
        for number, image in enumerate(_listed(document, "images")):
            if "uri" in image:
                _check_address(image["uri"], f"image {number}", beside)
        for number, accessor in enumerate(_listed(document, "accessors")):
            _check_accessor(number, accessor, document)
        roots = _check_nodes(document, limits)
        _check_size(document, roots, limits)
        return Gltf(document=document, buffers=buffers, roots=roots)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, struct.error, RecursionError):
        raise MediaError("corrupt_media", f"the {format} file is damaged, or breaks the rules of glTF") from None


def outside(uri: str, what: str, beside: Beside | None) -> bytes | None:
    """The bytes of a data: URL or of a file beside; None if that is missing. Raises MediaError for other addresses."""
    _check_address(uri, what, beside)
    if uri.startswith("data:"):
        head, comma, text = uri.partition(",")
        if not comma or not head.endswith(";base64"):
            raise MediaError("corrupt_media", f"{what} of the glTF file is a data: URL that is not base64")
        return binascii.a2b_base64(text)
    return beside(unquote(uri)) if beside else None


def _check_address(uri: str, what: str, beside: Beside | None) -> None:
    if not uri.startswith("data:") and (beside is None or ":" in uri or uri.startswith(("/", "\\"))):
        raise MediaError(
            "corrupt_media",
            f"{what} of the glTF file lies elsewhere; addresses are never fetched: send a GLB, data: URLs or a zip",
        )


def plain_accessor(document: dict[str, Any], number: int) -> dict[str, Any]:
    """An accessor whose values all lie in a bufferView. Raises MediaError for the other kinds."""
    accessor: dict[str, Any] = document["accessors"][_count(number)]
    if "bufferView" not in accessor or "sparse" in accessor:
        raise MediaError(
            "unsupported_codec",
            f"accessor {number} of the glTF file is sparse or without bufferView; neither is offered",
        )
    return accessor


def _split(data: bytes) -> tuple[dict[str, Any], memoryview | None]:
    """The JSON and the binary chunk of a .glb."""
    _, version, total = struct.unpack_from("<4sII", data)
    if version != 2:
        raise MediaError("unsupported_codec", f"a GLB of version {version} is not offered, only version 2")
    if total > len(data):
        raise MediaError("corrupt_media", f"the GLB file says that it has {total} bytes, but has {len(data)}")
    size, kind = struct.unpack_from("<II", data, 12)
    if kind != _JSON_CHUNK or 20 + size > total:
        raise MediaError("corrupt_media", "the GLB file does not start with its JSON, or is cut short")
    if size > _JSON_BYTES:
        raise MediaError("item_too_large", f"the GLB's JSON has {size} bytes; at most {_JSON_BYTES} are allowed")
    document = _parse(data[20 : 20 + size])
    at = 20 + size
    if at + 8 > total:
        return document, None
    size, kind = struct.unpack_from("<II", data, at)
    if at + 8 + size > total:
        raise MediaError("corrupt_media", "the GLB file is cut short")
    return document, memoryview(data)[at + 8 : at + 8 + size] if kind == _BINARY_CHUNK else None


def _parse(data: bytes) -> dict[str, Any]:
    document = json.loads(data)
    if not isinstance(document, dict):
        raise TypeError
    return document


def _check_extensions(document: dict[str, Any]) -> None:
    required = document.get("extensionsRequired", [])
    for name in (*required, *document.get("extensionsUsed", [])):
        if name in _COMPRESSED or (name in required and not str(name).startswith(_UNDERSTOOD)):
            raise MediaError(
                "unsupported_codec",
                f"the glTF extension {str(name)[:60]!r} is not offered; send it uncompressed, without",
            )


def _buffer(buffer: dict[str, Any], binary: memoryview | None, beside: Beside | None) -> memoryview:
    content = outside(buffer["uri"], "a buffer", beside) if "uri" in buffer else binary
    there = 0 if content is None else len(content)
    length = _count(buffer["byteLength"])
    if content is None or length > there:
        raise MediaError("corrupt_media", f"a buffer of the glTF file says {length} bytes, but {there} are there")
    return memoryview(content)[:length]


def _check_views(document: dict[str, Any], buffers: list[memoryview]) -> None:
    for number, view in enumerate(_listed(document, "bufferViews")):
        if _count(view.get("byteOffset", 0)) + _count(view["byteLength"]) > len(buffers[_count(view["buffer"])]):
            raise MediaError("corrupt_media", f"bufferView {number} of the glTF file reaches past its buffer")


def _check_accessor(number: int, accessor: dict[str, Any], document: dict[str, Any]) -> None:
    item = int(COMPONENT_TYPES[accessor["componentType"]][-1]) * COMPONENTS[accessor["type"]]
    count, offset = _count(accessor["count"]), _count(accessor.get("byteOffset", 0))
    if "bufferView" not in accessor:
        return  # of no use for a surface: refused where one is asked for
    view = document["bufferViews"][_count(accessor["bufferView"])]
    stride = _count(view.get("byteStride", 0)) or item
    if stride < item or (count and offset + stride * (count - 1) + item > view["byteLength"]):
        raise MediaError(
            "corrupt_media", f"accessor {number} of the glTF file says {count} values, more than its bufferView has"
        )


def _check_nodes(document: dict[str, Any], limits: Limits) -> list[int]:
    """The nodes that the scene starts from. Raises MediaError if the nodes are too many, or no trees."""
    nodes = _listed(document, "nodes")
    if len(nodes) > limits.mesh_instances:
        raise MediaError(
            "item_too_large",
            f"the glTF file has {len(nodes)} nodes; at most {limits.mesh_instances} are allowed",
            limit=limits.mesh_instances,
            actual=len(nodes),
        )
    children = [_count(child) for node in nodes for child in node.get("children", [])]
    if len(set(children)) != len(children):
        raise MediaError("corrupt_media", "a node of the glTF file has two parents; nodes form trees")
    free = sorted(set(range(len(nodes))) - set(children))
    reached = list(free)
    for number in reached:
        reached += nodes[number].get("children", [])
    if len(reached) != len(nodes):
        raise MediaError("corrupt_media", "nodes of the glTF file form a circle, or one of them is not there")
    scenes = _listed(document, "scenes")
    if not scenes:
        return free
    named = dict.fromkeys(_count(node) for node in scenes[_count(document.get("scene", 0))].get("nodes", []))
    if not named.keys() <= set(free):
        raise MediaError("corrupt_media", "the scene of the glTF file starts from a node that has a parent")
    return list(named)


def _check_size(document: dict[str, Any], roots: list[int], limits: Limits) -> None:
    """Every instance of a mesh is laid out: counted before that is done."""
    nodes = document.get("nodes", [])
    sizes = []
    for mesh in _listed(document, "meshes"):
        vertices = faces = 0
        for part in mesh["primitives"]:
            if part.get("mode", 4) in TRIANGLES:
                points = corners = int(plain_accessor(document, part["attributes"]["POSITION"])["count"])
                if "indices" in part:
                    corners = int(plain_accessor(document, part["indices"])["count"])
                vertices += min(points, corners)
                faces += corners // 3 if part.get("mode", 4) == 4 else max(0, corners - 2)
        sizes.append((vertices, faces))
    reached = list(roots)
    vertices = faces = 0
    for number in reached:
        reached += nodes[number].get("children", [])
        if "mesh" in nodes[number]:
            more = sizes[_count(nodes[number]["mesh"])]
            vertices, faces = vertices + more[0], faces + more[1]
    check_counts(vertices, faces, limits)


def _listed(document: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = document.get(name, [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise TypeError
    return found


def _count(value: object) -> int:
    """A number of things, or the place of one in a list."""
    if not isinstance(value, int) or value < 0:
        raise TypeError
    return value
