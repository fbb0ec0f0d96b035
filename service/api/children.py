"""Pictures and clips to arrays and back, in the decoder children: a codec's crash or bomb stays out of this process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from media.decode import decode_media
from media.errors import MediaError
from media.image import encode_image
from media.types import Asset, Image, UInt8Array, Video
from media.video import encode_video
from service.api import negotiation as types
from service.api.core import Service
from service.api.record import Record
from service.api.uploads import Upload

IMAGE_FORMATS: dict[str, Literal["png", "webp", "jpeg"]] = {types.PNG: "png", types.WEBP: "webp", types.JPEG: "jpeg"}
CLIP_FORMATS: dict[str, Literal["mp4", "mkv"]] = {types.MP4: "mp4", types.MKV: "mkv"}
DEFAULT_QUALITY = 90


@dataclass(frozen=True, kw_only=True)
class File:
    """A written picture or clip."""

    media_type: str
    data: bytes


def file_types(kind: str, frames: int) -> list[str]:
    """Return the media types that pixels can be given as, the default first; a clip of one frame is a picture too."""
    if kind == "image":
        return list(IMAGE_FORMATS)
    return [*CLIP_FORMATS, *IMAGE_FORMATS] if frames == 1 else list(CLIP_FORMATS)


async def read(
    service: Service,
    record: Record,
    upload: Upload,
    *,
    up: Literal["y", "z"] | None = None,
    with_pictures: bool = False,
) -> Image | Video | Asset:
    """Decode one upload. Waits for a free child; raises MediaError. up, with_pictures: of 3D files."""
    outcome = "ok"
    try:
        async with service.children:
            with record.stage("decode"):
                item = await service.media.run(
                    decode_media, upload.data, service.settings.media, upload.declared, up, with_pictures
                )
    except MediaError as error:
        outcome = error.code
        raise
    finally:
        service.telemetry.decode_exits.labels(outcome).inc()
    assert isinstance(item, Image | Video | Asset)
    return item


async def write(
    service: Service, pixels: UInt8Array, fps: float | None, media_type: str, quality: int = DEFAULT_QUALITY
) -> File:
    """Write uint8 [T, H, W, 3] as a picture (its first frame) or a clip. Raises MediaError.

    quality: 1..100, of JPEG and WebP (100: lossless).
    """
    async with service.children:
        if media_type in IMAGE_FORMATS:
            data = await service.media.run(encode_image, pixels[0], IMAGE_FORMATS[media_type], quality)
        else:
            data = await service.media.run(encode_video, pixels, fps, CLIP_FORMATS[media_type])
    return File(media_type=media_type, data=data)


async def write_all(
    service: Service, clips: Sequence[tuple[str, UInt8Array, float | None] | None], quality: int = DEFAULT_QUALITY
) -> list[File | None]:
    """Write several (kind, pixels, fps), each in the default type of its kind; None stays None."""

    async def one(clip: tuple[str, UInt8Array, float | None] | None) -> File | None:
        if clip is None:
            return None
        kind, pixels, fps = clip
        return await write(service, pixels, fps, file_types(kind, len(pixels))[0], quality)

    return list(await asyncio.gather(*map(one, clips)))
