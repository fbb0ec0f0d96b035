"""Gaussians to PLY and back, in the layout that viewers of 3D Gaussian splats read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from media.errors import MediaError
from media.splat_arrays import WIDTHS, check_gaussians
from media.types import Gaussians

COLUMNS: Final = (
    *("x", "y", "z", "nx", "ny", "nz"),
    *("f_dc_0", "f_dc_1", "f_dc_2", "opacity"),
    *("scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
)
"""Properties of a vertex, all float32: the published order. Normals are 0; there is no SH beyond degree 0."""

_NORMALS: Final = COLUMNS[3:6]
_READ: Final = tuple(name for name in COLUMNS if name not in _NORMALS)
"""In the order of WIDTHS."""

_MAX_HEADER: Final = 1 << 16
_OPAQUE: Final = 17.0
"""Where the published writer's opacity becomes infinite: the sigmoid of all above is 1 in float32."""

_TYPES: Final = {
    **{"char": "i1", "uchar": "u1", "short": "<i2", "ushort": "<u2"},
    **{"int": "<i4", "uint": "<u4", "float": "<f4", "double": "<f8"},
    **{"int8": "i1", "uint8": "u1", "int16": "<i2", "uint16": "<u2"},
    **{"int32": "<i4", "uint32": "<u4", "float32": "<f4", "float64": "<f8"},
}


def encode_ply(gaussians: Gaussians) -> bytes:
    """Binary little-endian PLY, 68 bytes a Gaussian behind a short header; z up, as the record is.

    Raises MediaError for arrays of another shape or with a number that is not finite.
    """
    check_gaussians(gaussians)
    count = len(gaussians)
    table = np.zeros((count, len(COLUMNS)), "<f4")
    table[:, [COLUMNS.index(name) for name in _READ]] = np.concatenate(
        [getattr(gaussians, name).reshape(count, width) for name, width in WIDTHS.items()], axis=1
    )
    properties = "".join(f"property float {name}\n" for name in COLUMNS)
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {count}\n{properties}end_header\n"
    return header.encode("ascii") + table.tobytes()


def is_gaussian_ply(data: bytes) -> bool:
    """Whether decode_ply may read this, by the header alone: the file's first bytes are enough."""
    try:
        _read_header(data)
    except MediaError:
        return False
    return True


def decode_ply(data: bytes) -> Gaussians:
    """Read the PLY of Gaussians: binary little-endian, vertices first, float32 properties in any order.

    Left out is what the record has no place for: normals, f_rest_* and all other properties, and later elements
    (ply_notes names them). An infinite opacity, as the published writer gives, becomes 17 or -17.
    Raises MediaError: unsupported_media_type for another kind of PLY, corrupt_media for one that is cut or spoilt,
    non_finite_input.
    """
    header = _read_header(data)
    need = header.count * header.row.itemsize
    have = len(data) - header.size
    if have < need or (have > need and not header.has_more):
        raise MediaError(
            "corrupt_media", f"{header.count} vertices take {need} bytes behind the PLY header; there are {have}"
        )
    table = np.frombuffer(memoryview(data)[header.size : header.size + need], header.row)
    rows = np.stack([table[name] for name in _READ], axis=1).astype(np.float32, copy=False)
    arrays: dict[str, Any] = {}
    start = 0
    for name, width in WIDTHS.items():
        arrays[name] = np.ascontiguousarray(rows[:, start : start + width])
        start += width
    opacities = arrays["opacities"][:, 0]
    arrays["opacities"] = np.where(np.isinf(opacities), np.copysign(np.float32(_OPAQUE), opacities), opacities)
    gaussians = Gaussians(**arrays)
    check_gaussians(gaussians)
    return gaussians


def ply_notes(data: bytes) -> tuple[str, ...]:
    """What decode_ply leaves out of this file that its owner may miss. Raises MediaError as decode_ply does."""
    header = _read_header(data)
    unused = [name for name in header.row.names or () if name not in COLUMNS]
    rest = [name for name in unused if name.startswith("f_rest_")]
    notes = []
    if rest:
        notes.append(f"{len(rest)} properties f_rest_* left out: colours do not depend on the view")
    if len(unused) > len(rest):
        notes.append(f"{len(unused) - len(rest)} other properties left out")
    if header.has_more:
        notes.append("elements behind the vertices left out")
    return tuple(notes)


@dataclass(frozen=True, kw_only=True)
class _Header:
    """count: vertices. row: their record. size: bytes up to the first one. has_more: other elements follow them."""

    count: int
    row: np.dtype[np.void]
    size: int
    has_more: bool


def _read_header(data: bytes) -> _Header:
    start = bytes(data[:_MAX_HEADER])
    if not start.startswith((b"ply\n", b"ply\r\n")):
        raise MediaError("unsupported_media_type", 'the file is no PLY: its first line is not "ply"')
    head, mark, _ = start.partition(b"\nend_header")
    lines = [line.rstrip(b"\r").split() for line in head.split(b"\n")]
    end = start.find(b"\n", len(head) + len(mark))
    if not mark or end < 0 or start[len(head) + len(mark) : end] not in (b"", b"\r"):
        raise MediaError("corrupt_media", f"the PLY header has no line end_header in its first {_MAX_HEADER} bytes")
    if lines[1:2] != [[b"format", b"binary_little_endian", b"1.0"]]:
        raise MediaError("unsupported_media_type", "only PLY of the format binary_little_endian 1.0 is read")
    elements: list[tuple[bytes, bytes]] = []
    fields: dict[str, str] = {}
    for words in lines[2:]:
        match words:
            case [b"comment" | b"obj_info", *_]:
                pass
            case [b"element", name, count]:
                elements.append((name, count))
            case [b"property", *_] if len(elements) > 1:
                pass
            case [b"property", kind, name] if elements and _text(kind) in _TYPES and _text(name) not in fields:
                fields[_text(name)] = _TYPES[_text(kind)]
            case _:
                raise MediaError("corrupt_media", "a line of the PLY header is not understood")
    if not elements or elements[0][0] != b"vertex":
        raise MediaError("unsupported_media_type", "a PLY of Gaussians starts with the element vertex")
    missing = [name for name in _READ if fields.get(name) != _TYPES["float"]]
    if missing:
        raise MediaError(
            "unsupported_media_type",
            f"a PLY of Gaussians has {', '.join(missing)} as float properties; this one has not",
        )
    count = elements[0][1]
    if not count.isdigit() or len(count) > 18:
        raise MediaError("corrupt_media", "the number of vertices in the PLY header is not understood")
    return _Header(count=int(count), row=np.dtype(list(fields.items())), size=end + 1, has_more=len(elements) > 1)


def _text(word: bytes) -> str:
    return word.decode("latin-1")
