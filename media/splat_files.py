"""Gaussian splats to a file: one door for the three formats that viewers read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from media.ply import encode_ply
from media.splat32 import encode_splat
from media.spz import encode_spz
from media.types import Gaussians

SplatFormat: TypeAlias = Literal["ply", "splat", "spz"]


@dataclass(frozen=True, kw_only=True)
class SplatFile:
    """How a format is written and called. Only PLY has a media type in use; the others go as plain bytes."""

    encode: Callable[[Gaussians], bytes]
    media_type: str
    suffix: str


SPLAT_FILES: Final[dict[SplatFormat, SplatFile]] = {
    "ply": SplatFile(encode=encode_ply, media_type="model/ply", suffix=".ply"),
    "splat": SplatFile(encode=encode_splat, media_type="application/octet-stream", suffix=".splat"),
    "spz": SplatFile(encode=encode_spz, media_type="application/octet-stream", suffix=".spz"),
}
"""ply: exact, 68 bytes a Gaussian. splat: 32 bytes, sorted for viewers that draw while they load. spz: about 16."""


def encode_gaussians(gaussians: Gaussians, format: SplatFormat) -> bytes:
    """The file of Gaussians in a format of SPLAT_FILES; all keep the axes of the record, z up. Raises MediaError."""
    return SPLAT_FILES[format].encode(gaussians)
