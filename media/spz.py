"""SPZ, the small splat file: a gzip of a 16-byte header and the attributes one after another.

Written is version 3: of the versions with exact rotations the one that most viewers read and that needs no zstd.
The format's frame is x right, y up, z back, yet viewers and converters show it as they show a PLY, unturned; so the
axes are those of our PLY, z up, and an object looks the same from both.
Source: the format's public description; its numbers are those that the public readers share.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from typing import Final

import numpy as np
import numpy.typing as npt

from media.errors import MediaError
from media.splat_arrays import Float64Array, check_gaussians, opacity_bytes, opacity_logits, to_bytes, unit_rotations
from media.types import Float32Array, Gaussians, UInt8Array

VERSION: Final = 3
FRACTIONAL_BITS: Final = 12
"""Of a position: steps of 1/4096, a 64th of a voxel, within -2048..2048. What all writers use."""

MAX_GAUSSIANS: Final = 10_000_000
"""Most that decode_spz reads; a full grid of voxels gives 8.4 million."""

# magic, version, Gaussians, SH degree, fractional bits, flags, reserved
_HEADER: Final = struct.Struct("<IIIBBBB")
_MAGIC: Final = 0x5053474E
# Drawn as our renderer does: small Gaussians fade instead of growing. Other flags mean further data.
_ANTIALIASED: Final = 1
_GZIP: Final = 16 + zlib.MAX_WBITS

# Bytes a Gaussian by attribute, in the order of the file; rotations by version, then SH by degree.
_POSITION, _OPACITY, _COLOUR, _SCALE = 9, 1, 3, 3
_ROTATION: Final = {2: 3, 3: 4}
_HARMONICS: Final = (0, 9, 24, 45, 72)

_COLOUR_GAIN: Final = 0.15
_PART: Final = 511 * np.sqrt(2)
"""A stored part of a quaternion is its size times this, 9 bits and a sign: the three smaller are at most sqrt(1/2)."""


def encode_spz(gaussians: Gaussians) -> bytes:
    """SPZ version 3, SH degree 0, the Gaussians in their order; the same bytes for the same Gaussians.

    Colours outside -3.33..3.33 (RGB -0.44..1.44) and scales outside -10..5.94 are clipped. Raises MediaError for
    arrays of another shape, a number that is not finite, a quaternion of length 0, or a position that does not fit.
    """
    check_gaussians(gaussians)
    fixed = np.rint(gaussians.positions.astype(np.float64) * (1 << FRACTIONAL_BITS))
    outside = ((fixed < -(1 << 23)) | (fixed >= 1 << 23)).any(axis=1)
    if outside.any():
        row = int(np.argmax(outside))
        limit = (1 << 23 - FRACTIONAL_BITS) - 1
        actual = float(np.abs(gaussians.positions[row]).max())
        raise MediaError(
            "invalid_parameter",
            f"positions row {row} is {gaussians.positions[row].tolist()}; an SPZ file holds -{limit} to {limit}",
            limit=limit,
            actual=actual,
        )
    parts = (
        _HEADER.pack(_MAGIC, VERSION, len(gaussians), 0, FRACTIONAL_BITS, _ANTIALIASED, 0),
        fixed.astype("<i4").reshape(-1, 3, 1).view(np.uint8)[..., :3].tobytes(),
        opacity_bytes(gaussians.opacities).tobytes(),
        to_bytes(255 * (0.5 + _COLOUR_GAIN * gaussians.colours.astype(np.float64))).tobytes(),
        to_bytes(16 * (gaussians.scales.astype(np.float64) + 10)).tobytes(),
        _pack_rotations(unit_rotations(gaussians.rotations)).tobytes(),
    )
    return gzip.compress(b"".join(parts), compresslevel=6, mtime=0)


def decode_spz(data: bytes) -> Gaussians:
    """Read SPZ of version 2 or 3; SH beyond degree 0 is left out. Never unpacks more than the header announces.

    Raises MediaError: unsupported_media_type for what is no such file or another version of it, item_too_large above
    MAX_GAUSSIANS, corrupt_media for one that is cut or spoilt.
    """
    if data.startswith(_MAGIC.to_bytes(4, "little")):
        raise MediaError("unsupported_media_type", "the file is SPZ of version 4 or later; versions 2 and 3 are read")
    if not data.startswith(b"\x1f\x8b"):
        raise MediaError("unsupported_media_type", "the file is no SPZ of version 2 or 3: it does not start as a gzip")
    inflater = zlib.decompressobj(_GZIP)
    try:
        count, bits, sizes = _read_header(inflater.decompress(data, _HEADER.size))
        whole = sum(sizes) * count
        body = inflater.decompress(inflater.unconsumed_tail, whole + 1)
    except zlib.error as error:
        raise MediaError("corrupt_media", "the SPZ file's gzip stream is damaged") from error
    if len(body) != whole or not inflater.eof:
        raise MediaError(
            "corrupt_media", f"{count} Gaussians take {whole} bytes behind the SPZ header; the file has fewer or more"
        )
    edges = np.cumsum([size * count for size in sizes])[:-1]
    parts = np.split(np.frombuffer(body, np.uint8), edges)
    position, opacity, colour, scale, rotation, _ = (
        part.reshape(count, size) for part, size in zip(parts, sizes, strict=True)
    )
    fixed = np.zeros((count, 3, 4), np.uint8)
    fixed[..., 1:] = position.reshape(count, 3, 3)
    return Gaussians(
        # The shift back from the upper three bytes carries the sign along.
        positions=((fixed.view("<i4")[..., 0] >> 8) / (1 << bits)).astype(np.float32),
        colours=((colour / 255 - 0.5) / _COLOUR_GAIN).astype(np.float32),
        opacities=opacity_logits(opacity[:, 0]),
        scales=(scale / 16 - 10).astype(np.float32),
        rotations=_unpack_rotations(rotation),
    )


def _read_header(header: bytes) -> tuple[int, int, tuple[int, ...]]:
    """Gaussians, fractional bits, and bytes a Gaussian of each attribute."""
    if len(header) < _HEADER.size:
        raise MediaError("corrupt_media", f"an SPZ file starts with a header of {_HEADER.size} bytes; this one is cut")
    magic, version, count, degree, bits, flags, reserved = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise MediaError("unsupported_media_type", "the file is no SPZ: its first four unpacked bytes are not NGSP")
    if version not in _ROTATION:
        raise MediaError("unsupported_media_type", f"SPZ version {version} is not read; versions 2 and 3 are")
    if flags & ~_ANTIALIASED or reserved:
        raise MediaError("unsupported_media_type", f"the SPZ flags {flags:#x} announce extensions; none are read")
    if degree >= len(_HARMONICS) or bits > 23:
        raise MediaError(
            "corrupt_media", f"SH degree {degree} and {bits} fractional bits; SPZ has 0 to 4 and 0 to 23 of them"
        )
    if count > MAX_GAUSSIANS:
        raise MediaError(
            "item_too_large",
            f"the SPZ file announces {count} Gaussians; at most {MAX_GAUSSIANS} are read",
            limit=MAX_GAUSSIANS,
            actual=count,
        )
    return count, bits, (_POSITION, _OPACITY, _COLOUR, _SCALE, _ROTATION[version], _HARMONICS[degree])


# Parts of a quaternion are in the order x, y, z, w in the file.


def _pack_rotations(unit: Float64Array) -> npt.NDArray[np.uint32]:
    """Two bits for the largest part's place, then the others, 10 bits each; q and -q are one rotation."""
    parts = unit[:, [1, 2, 3, 0]]
    largest = np.abs(parts).argmax(axis=1)
    rows = np.arange(len(parts))
    parts = parts * np.where(parts[rows, largest] < 0, -1, 1)[:, None]
    sizes = np.minimum(np.rint(np.abs(parts) * _PART), 511).astype(np.uint32)
    stored = sizes | (parts < 0).astype(np.uint32) << np.uint32(9)
    packed = largest.astype("<u4")
    for place in range(4):
        packed = np.where(largest == place, packed, packed << np.uint32(10) | stored[:, place])
    out: npt.NDArray[np.uint32] = packed.astype("<u4")
    return out


def _unpack_rotations(stored: UInt8Array) -> Float32Array:
    """Version 2: x, y, z as bytes, w from their length. Version 3: as packed above."""
    count, width = stored.shape
    if width == _ROTATION[2]:
        largest = np.full(count, 3)
        smaller = stored / 127.5 - 1
    else:
        packed = np.ascontiguousarray(stored).view("<u4")[:, 0]
        largest = (packed >> np.uint32(30)).astype(np.int64)
        fields = packed[:, None] >> np.array([20, 10, 0], np.uint32)
        smaller = (fields & np.uint32(511)) / _PART * np.where(fields & np.uint32(512), -1, 1)
    parts = np.zeros((count, 4))
    parts[np.arange(4) != largest[:, None]] = smaller.ravel()
    parts[np.arange(count), largest] = np.sqrt(np.maximum(0, 1 - np.square(smaller).sum(axis=1)))
    return parts[:, [3, 0, 1, 2]].astype(np.float32)
