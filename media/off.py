"""OFF files (Object File Format of Geomview, as text) to triangles, with colours of vertices or faces."""

from __future__ import annotations

import re
from typing import Any

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

_HEADER = re.compile(rb"\s*(ST)?(C)?(N)?(4)?(n)?OFF\b[ \t]*(BINARY)?")
_COMMENT = re.compile(rb"#[^\r\n]*")


def read_off(data: bytes, limits: Limits) -> Mesh:
    """Read one OFF file: OFF, COFF, NOFF, CNOFF and those with texture coordinates (passed over). Raises MediaError."""
    match = _HEADER.match(data)
    if match is None:
        raise MediaError("corrupt_media", 'the OFF file does not start with "OFF"')
    if match[4] or match[5] or match[6]:
        raise MediaError("unsupported_codec", "OFF files are read as text of three dimensions only")
    lines = [line for line in _COMMENT.sub(b"", data[match.end() :]).splitlines() if not line.isspace() and line]
    counts = [int(word) for word in lines[0].split()[:2] if word.isdigit() and len(word) < 19] if lines else []
    if len(counts) != 2:
        raise MediaError("corrupt_media", "the OFF file does not say how many vertices and faces it has")
    vertices, faces = counts
    check_room("OFF", "vertices", vertices, len(data))
    check_room("OFF", "faces", faces, len(data))
    check_counts(vertices, faces, limits)
    if 1 + vertices + faces > len(lines):
        raise MediaError(
            "corrupt_media", f"the OFF file says {vertices} vertices and {faces} faces, but has {len(lines) - 1} lines"
        )
    if faces == 0:
        no_faces(vertices)
    try:
        table = numbers(b" ".join(lines[1 : 1 + vertices])).reshape(vertices, -1)
        corners, owner, of_face = _polygons(lines[1 + vertices : 1 + vertices + faces], limits)
    except (ValueError, OverflowError):
        raise MediaError("corrupt_media", "a line of the OFF file cannot be read") from None
    if table.shape[1] < 3:
        raise MediaError("corrupt_media", "the OFF file has a vertex without three coordinates")
    check_indices(corners, vertices)
    start = 6 if match[3] else 3
    of_vertex = _colours(table[:, start : start + 4]) if match[2] else None
    of_face = None if of_face is None else of_face[owner]
    return coloured(checked_vertices(table[:, :3]), corners, of_vertex, of_face)


def _polygons(lines: list[bytes], limits: Limits) -> tuple[Int64, Int64, UInt8Array | None]:
    """Triangles [F, 3], the polygon of each [F], and the colours of the polygons."""
    flat = numbers(b" ".join(lines))
    width = len(lines[0].split())
    table = flat.reshape(-1, width) if flat.size == width * len(lines) else None
    if table is not None and width >= 4 and (table[:, 0] == table[0, 0]).all() and 3 <= table[0, 0] < width:
        size = int(table[0, 0])
        corners, owner = fans(whole(table[:, 1 : 1 + size]).reshape(-1), np.full(len(lines), size), limits)
        return corners, owner, _colours(table[:, 1 + size :])
    ends = np.cumsum([len(line.split()) for line in lines])
    starts = np.concatenate([[0], ends[:-1]])
    sizes = whole(flat[starts])
    if (sizes < 0).any() or (starts + 1 + sizes > ends).any():
        raise ValueError("a face has fewer corners than it says")
    first = np.cumsum(sizes) - sizes
    corners = flat[np.repeat(starts + 1 - first, sizes) + np.arange(sizes.sum())]
    left = ends - starts - 1 - sizes
    of_face = None
    if (left == left[0]).all() and left[0] >= 3:
        of_face = _colours(flat[(starts + 1 + sizes)[:, None] + np.arange(left[0])])
    return *fans(whole(corners), sizes, limits), of_face


def _colours(values: npt.NDArray[Any]) -> UInt8Array | None:
    """Three or four numbers a row, 0..255 or 0..1; fewer are an index into a table that the file does not have."""
    if values.shape[1] < 3 or not np.isfinite(values).all():
        return None
    values = values[:, :4]
    return rgba_bytes(values / 255 if values.max(initial=0.0) > 1 else values)
