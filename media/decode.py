"""The one function that turns a file into arrays: what the API runs in a child process."""

from __future__ import annotations

from typing import Literal

from media.image import decode_probed_animation, decode_probed_image
from media.limits import Limits
from media.sniff import IMAGE_FORMATS, probe
from media.types import Asset, Image, Video
from media.video import decode_probed_video


def decode_media(
    data: bytes,
    limits: Limits,
    declared: str | None = None,
    up: Literal["y", "z"] | None = None,
    with_pictures: bool = False,
) -> Image | Video | Asset:
    """Recognise, check and decode one image, clip or 3D asset.

    declared: a kind or media type, as in media.sniff.probe. up, with_pictures: of 3D files, as in media.asset.
    Raises MediaError.
    """
    header = probe(data, limits, declared=declared)
    if header.kind == "voxels":
        from media.asset import decode_asset  # what draws meshes is large, and most children never see one

        return decode_asset(data, header.format, limits, up=up, with_pictures=with_pictures)
    if header.kind == "image":
        return decode_probed_image(data, header, limits)
    if header.format in IMAGE_FORMATS:
        return decode_probed_animation(data, header, limits)
    return decode_probed_video(data, header, limits)
