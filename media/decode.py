"""The one function that turns a file into arrays: what the API runs in a child process."""

from __future__ import annotations

from media.image import decode_probed_animation, decode_probed_image
from media.limits import Limits
from media.sniff import IMAGE_FORMATS, probe
from media.types import Image, Video
from media.video import decode_probed_video


def decode_media(data: bytes, limits: Limits, declared: str | None = None) -> Image | Video:
    """Recognise, check and decode one image or clip.

    declared: a kind or media type, as in media.sniff.probe. Raises MediaError.
    """
    header = probe(data, limits, declared=declared)
    if header.kind == "image":
        return decode_probed_image(data, header, limits)
    if header.format in IMAGE_FORMATS:
        return decode_probed_animation(data, header, limits)
    return decode_probed_video(data, header, limits)
