"""What a file is, how large its picture is and how many tokens it costs, from its header alone.

No decoder library runs here: a size is believed before decoding or not at all. Everything that is not on the list
of formats is refused by name.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from media import bmff, ebml, riff
from media.asset_sniff import asset_format, check_asset_bytes, claimed_format
from media.errors import MediaError
from media.headers import Header, Steps, cut_short, unpack
from media.limits import Limits
from media.orientation import from_exif
from media.types import Fit, Kind

PATCH_FRAMES, PATCH_SIDE = 4, 16
WINDOW_FRAMES = 16
"""Frames of a clip whose tokens attend to each other."""

IMAGE_FORMATS: Final = ("png", "jpeg", "webp", "avif", "gif")
VIDEO_FORMATS: Final = ("mp4", "matroska", "avi")
OFFERED: Final = (
    "PNG, JPEG, WebP, AVIF, GIF; MP4/MOV, WebM/Matroska, AVI; GLB, glTF, OBJ, PLY, STL, OFF; a zip of posed renders or "
    "of an OBJ with its textures; voxels as npz or safetensors"
)

# Not on offer, but named in the refusal, so that the sender knows what arrived.
_OTHERS: Final = (
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"8BPS", "PSD"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"#EXTM3U", "HLS playlist"),
    (b"ffconcat", "concat script"),
    (b"OggS", "Ogg"),
    (b"FLV", "FLV"),
    (b"ID3", "MP3"),
    (b"fLaC", "FLAC"),
    (b"\x00\x00\x01\xba", "MPEG program stream"),
    (b"\x93NUMPY", "NumPy array"),
    (b"\x1f\x8b", "gzip"),
    (b"<svg", "SVG"),
    (b"<?xml", "XML or SVG"),
)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a header says. width, height: upright, pixels. frames: None if unknown. seconds: None if unknown.

    Of a 3D file it says only what it is (kind "voxels"): all numbers are 0 or None, its voxels are counted later.

    kind: what it will be decoded to. tokens: with fit=pad; None if the number of frames is unknown. codec: of a
    video container. orientation: EXIF number of what has to be done to set the stored picture upright.
    """

    format: str
    kind: Kind
    width: int
    height: int
    frames: int | None
    seconds: float | None
    tokens: int | None
    orientation: int = 1
    codec: str | None = None


def token_cost(kind: Kind, frames: int, height: int, width: int, fit: Fit = "pad") -> int:
    """Number of tokens of an image or clip. Patches are 4 frames by 16 x 16 pixels.

    fit: "pad" fills up to whole patches, "crop" drops what does not fill one. Raises MediaError for a size that
    has no token. Source: design, section 2.
    """
    if kind not in ("image", "video"):
        raise MediaError("invalid_parameter", f"token_cost is for images and videos, not {kind}")
    if frames < 1 or height < 1 or width < 1:
        raise MediaError("corrupt_media", f"a picture of {frames} x {height} x {width} has no pixels")
    if fit == "pad":
        return -(-frames // PATCH_FRAMES) * -(-height // PATCH_SIDE) * -(-width // PATCH_SIDE)
    if min(height, width) < PATCH_SIDE:
        raise MediaError(
            "image_too_small",
            f"with fit=crop both sides must be at least {PATCH_SIDE} pixels, not {height} x {width}; use fit=pad",
            limit=PATCH_SIDE,
            actual=min(height, width),
        )
    # A single image fills one slot; a clip shorter than that is one slot too.
    return max(1, frames // PATCH_FRAMES) * (height // PATCH_SIDE) * (width // PATCH_SIDE)


def probe(data: bytes, limits: Limits, *, declared: str | None = None, max_frames: int | None = None) -> Probe:
    """Recognise a file by its content and check it against the limits, without decoding it.

    declared: what the sender says that it is: a kind ("image", "video", "model") or a media type ("image/png"). Only
    the kind is compared: a PNG called image/jpeg is fine, a PNG called video is not. An animated GIF, WebP, PNG or
    AVIF is an image (its first frame) unless it is declared as a video. What has no magic number (STL, OBJ) is what it
    is declared as if it is nothing else.
    max_frames: only so many frames will be kept, so that a longer clip is no reason to refuse. Raises MediaError.
    """
    if not data:
        raise MediaError("corrupt_media", "the file is empty")
    asset = asset_format(data)
    format_name = None if asset else _format(data)
    if asset is None and format_name is None:
        asset = claimed_format(data, declared)
    if asset is not None:
        _check_declared_asset(declared, asset)
        check_asset_bytes(len(data), asset, limits)
        return Probe(format=asset, kind="voxels", width=0, height=0, frames=None, seconds=None, tokens=None)
    if format_name is None:
        raise _refusal(None)
    is_video = format_name in VIDEO_FORMATS
    _check_bytes(len(data), limits, is_video)
    try:
        header = _READERS[format_name](data)
    except (IndexError, ValueError, OverflowError, struct.error):
        raise MediaError("corrupt_media", f"the {format_name} file's header is damaged") from None
    kind = _kind(header, is_video, declared)
    if kind == "video" and not is_video:
        _check_bytes(len(data), limits, is_video=True)
    return _checked(header, kind, limits, max_frames)


def check_size(kind: Literal["image", "video"], frames: int, height: int, width: int, limits: Limits) -> int:
    """Check an upright size against the limits; returns the tokens. Used before decoding and again after it."""
    if width < 1 or height < 1:
        raise MediaError("corrupt_media", f"the {kind} says that it is {width} x {height} pixels")
    pixels, most = width * height, limits.image_pixels if kind == "image" else limits.frame_pixels
    if pixels > most:
        what = "the image" if kind == "image" else "a frame of the video"
        raise MediaError(
            "image_too_large",
            f"{what} is {width} x {height} pixels; at most {most} pixels are allowed",
            limit=most,
            actual=pixels,
        )
    if max(width, height) > limits.image_side:
        raise MediaError(
            "image_too_large",
            f"the {kind} is {width} x {height} pixels; at most {limits.image_side} a side are allowed",
            limit=limits.image_side,
            actual=max(width, height),
        )
    check_frames(frames, limits)
    tokens = token_cost(kind, frames, height, width)
    if tokens > limits.item_tokens:
        room = min(limits.item_tokens, limits.window_tokens) * PATCH_SIDE**2
        what, advice = "the image", f"shrink it to about {room} pixels in all (16 x 16 pixels a token)"
        if kind == "video":
            what, advice = f"the clip of {frames} frames", "send fewer or smaller frames"
        raise MediaError(
            "too_many_tokens",
            f"{what} of {width} x {height} pixels has {tokens} tokens, at most {limits.item_tokens} are allowed: "
            f"{advice}",
            limit=limits.item_tokens,
            actual=tokens,
        )
    together = min(frames, WINDOW_FRAMES)
    window = token_cost(kind, together, height, width)
    if window > limits.window_tokens:
        room = limits.window_tokens // -(-together // PATCH_FRAMES) * PATCH_SIDE**2
        if kind == "image":
            what, advice = "the image", f"shrink it to about {room} pixels in all (16 x 16 pixels a token)"
        else:
            what = f"a window of {together} frames"
            advice = f"shrink each frame to about {room} pixels in all (a token is 4 frames of 16 x 16 pixels)"
        raise MediaError(
            "too_many_tokens",
            f"{what} of {width} x {height} pixels has {window} tokens, at most {limits.window_tokens} may attend to "
            f"each other: {advice}",
            limit=limits.window_tokens,
            actual=window,
        )
    if 3 * pixels * frames > limits.decode_bytes:
        raise MediaError(
            "item_too_large",
            f"{frames} frames of {width} x {height} are more bytes than one item may decode to",
            limit=limits.decode_bytes,
            actual=3 * pixels * frames,
        )
    return tokens


def check_voxels(count: int, limits: Limits) -> None:
    """Raise MediaError for a voxel set of more tokens than may attend to each other: all of it is one window."""
    most = min(limits.window_tokens, limits.item_tokens)
    if count > most:
        raise MediaError(
            "too_many_tokens",
            f"the object fills {count} voxels, a token each; at most {most} may attend to each other",
            limit=most,
            actual=count,
        )


def check_frames(frames: int, limits: Limits) -> None:
    """Raise MediaError if a clip has more frames than may be decoded or used."""
    most = min(limits.frames_decoded, limits.frames_used)
    if frames > most:
        raise MediaError(
            "too_many_frames",
            f"the clip has {frames} frames or more; at most {most} are allowed",
            limit=most,
            actual=frames,
        )


def check_seconds(seconds: float, limits: Limits) -> None:
    """Raise MediaError if a clip is longer than allowed."""
    if seconds > limits.video_seconds:
        raise MediaError(
            "video_too_long",
            f"the clip lasts {seconds:.1f} s; at most {limits.video_seconds:g} s are allowed",
            limit=limits.video_seconds,
            actual=round(seconds, 3),
        )


def _check_bytes(size: int, limits: Limits, is_video: bool) -> None:
    most = limits.video_bytes if is_video else limits.image_bytes
    if size > most:
        kind = "video" if is_video else "image"
        raise MediaError(
            "item_too_large", f"the {kind} file has {size} bytes; at most {most} are allowed", limit=most, actual=size
        )


def _kind(header: Header, is_video: bool, declared: str | None) -> Literal["image", "video"]:
    named = (declared or "").split("/")[0].strip().lower()
    # A browser or curl may say "application/octet-stream" of anything.
    if named in ("", "application"):
        return "video" if is_video else "image"
    if named == "video" and (is_video or header.frames != 1):
        return "video"
    if named == "image" and not is_video:
        return "image"
    raise MediaError(
        "media_type_mismatch",
        f"the file was declared as {named[:32]!r} but is {'a video' if is_video else 'an image'} ({header.format})",
    )


def _check_declared_asset(declared: str | None, format_name: str) -> None:
    named = (declared or "").split("/")[0].strip().lower()
    if named in ("image", "video"):
        raise MediaError(
            "media_type_mismatch", f"the file was declared as {named!r} but is a 3D file or archive ({format_name})"
        )


def _checked(header: Header, kind: Literal["image", "video"], limits: Limits, max_frames: int | None) -> Probe:
    height, width = header.upright_size
    frames = 1 if kind == "image" else header.frames
    if frames is not None and max_frames is not None:
        frames = min(frames, max_frames)
    if kind == "video" and header.seconds is not None:
        check_seconds(header.seconds, limits)
    tokens = check_size(kind, frames or 1, height, width, limits)
    return Probe(
        format=header.format,
        kind=kind,
        width=width,
        height=height,
        frames=header.frames,
        seconds=header.seconds,
        tokens=tokens if frames is not None else None,
        orientation=header.orientation,
        codec=header.codec,
    )


def _format(data: bytes) -> str | None:
    """None if it is unknown. Raises MediaError for what is known and not on offer."""
    start = data[:32]
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if start.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if start.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "webp"
    if start[:4] == b"RIFF" and start[8:12] == b"AVI ":
        return "avi"
    if start.startswith(b"\x1aE\xdf\xa3"):
        return "matroska"
    if start[4:8] == b"ftyp":
        found = bmff.brands(data)
        if bmff.is_avif(found):
            return "avif"
        if bmff.is_heif(found):
            raise _refusal("HEIC")
        return "mp4"
    for magic, name in _OTHERS:
        if start.startswith(magic):
            raise _refusal(name)
    return None


def _refusal(name: str | None) -> MediaError:
    what = f"the format {name} is not offered" if name else "the file is in no format that is offered"
    return MediaError("unsupported_media_type", f"{what}; send one of {OFFERED}")


def _read_png(data: bytes) -> Header:
    if data[12:16] != b"IHDR":
        raise MediaError("corrupt_media", "the PNG file does not start with its header")
    width, height = unpack(">II", data, 16)
    frames, orientation = 1, 1
    at, steps, name = 8, Steps("PNG", len(data)), b""
    while name != b"IEND":
        steps.take()
        if at + 12 > len(data):
            raise cut_short("PNG")
        (size,) = unpack(">I", data, at)
        name = data[at + 4 : at + 8]
        if at + 12 + size > len(data):
            raise cut_short("PNG")
        if name == b"acTL":
            frames = max(1, unpack(">I", data, at + 8)[0])
        elif name == b"eXIf":
            orientation = from_exif(data[at + 8 : at + 8 + size])
        at += 12 + size
    return Header(format="png", width=width, height=height, orientation=orientation, frames=frames)


def _read_jpeg(data: bytes) -> Header:
    size: tuple[int, int] | None = None
    orientation = 1
    at, steps = 2, Steps("JPEG", len(data))
    while True:
        steps.take()
        mark, code = unpack(">BB", data, at)
        if mark != 0xFF:
            raise MediaError("corrupt_media", "the JPEG file's header is damaged")
        if code == 0xFF:  # fill byte
            at += 1
            continue
        if code == 0x01 or 0xD0 <= code <= 0xD7:  # these stand alone
            at += 2
            continue
        (length,) = unpack(">H", data, at + 2)
        if code == 0xD9 or length < 2:
            raise MediaError("corrupt_media", "the JPEG file ends before its picture")
        if at + 2 + length > len(data):
            raise cut_short("JPEG")
        if code == 0xDA:  # the picture's data starts
            break
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            if size is not None:
                raise MediaError("corrupt_media", "the JPEG file has two headers")
            precision, height, width = unpack(">BHH", data, at + 4)
            if precision != 8:
                raise MediaError("unsupported_codec", f"a JPEG of {precision} bits is not offered, only 8 bits")
            size = (width, height)
        elif code == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = from_exif(data[at + 10 : at + 2 + length])
        at += 2 + length
    if size is None:
        raise MediaError("corrupt_media", "the JPEG file does not say how large its picture is")
    return Header(format="jpeg", width=size[0], height=size[1], orientation=orientation)


def _read_gif(data: bytes) -> Header:
    width, height, flags = unpack("<HHB", data, 6)
    at = 13 + _gif_colours(flags)
    frames, steps = 0, Steps("GIF", len(data))
    while at < len(data) and data[at] != 0x3B:
        steps.take()
        if data[at] == 0x21:  # extension: one label, then sub-blocks
            at = _gif_skip(data, at + 2, steps)
        elif data[at] == 0x2C:
            left, top, frame_width, frame_height, flags = unpack("<HHHHB", data, at + 1)
            if frames == 0:
                # Decoders widen the screen where the first frame is larger.
                width, height = max(width, left + frame_width), max(height, top + frame_height)
            frames += 1
            at = _gif_skip(data, at + 11 + _gif_colours(flags), steps)
        elif data[at] == 0x00:  # stray terminator, common in old files
            at += 1
        else:
            raise MediaError("corrupt_media", "the GIF file has a block of an unknown kind")
    if frames == 0:
        raise MediaError("corrupt_media", "the GIF file holds no picture")
    return Header(format="gif", width=width, height=height, frames=frames)


def _gif_colours(flags: int) -> int:
    """Size in bytes of the colour table that the flags announce."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _gif_skip(data: bytes, at: int, steps: Steps) -> int:
    while True:
        steps.take()
        if at >= len(data):
            raise cut_short("GIF")
        length = data[at]
        at += 1 + length
        if length == 0:
            return at


_READERS: Final[dict[str, Callable[[bytes], Header]]] = {
    "png": _read_png,
    "jpeg": _read_jpeg,
    "gif": _read_gif,
    "webp": riff.read_webp,
    "avif": bmff.read_avif,
    "mp4": bmff.read_mp4,
    "matroska": ebml.read_matroska,
    "avi": riff.read_avi,
}
