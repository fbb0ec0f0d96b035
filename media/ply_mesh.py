"""PLY files of triangles and polygons, text or binary, with colours of vertices or faces."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from media.errors import MediaError
from media.limits import Limits
from media.mesh_parts import (
    Int64,
    check_counts,
    check_indices,
    check_room,
    checked_vertices,
    coloured,
    fans,
    no_faces,
    numbers,
    rgba_bytes,
    whole,
)
from media.types import Mesh, UInt8Array

_MAX_HEADER: Final = 1 << 16
_TYPES: Final = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"},
    **{"float": "f4", "float32": "f4", "double": "f8", "float64": "f8"},
}
_ORDERS: Final = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": ""}
_SPLATS: Final = {"f_dc_0", "opacity", "scale_0", "rot_0"}
_INDICES: Final = ("vertex_indices", "vertex_index")
_COLOURS: Final = (("red", "green", "blue", "alpha"), ("diffuse_red", "diffuse_green", "diffuse_blue"), ("r", "g", "b"))

Column: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True)
class _Property:
    """kind: type of a value where it is stored; named: what the header calls it, which a text stores as float64 all the
    same. length: type of a list's length, None for one value.
    """

    kind: np.dtype[Any]
    named: np.dtype[Any]
    length: np.dtype[Any] | None = None


@dataclass(frozen=True)
class _Element:
    name: str
    count: int
    properties: dict[str, _Property]


@dataclass(frozen=True)
class _Table:
    """columns: one value a row. lists: how many values each row has, [n], and all of them, row behind row."""

    columns: dict[str, Column]
    lists: dict[str, tuple[Int64, Column]]


def read_ply_mesh(data: bytes, limits: Limits) -> Mesh:
    """Read the vertices and faces of one PLY file. Texture coordinates and all else are passed over.

    Raises MediaError; for Gaussian splats with a word on what may be sent instead.
    """
    is_text, elements, start = _read_header(data)
    counts = {element.name: element.count for element in elements}
    for element in elements:
        if element.name == "vertex" and element.properties.keys() >= _SPLATS:
            raise MediaError(
                "unsupported_media_type",
                "this PLY holds Gaussian splats, the output of decode, which are not encoded again; send a mesh, "
                "renders or voxels",
            )
    vertices = counts.get("vertex", 0)
    if not vertices or not counts.get("face"):
        no_faces(vertices)
    for name, count in counts.items():
        if name in ("vertex", "face"):
            check_room("PLY", f"x {name}", count, len(data) - start)
    check_counts(vertices, counts["face"], limits)
    tables: dict[str, _Table] = {}
    content = _as_bytes(data, start) if is_text else np.frombuffer(data, np.uint8, offset=start)
    at = 0
    for element in elements:
        tables[element.name], at = _read_table(content, at, element)
        if tables.keys() >= {"vertex", "face"}:
            break
    vertex, face = tables["vertex"], tables["face"]
    indices = next((face.lists[name] for name in _INDICES if name in face.lists), None)
    if not vertex.columns.keys() >= {"x", "y", "z"} or indices is None:
        raise MediaError("corrupt_media", "the PLY file has no vertices with x, y and z, or no faces of vertex_indices")
    sizes, corners = indices
    triangles, owner = fans(whole(corners), sizes, limits)
    check_indices(triangles, vertices)
    points = checked_vertices(np.stack([vertex.columns[axis] for axis in "xyz"], axis=1).astype(np.float64))
    named = {element.name: element.properties for element in elements}
    of_face = _colours(face.columns, named["face"])
    of_vertex = _colours(vertex.columns, named["vertex"])
    mesh = coloured(points, triangles, of_vertex, None if of_face is None else of_face[owner])
    if b"TextureFile" in data[:start]:
        instead = "grey is used in its place" if mesh.colours is None else "only its colours are read"
        return replace(mesh, notes=(f"the texture that the PLY file names is left out: {instead}",))
    return mesh


def _colours(columns: dict[str, Column], properties: dict[str, _Property]) -> UInt8Array | None:
    for names in _COLOURS:
        if all(name in columns for name in names[:3]):
            values = np.stack([columns[name] for name in names if name in columns], axis=1)
            named = properties[names[0]].named
            if values.dtype.kind == "f" and named.kind in "iu":  # of a text: 255 is a byte, not 255 times full colour
                span = np.iinfo(named)
                values = np.nan_to_num(values).clip(span.min, span.max).astype(named)
            return rgba_bytes(values)
    return None


def _read_header(data: bytes) -> tuple[bool, list[_Element], int]:
    """Whether it is text, the elements, and where they start."""
    head, mark, rest = bytes(data[:_MAX_HEADER]).partition(b"end_header")
    if not mark:
        raise MediaError(
            "corrupt_media", f"the PLY header has no end: no line end_header in its first {_MAX_HEADER} bytes"
        )
    lines = [line.split() for line in head.decode("latin-1").splitlines()[1:]]
    named = [line[1] for line in lines if line[:1] == ["format"] and len(line) > 1]
    order = _ORDERS.get(named[0]) if named else None
    elements: list[_Element] = []
    for line in lines:
        match line:
            case [] | ["comment" | "obj_info" | "format", *_]:
                continue
            case ["element", name, count] if count.isdecimal() and len(count) < 19:
                elements.append(_Element(name, int(count), {}))
                continue
            case ["property", "list", length, kind, name] if length in _TYPES and kind in _TYPES:
                added = _Property(_type(kind, order), np.dtype(_TYPES[kind]), _type(length, order))
            case ["property", kind, name] if kind in _TYPES:
                added = _Property(_type(kind, order), np.dtype(_TYPES[kind]))
            case _:
                raise MediaError("corrupt_media", "a line of the PLY header is not understood")
        if not elements or name in elements[-1].properties:
            raise MediaError("corrupt_media", "the PLY header has a property twice, or before any element")
        elements[-1].properties[name] = added
    names = [element.name for element in elements]
    if order is None or len(set(names)) != len(names):
        raise MediaError("corrupt_media", "the PLY header names no known format, or an element twice")
    line_end = re.match(rb"[ \t]*(\r\n|\n|\r)", rest)
    if line_end is None:
        raise MediaError("corrupt_media", "the PLY file ends with its header")
    return order == "", elements, len(head) + len(mark) + line_end.end()


def _type(name: str, order: str | None) -> np.dtype[Any]:
    return np.dtype(order + _TYPES[name] if order else "<f8")


def _as_bytes(data: bytes, start: int) -> UInt8Array:
    """A text as if it were binary, all numbers float64: then both are read alike."""
    try:
        return numbers(data[start:]).astype("<f8").view(np.uint8)
    except ValueError:
        raise MediaError("corrupt_media", "the PLY file has something in it that is no number") from None


def _read_table(content: UInt8Array, at: int, element: _Element) -> tuple[_Table, int]:
    """Read one element; returns it and where the next one starts. Raises MediaError if less than that is there."""
    if element.count == 0:
        return _Table({}, {}), at
    lists, _ = _walk(content, at, element, rows=1)
    lengths = {name: sizes[0] for name, (sizes, _) in lists.items()}
    # Mostly all rows are as long as the first. The length of a list gets a name with a space, which no property has.
    parts: list[Any] = []
    for name, item in element.properties.items():
        if item.length is not None:
            parts += [(f"{name} length", item.length), (name, item.kind, (lengths[name],))]
        else:
            parts.append((name, item.kind))
    row = np.dtype(parts)
    end = at + element.count * row.itemsize
    if row.itemsize and end <= len(content):
        rows = content[at:end].view(row)
        if all((rows[f"{name} length"] == length).all() for name, length in lengths.items()):
            return _Table(
                columns={name: rows[name] for name in element.properties if name not in lengths},
                lists={name: (np.full(len(rows), n), rows[name].reshape(-1)) for name, n in lengths.items()},
            ), end
    if not lists:
        raise _short(element)
    lists, end = _walk(content, at, element, rows=element.count)
    found = {}
    for name, (sizes, starts) in lists.items():
        kind, counts = element.properties[name].kind, np.array(sizes, np.int64)
        first = np.cumsum(counts) - counts
        places = np.repeat(np.array(starts, np.int64) - first * kind.itemsize, counts)
        places += np.arange(len(places)) * kind.itemsize
        found[name] = counts, content[places[:, None] + np.arange(kind.itemsize)].view(kind).reshape(-1)
    return _Table(columns={}, lists=found), end


def _walk(
    content: UInt8Array, at: int, element: _Element, *, rows: int
) -> tuple[dict[str, tuple[list[int], list[int]]], int]:
    """Step over rows one by one. Returns for each list its lengths and the places of its values, and the end."""
    plan: list[tuple[struct.Struct | None, int, list[int], list[int]]] = []
    lists: dict[str, tuple[list[int], list[int]]] = {}
    for name, item in element.properties.items():
        reader: struct.Struct | None = None
        sizes: list[int] = []
        starts: list[int] = []
        if item.length is not None:
            reader = struct.Struct((">" if item.length.byteorder == ">" else "<") + item.length.char)
            lists[name] = sizes, starts
        plan.append((reader, item.kind.itemsize, sizes, starts))
    data = memoryview(content.data)
    try:
        for _ in range(rows):
            for reader, size, sizes, starts in plan:
                if reader is None:
                    at += size
                    continue
                length = int(reader.unpack_from(data, at)[0])
                at += reader.size
                if not 0 <= length * size <= len(content) - at:
                    raise _short(element)
                sizes.append(length)
                starts.append(at)
                at += length * size
    except (struct.error, ValueError, OverflowError):
        raise _short(element) from None
    if at > len(content):
        raise _short(element)
    return lists, at


def _short(element: _Element) -> MediaError:
    return MediaError(
        "corrupt_media",
        f"the PLY file says {element.count} of one of its elements, which is more than is there: it is cut short",
    )
