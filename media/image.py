"""Image files <-> uint8 arrays, with Pillow. Strangers' files belong into a child process (media.pool)."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Literal, TypeAlias

import numpy as np

# Importing the five plugins registers them; Pillow would import its forty others on meeting the first WebP.
from PIL import AvifImagePlugin, GifImagePlugin, ImageCms, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from PIL import Image as PILImage

from media.errors import MediaError
from media.limits import Limits
from media.orientation import upright
from media.sniff import IMAGE_FORMATS, Probe, check_frames, check_size, probe
from media.types import Image, UInt8Array, Video

ImageFormat: TypeAlias = Literal["png", "webp", "jpeg"]

_PLUGINS: Final = {
    "png": PngImagePlugin.PngImageFile.format,
    "jpeg": JpegImagePlugin.JpegImageFile.format,
    "webp": WebPImagePlugin.WebPImageFile.format,
    "avif": AvifImagePlugin.AvifImageFile.format,
    "gif": GifImagePlugin.GifImageFile.format,
}
# Longest side that a format can hold.
_MAX_SIDE: Final = {"png": 2**31 - 1, "webp": 16_383, "jpeg": 65_535}


def decode_image(data: bytes, limits: Limits) -> Image:
    """Decode PNG, JPEG, WebP, AVIF or GIF to upright RGB; of an animation, the first frame.

    16-bit values are scaled, alpha is laid over white, CMYK and colour profiles converted to sRGB; what a sender
    may not expect is in the notes. Raises MediaError.
    """
    return decode_probed_image(data, probe(data, limits, declared="image"), limits)


def decode_probed_image(data: bytes, header: Probe, limits: Limits) -> Image:
    """decode_image for a caller who has the probe already."""
    notes: list[str] = []
    with _opened(data, header, limits) as picture:
        pixels = upright(_to_rgb(picture, notes), header.orientation)
    _check_shape(pixels, header)
    if header.frames != 1:
        notes.append(f"first of {header.frames} frames")
    return Image(pixels=pixels, notes=tuple(notes))


def decode_rgba(data: bytes, limits: Limits) -> UInt8Array:
    """Decode a picture and keep its alpha: uint8 [H, W, 4], straight alpha, or [H, W, 3] where it has none.

    For textures and posed renders; otherwise as decode_image. Raises MediaError.
    """
    header = probe(data, limits, declared="image")
    with _opened(data, header, limits) as picture:
        has_alpha = picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info
        if has_alpha and not picture.mode.startswith("I"):
            pixels = np.asarray(picture.convert("RGBA"))
        else:
            pixels = _to_rgb(picture, [])
        return upright(pixels, header.orientation)


def decode_animation(data: bytes, limits: Limits, *, max_frames: int | None = None) -> Video:
    """Decode all frames of an animated GIF, WebP, PNG or AVIF; fps is their average rate. Raises MediaError."""
    return decode_probed_animation(
        data, probe(data, limits, declared="video", max_frames=max_frames), limits, max_frames
    )


def decode_probed_animation(data: bytes, header: Probe, limits: Limits, max_frames: int | None = None) -> Video:
    """decode_animation for a caller who has the probe already."""
    notes: list[str] = []
    frames: list[UInt8Array] = []
    milliseconds: list[float] = []
    with _opened(data, header, limits) as picture:
        announced = int(getattr(picture, "n_frames", 1))
        for number in range(announced):
            if max_frames is not None and number == max_frames:
                notes.append(f"first {max_frames} of {announced} frames")
                break
            check_frames(number + 1, limits)
            picture.seek(number)
            pixels = upright(_to_rgb(picture, notes), header.orientation)
            _check_shape(pixels, header)
            frames.append(pixels)
            milliseconds.append(float(picture.info.get("duration", 0) or 0))
    check_size("video", len(frames), header.height, header.width, limits)
    total = sum(milliseconds)
    fps = 1000.0 * len(frames) / total if total > 0 else None
    if fps is not None and max(milliseconds) - min(milliseconds) > 10.0:
        notes.append(
            f"variable frame rate ({min(milliseconds):.0f} to {max(milliseconds):.0f} ms a frame): "
            "every frame is kept, fps is the average"
        )
    return Video(frames=np.stack(frames), fps=fps, notes=tuple(dict.fromkeys(notes)))


def encode_image(pixels: UInt8Array, format: ImageFormat = "png", quality: int = 90) -> bytes:
    """Encode pixels uint8 [H, W, 3] RGB. quality: 1..100 for WebP and JPEG; WebP at 100 is lossless, PNG always is.

    Raises MediaError for another shape, type, format or quality.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise MediaError("invalid_parameter", f"pixels must be uint8 [H, W, 3], not {pixels.dtype} {pixels.shape}")
    if format not in _MAX_SIDE:
        raise MediaError("invalid_parameter", f"image format {format!r} is not one of {', '.join(_MAX_SIDE)}")
    if not 1 <= quality <= 100:
        raise MediaError("invalid_parameter", f"quality must be 1 to 100, not {quality}", limit=100, actual=quality)
    side = max(pixels.shape[:2])
    if side > _MAX_SIDE[format]:
        raise MediaError(
            "invalid_parameter",
            f"{format} holds at most {_MAX_SIDE[format]} pixels a side, not {side}; use png",
            limit=_MAX_SIDE[format],
            actual=side,
        )
    picture = PILImage.fromarray(np.ascontiguousarray(pixels), "RGB")
    out = io.BytesIO()
    if format == "png":
        picture.save(out, "PNG")
    elif format == "webp":
        picture.save(out, "WEBP", quality=quality, lossless=quality == 100)
    else:
        # subsampling 0 = 4:4:4: halved chroma is visible in reconstructions of drawings and text.
        picture.save(out, "JPEG", quality=quality, subsampling=0)
    return out.getvalue()


@contextmanager
def _opened(data: bytes, header: Probe, limits: Limits) -> Iterator[PILImage.Image]:
    """Open with the one plugin that the header calls for; every failure of Pillow becomes a MediaError."""
    if header.format not in IMAGE_FORMATS:
        raise MediaError("media_type_mismatch", f"the file is a video ({header.format}), not an image")
    plugin = _PLUGINS[header.format]
    # Pillow's own guard as a second fence behind our check of the header.
    PILImage.MAX_IMAGE_PIXELS = limits.image_pixels
    try:
        with warnings.catch_warnings():
            # Broken EXIF and the like; what matters is checked here.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", PILImage.DecompressionBombWarning)
            with PILImage.open(io.BytesIO(data), formats=(plugin or "",)) as picture:
                stored = (header.width, header.height)
                if picture.size not in (stored, stored[::-1]):
                    raise MediaError(
                        "corrupt_media", f"the {header.format} file's header and content disagree on its size"
                    )
                yield picture
    except MediaError:
        raise
    except MemoryError:
        raise MediaError("decode_limit", "the image needs more memory than a decoder may take") from None
    except Exception:
        raise MediaError("corrupt_media", f"the {header.format} data is damaged or cut short") from None


def _to_rgb(picture: PILImage.Image, notes: list[str]) -> UInt8Array:
    """The current frame as uint8 [H, W, 3], not yet upright."""
    picture.load()
    mode = picture.mode
    if mode.startswith("I"):
        # 16-bit grey, in one of four byte orders.
        wide = np.asarray(picture).astype(np.uint32).clip(0, 65_535)
        grey = ((wide * 255 + 32_767) // 65_535).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    profile = picture.info.get("icc_profile") or b""
    if mode in ("LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
    if picture.mode == "RGBA":
        lowest = picture.getchannel("A").getextrema()[0]
        if isinstance(lowest, (int, float)) and lowest < 255:
            notes.append("transparency laid over white")
            white = PILImage.new("RGBA", picture.size, (255, 255, 255, 255))
            picture = PILImage.alpha_composite(white, picture)
        picture = picture.convert("RGB")
    if picture.mode not in ("RGB", "CMYK", "L"):
        picture = picture.convert("RGB")
    if profile and b"sRGB" not in profile.replace(b"\0", b""):
        picture = _to_srgb(picture, profile, notes)
    elif picture.mode == "CMYK":
        notes.append("CMYK without a colour profile converted to RGB by its plain formula")
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))


def _to_srgb(picture: PILImage.Image, profile: bytes, notes: list[str]) -> PILImage.Image:
    """Convert from the embedded profile; a profile that cannot be used is ignored, with a note."""
    try:
        converted = ImageCms.profileToProfile(
            picture, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        converted = None
    if converted is None:
        notes.append("embedded colour profile ignored: it cannot be used; the values are taken as sRGB")
        return picture
    notes.append("converted from the embedded colour profile to sRGB")
    return converted


def _check_shape(pixels: UInt8Array, header: Probe) -> None:
    if pixels.shape != (header.height, header.width, 3):
        raise MediaError("corrupt_media", f"the {header.format} file's header and content disagree on its size")
