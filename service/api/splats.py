"""3D answers: which formats Gaussians can be given as, what a worker is asked for each, and the files."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal

from media.splat_files import encode_gaussians
from media.types import Gaussians
from service.api import negotiation as types
from service.api.children import CLIP_FORMATS, IMAGE_FORMATS, File
from service.api.items import Done
from service.api.schemas import DecodeOptions
from service.view import PICTURE_SIDE, TURNTABLE_SIDE, View

Format = Literal["ply", "splat", "spz"]
FORMATS = (types.PLY, *IMAGE_FORMATS, *CLIP_FORMATS, types.BYTES)
"""Of one item, the default first."""


def formats(wanted: Format | None) -> tuple[str, ...]:
    """FORMATS, with the compact ones in front where the option `format` names one."""
    return (types.BYTES, *FORMATS[:-1]) if wanted in ("splat", "spz") else FORMATS


def asked(media_type: str, options: DecodeOptions) -> dict[str, Any] | None:
    """Return what a worker is asked to make of voxels: None (leave them), {} (Gaussians), or a View as JSON."""
    if media_type in (types.PLY, types.BYTES, types.MULTIPART):
        return {}
    is_clip = media_type in CLIP_FORMATS
    if not is_clip and media_type not in IMAGE_FORMATS:
        return None
    return View(
        azimuth=options.azimuth,
        elevation=options.elevation,
        distance=options.distance,
        fov=options.fov,
        side=options.side or (TURNTABLE_SIDE if is_clip else PICTURE_SIDE),
        frames=options.frames if is_clip else 1,
        background=options.background,
    ).to_json()


def format_of(media_type: str, options: DecodeOptions) -> Format:
    """Return the file format behind a chosen type."""
    return "ply" if media_type == types.PLY else options.format or "splat"


def file(done: Done, format: Format, prefix: str = "") -> File:
    """Write a worker's Gaussians; prefix: of their arrays' names. Takes a while: not for the event loop."""
    gaussians = Gaussians(**{field.name: done.arrays[prefix + field.name] for field in fields(Gaussians)})
    return File(media_type=types.PLY if format == "ply" else types.BYTES, data=encode_gaussians(gaussians, format))
