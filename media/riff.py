"""RIFF files (WebP, AVI): chunks walked without a decoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final, NamedTuple

from media.errors import MediaError
from media.headers import Header, Steps, cut_short, printable, unpack
from media.orientation import from_exif

FOURCC: Final = {
    b"H264": "h264",
    b"X264": "h264",
    b"AVC1": "h264",
    b"H265": "hevc",
    b"HEVC": "hevc",
    b"HVC1": "hevc",
    b"VP80": "vp8",
    b"VP90": "vp9",
    b"AV01": "av1",
    b"FMP4": "mpeg4",
    b"MP4V": "mpeg4",
    b"DIVX": "mpeg4",
    b"DX50": "mpeg4",
    b"XVID": "mpeg4",
    b"MJPG": "mjpeg",
    b"FFV1": "ffv1",
    b"CVID": "cinepak",
}
"""Codec of a Windows four-letter code, upper case; Matroska uses it too."""


class Chunk(NamedTuple):
    """One chunk: its four letters (a list: the letters of its type) and where its content lies."""

    name: bytes
    start: int
    end: int
    is_list: bool = False


def chunks(data: bytes, start: int, end: int, steps: Steps, what: str) -> Iterator[Chunk]:
    """The chunks between two offsets; contents are padded to even lengths."""
    at = start
    while at + 8 <= end:
        steps.take()
        name = bytes(data[at : at + 4])
        (size,) = unpack("<I", data, at + 4)
        if at + 8 + size > end:
            raise cut_short(what)
        if name in (b"LIST", b"RIFF") and size >= 4:
            yield Chunk(bytes(data[at + 8 : at + 12]), at + 12, at + 8 + size, is_list=True)
        else:
            yield Chunk(name, at + 8, at + 8 + size)
        at += 8 + size + (size & 1)


def read_webp(data: bytes) -> Header:
    """Canvas, orientation and frame count of a WebP. Source: RFC 9649."""
    (size,) = unpack("<I", data, 4)
    if 8 + size > len(data):
        raise cut_short("WebP")
    canvas: tuple[int, int] | None = None
    frames, orientation = 0, 1
    for chunk in chunks(data, 12, 8 + size, Steps("WebP", len(data)), "WebP"):
        if chunk.name == b"VP8X":
            low_w, high_w, low_h, high_h = unpack("<HBHB", data, chunk.start + 4)
            canvas = (1 + (low_w | high_w << 16), 1 + (low_h | high_h << 16))
        elif chunk.name == b"VP8 ":
            frames = max(frames, 1)
            tag, mark, width, height = _vp8(data, chunk.start)
            if tag & 1 or mark != 0x2A019D:
                raise MediaError("corrupt_media", "the WebP picture does not start with a key frame")
            canvas = _same_size(canvas, (width & 0x3FFF, height & 0x3FFF))
        elif chunk.name == b"VP8L":
            frames = max(frames, 1)
            mark, bits = unpack("<BI", data, chunk.start)
            if mark != 0x2F:
                raise MediaError("corrupt_media", "the lossless WebP picture has a wrong signature")
            canvas = _same_size(canvas, (1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)))
        elif chunk.name == b"ANMF":
            frames += 1
        elif chunk.name == b"EXIF":
            block = data[chunk.start : chunk.end]
            orientation = from_exif(block.removeprefix(b"Exif\0\0"))
    if canvas is None or frames == 0:
        raise MediaError("corrupt_media", "the WebP file holds no picture")
    return Header(format="webp", width=canvas[0], height=canvas[1], orientation=orientation, frames=frames)


def _vp8(data: bytes, at: int) -> tuple[int, ...]:
    first, _, _, m0, m1, m2, width, height = unpack("<6BHH", data, at)
    return first, m0 | m1 << 8 | m2 << 16, width, height


def _same_size(canvas: tuple[int, int] | None, size: tuple[int, int]) -> tuple[int, int]:
    if canvas is not None and canvas != size:
        raise MediaError("corrupt_media", "the WebP picture's size differs from its canvas")
    return size


def read_avi(data: bytes) -> Header:
    """Size, duration and frame count of an AVI file's video stream. Frames are the chunks that are not empty."""
    steps = Steps("AVI", len(data))
    (size,) = unpack("<I", data, 4)
    end = 8 + size
    if end > len(data):
        raise cut_short("AVI")
    # Files above 1 GB go on in further RIFF chunks; anything else behind the first is not ours to judge.
    while data[end : end + 4] == b"RIFF" and data[end + 8 : end + 12] == b"AVIX":
        end += 8 + unpack("<I", data, end + 4)[0]
        if end > len(data):
            raise cut_short("AVI")
    header: Header | None = None
    streams, frames = 0, 0
    names: tuple[bytes, ...] = ()
    pending = [chunk for chunk in chunks(data, 0, end, steps, "AVI") if chunk.is_list]
    pending.reverse()
    while pending:
        part = pending.pop()
        if part.name == b"strl":
            found = _read_stream(data, part, steps)
            if found is not None and header is None:
                header = found
                names = (b"%02ddc" % streams, b"%02ddb" % streams)
            streams += 1
        elif part.name in (b"AVI ", b"AVIX", b"hdrl", b"movi", b"rec "):
            inner = list(chunks(data, part.start, part.end, steps, "AVI"))
            frames += sum(chunk.name in names and chunk.end > chunk.start for chunk in inner)
            pending.extend(chunk for chunk in reversed(inner) if chunk.is_list)
    if header is None:
        raise MediaError("corrupt_media", "the AVI file has no video stream")
    if frames == 0:
        raise MediaError("corrupt_media", "the AVI file's video stream has no frames")
    return replace(header, frames=frames)


def _read_stream(data: bytes, stream: Chunk, steps: Steps) -> Header | None:
    kind, codec = b"", b""
    scale = rate = length = width = height = 0
    for chunk in chunks(data, stream.start, stream.end, steps, "AVI"):
        if chunk.name == b"strh":
            kind = bytes(data[chunk.start : chunk.start + 4])
            scale, rate, _, length = unpack("<IIII", data, chunk.start + 20)
        elif chunk.name == b"strf" and kind == b"vids":
            _, width, height = unpack("<Iii", data, chunk.start)
            codec = bytes(data[chunk.start + 16 : chunk.start + 20])
    if kind == b"auds":
        return None
    if kind != b"vids":
        # Subtitle streams would start further parsers inside the decoder.
        raise MediaError("unsupported_codec", f"an AVI stream of type {printable(kind)!r} is not offered")
    if codec.upper() not in FOURCC:
        raise MediaError("unsupported_codec", f"video codec {printable(codec)!r} is not offered")
    seconds = length * scale / rate if rate else None
    # A negative height says that rows run from top to bottom; it is the same picture to every codec on offer.
    return Header(
        format="avi",
        width=abs(width),
        height=abs(height),
        frames=length,
        seconds=seconds,
        codec=FOURCC[codec.upper()],
    )
