"""STL files to triangles: binary ones, whose length is exactly what they say, and text."""

from __future__ import annotations

import struct

import numpy as np

from media.asset_sniff import LOOK, is_stl_text
from media.errors import MediaError
from media.limits import Limits
from media.mesh_parts import check_counts, checked_vertices, no_faces, numbers
from media.types import Mesh

_HEADER, _FACET = 84, np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("rest", "<u2")])


def read_stl(data: bytes, limits: Limits) -> Mesh:
    """Read one STL file; its normals and the two bytes beside a facet are passed over. Raises MediaError."""
    if len(data) >= _HEADER:
        (count,) = struct.unpack_from("<I", data, _HEADER - 4)
        if len(data) == _HEADER + count * _FACET.itemsize:
            check_counts(0, count, limits)
            return _mesh(np.frombuffer(data, _FACET, offset=_HEADER)["corners"].reshape(-1, 3).astype(np.float64))
    if not is_stl_text(data[:LOOK]):
        if len(data) < _HEADER:
            raise MediaError("corrupt_media", f"the STL file is cut short: it has {len(data)} bytes")
        check_counts(0, count, limits)
        raise MediaError(
            "corrupt_media",
            f"the STL file says that it has {count} faces, which are {_HEADER + count * _FACET.itemsize} bytes; "
            f"it has {len(data)}",
        )
    text = data.lower()
    facets = text.count(b"endfacet")
    check_counts(0, facets, limits)
    lines = (line.split(None, 1) for line in text.splitlines())
    corners = [words[1] for words in lines if len(words) == 2 and words[0] == b"vertex"]
    try:
        found = numbers(b" ".join(corners))
    except ValueError:
        raise MediaError("corrupt_media", "a vertex of the STL file cannot be read") from None
    if len(found) != 3 * len(corners) or len(corners) != 3 * facets:
        raise MediaError("corrupt_media", "the STL file has facets that are not three vertices of three numbers")
    return _mesh(found.reshape(-1, 3))


def _mesh(corners: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Mesh:
    if len(corners) == 0:
        no_faces(0)
    return Mesh(vertices=checked_vertices(corners), faces=np.arange(len(corners), dtype=np.int32).reshape(-1, 3))
