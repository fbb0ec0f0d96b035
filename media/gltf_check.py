"""What must hold of a glTF file before a library reads it: sizes that are there, a tree, nothing from outside."""

from __future__ import annotations

import binascii
import json
import struct
from typing import Any

from media.errors import MediaError
from media.limits import Limits

_COMPONENT_BYTES = {5120: 1, 5121: 1, 5122: 2, 5123: 2, 5125: 4, 5126: 4}
_COMPONENTS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
_COMPRESSED = ("KHR_draco_mesh_compression", "EXT_meshopt_compression", "KHR_texture_basisu")
_JSON_BYTES = 16 * 1024 * 1024
_JSON_CHUNK, _BINARY_CHUNK = 0x4E4F534A, 0x004E4942


def check_gltf(data: bytes, format: str, limits: Limits) -> None:
    """Raise MediaError for a .glb or .gltf file that a library could stumble over, or that asks for other files."""
    try:
        document, binary = _split(data) if format == "glb" else (_parse(data), 0)
        _check_document(document, binary, limits)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, struct.error, RecursionError):
        raise MediaError("corrupt_media", f"the {format} file breaks the rules of glTF") from None


def _split(data: bytes) -> tuple[dict[str, Any], int]:
    """The JSON of a .glb, and how many bytes its binary chunk has."""
    _, version, total = struct.unpack_from("<4sII", data)
    if version != 2:
        raise MediaError("unsupported_codec", f"a GLB of version {version} is not offered, only version 2")
    if total != len(data):
        raise MediaError("corrupt_media", f"the GLB file says that it has {total} bytes, but has {len(data)}")
    size, kind = struct.unpack_from("<II", data, 12)
    if kind != _JSON_CHUNK or 20 + size > len(data):
        raise MediaError("corrupt_media", "the GLB file does not start with its JSON, or is cut short")
    document = _parse(data[20 : 20 + size])
    at = 20 + size
    if at + 8 > len(data):
        return document, 0
    size, kind = struct.unpack_from("<II", data, at)
    if at + 8 + size > len(data):
        raise MediaError("corrupt_media", "the GLB file is cut short")
    return document, size if kind == _BINARY_CHUNK else 0


def _parse(data: bytes) -> dict[str, Any]:
    if len(data) > _JSON_BYTES:
        raise MediaError("item_too_large", f"the glTF JSON has {len(data)} bytes; at most {_JSON_BYTES} are allowed")
    document = json.loads(data)
    if not isinstance(document, dict):
        raise TypeError
    return document


def _check_document(document: dict[str, Any], binary: int, limits: Limits) -> None:
    for name in (*document.get("extensionsRequired", ()), *document.get("extensionsUsed", ())):
        if name in _COMPRESSED:
            raise MediaError("unsupported_codec", f"the glTF extension {name} is not offered; send it uncompressed")
    sizes = [_buffer_bytes(buffer, binary if number == 0 else 0) for number, buffer in _listed(document, "buffers")]
    views = []
    for number, view in _listed(document, "bufferViews"):
        start, length = _count(view.get("byteOffset", 0)), _count(view["byteLength"])
        if start + length > sizes[_index(view["buffer"])]:
            raise MediaError("corrupt_media", f"bufferView {number} of the glTF file reaches past its buffer")
        views.append((length, _count(view.get("byteStride", 0))))
    for number, accessor in _listed(document, "accessors"):
        _check_accessor(number, accessor, views)
    for number, image in _listed(document, "images"):
        if "uri" in image:
            _data_url(image["uri"], f"image {number}")
    _check_nodes(document, limits)


def _check_accessor(number: int, accessor: dict[str, Any], views: list[tuple[int, int]]) -> None:
    if "bufferView" not in accessor or "sparse" in accessor:
        raise MediaError(
            "unsupported_codec",
            f"accessor {number} of the glTF file is sparse or without bufferView; neither is offered",
        )
    length, stride = views[_index(accessor["bufferView"])]
    item = _COMPONENT_BYTES[accessor["componentType"]] * _COMPONENTS[accessor["type"]]
    count = _count(accessor["count"])
    needed = _count(accessor.get("byteOffset", 0)) + (max(stride, item) * (count - 1) + item if count else 0)
    if needed > length:
        raise MediaError(
            "corrupt_media", f"accessor {number} of the glTF file says {count} values, more than its bufferView has"
        )


def _check_nodes(document: dict[str, Any], limits: Limits) -> None:
    nodes = document.get("nodes", [])
    if len(nodes) > limits.mesh_instances:
        raise MediaError(
            "item_too_large",
            f"the glTF scene has {len(nodes)} nodes; at most {limits.mesh_instances} are allowed",
            limit=limits.mesh_instances,
            actual=len(nodes),
        )
    parents: dict[int, int] = {}
    for number, node in enumerate(nodes):
        for child in node.get("children", ()):
            if parents.setdefault(_index(child), number) != number or nodes[child] is None:
                raise MediaError("corrupt_media", f"node {child} of the glTF file has two parents; nodes form a tree")
    for number in range(len(nodes)):
        at, steps = number, 0
        while at in parents:
            at, steps = parents[at], steps + 1
            if steps > len(nodes):
                raise MediaError("corrupt_media", "the nodes of the glTF file form a circle")
    # Every instance of a mesh is laid out: counted before that is done.
    triangles = [sum(_vertices(document, part) for part in mesh["primitives"]) for mesh in document.get("meshes", ())]
    total = sum(triangles[_index(node["mesh"])] for node in nodes if "mesh" in node)
    if total > 3 * limits.mesh_faces:
        raise MediaError(
            "item_too_large",
            f"the glTF scene has about {total // 3} triangles; at most {limits.mesh_faces} are allowed",
            limit=limits.mesh_faces,
            actual=total // 3,
        )


def _vertices(document: dict[str, Any], primitive: dict[str, Any]) -> int:
    name = primitive.get("indices", primitive["attributes"]["POSITION"])
    return _count(document["accessors"][_index(name)]["count"])


def _buffer_bytes(buffer: dict[str, Any], binary: int) -> int:
    length = _count(buffer["byteLength"])
    there = len(_data_url(buffer["uri"], "a buffer")) if "uri" in buffer else binary
    if length > there:
        raise MediaError("corrupt_media", f"a buffer of the glTF file says {length} bytes, but {there} are there")
    return length


def _data_url(uri: object, what: str) -> bytes:
    if not isinstance(uri, str) or not uri.startswith("data:"):
        raise MediaError(
            "corrupt_media",
            f"{what} of the glTF file lies in another file; addresses are never fetched: send a GLB, or data: URLs",
        )
    head, comma, text = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise MediaError("corrupt_media", f"{what} of the glTF file is a data: URL that is not base64")
    return binascii.a2b_base64(text)


def _listed(document: dict[str, Any], name: str) -> list[tuple[int, dict[str, Any]]]:
    found = document.get(name, [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise TypeError
    return list(enumerate(found))


def _count(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise TypeError
    return value


def _index(value: object) -> int:
    return _count(value)
