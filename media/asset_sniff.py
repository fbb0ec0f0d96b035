"""Which kind of 3D file this may be, from its first bytes: light, so that a server's front can ask it of anything."""

from __future__ import annotations

import re
import struct

from media.errors import MediaError
from media.limits import Limits

LOOK = 4096
"""Bytes of a text that are looked at."""

STL_HEADER, STL_FACET = 80, 50
"""Bytes before the count of faces, and of a face."""

_DECLARED = {"model/stl": "stl", "model/x.stl-ascii": "stl", "model/x.stl-binary": "stl", "model/obj": "obj"}
_OFF = re.compile(rb"\s*(?:ST)?C?N?4?n?OFF\b")
_OBJ = re.compile(rb"(?:v|vn|vt|vp|f|o|g|s|l|p|usemtl|mtllib|#)(?:[ \t].*)?")


def asset_format(data: bytes) -> str | None:
    """glb, gltf, obj, ply, stl, off, zip, safetensors, or None for what is no 3D file. Never raises."""
    start = bytes(data[:LOOK])
    if start.startswith(b"glTF"):
        return "glb"
    if start.startswith((b"ply\n", b"ply\r")):
        return "ply"
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "zip"
    if start[8:9] == b"{" and len(start) > 9:
        return "safetensors"
    if len(data) > 84 and len(data) == 84 + 50 * struct.unpack("<I", start[80:84])[0]:
        return "stl"
    if is_stl_text(start):
        return "stl"
    if _OFF.match(start):
        return "off"
    if start.lstrip().startswith(b"{"):
        return "gltf" if b'"asset"' in data[: 1 << 20] and b'"meshes"' in data else None
    return "obj" if _is_obj(start) else None


def claimed_format(data: bytes, declared: str | None) -> str | None:
    """stl or obj for a file in no known format that is meant to be one, so that its reader can say what it lacks.

    Neither has a magic number. declared: a media type. Undeclared, a file counts as STL if it is whole but for its
    count of faces: a header of text, filled up to its length, and whole facets after it. Never raises.
    """
    start = bytes(data[:LOOK])
    named = _DECLARED.get((declared or "").partition(";")[0].strip().lower())
    if named == "obj" and b"\0" in start:
        return None
    if named is not None:
        return named
    title, count = start[:STL_HEADER], start[STL_HEADER : STL_HEADER + 4]
    if len(count) < 4 or not any(count) or _is_text(count) or (len(data) - STL_HEADER - 4) % STL_FACET:
        return None
    kept = title.rstrip(b"\0 ")
    return "stl" if len(kept) < STL_HEADER and _is_text(kept) else None


def is_stl_text(start: bytes) -> bool:
    """Whether a file that starts so is an STL of text; some binary ones have "solid" in their header."""
    text = start.lstrip().lower()
    return text.startswith(b"solid") and (b"facet" in text or b"endsolid" in text)


def check_asset_bytes(size: int, format: str, limits: Limits) -> None:
    """Raise MediaError for a file that is larger than its kind may be."""
    most = limits.archive_bytes if format in ("zip", "safetensors") else limits.mesh_bytes
    if size > most:
        raise MediaError(
            "item_too_large", f"the {format} file has {size} bytes; at most {most} are allowed", limit=most, actual=size
        )


def _is_text(data: bytes) -> bool:
    return data.isascii() and data.decode("ascii").replace("\n", " ").replace("\r", " ").isprintable()


def _is_obj(start: bytes) -> bool:
    """Whether every whole line is one that an OBJ file may have, and one of them gives a vertex or a face."""
    lines = [line.strip() for line in start.splitlines() if line.strip()]
    if len(start) == LOOK:
        lines = lines[:-1]
    return all(_OBJ.fullmatch(line) for line in lines) and any(line[:2] in (b"v ", b"f ") for line in lines)
