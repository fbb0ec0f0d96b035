"""Matroska and WebM: EBML elements walked without a decoder."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from media.errors import MediaError
from media.headers import Header, Steps, cut_short, printable
from media.riff import FOURCC

_CODECS: Final = {
    b"V_MPEG4/ISO/AVC": "h264",
    b"V_MPEGH/ISO/HEVC": "hevc",
    b"V_VP8": "vp8",
    b"V_VP9": "vp9",
    b"V_AV1": "av1",
    b"V_MPEG4/ISO/SP": "mpeg4",
    b"V_MPEG4/ISO/ASP": "mpeg4",
    b"V_MPEG4/ISO/AP": "mpeg4",
    b"V_MJPEG": "mjpeg",
    b"V_FFV1": "ffv1",
}

_EBML, _DOC_TYPE = 0x1A45DFA3, 0x4282
_SEGMENT, _INFO, _TRACKS, _CLUSTER, _BLOCK_GROUP = 0x18538067, 0x1549A966, 0x1654AE6B, 0x1F43B675, 0xA0
_TRACK_ENTRY, _VIDEO, _PROJECTION = 0xAE, 0xE0, 0x7670
_TIMESTAMP_SCALE, _DURATION = 0x2AD7B1, 0x4489
_TRACK_NUMBER, _TRACK_TYPE, _CODEC_ID, _CODEC_PRIVATE = 0xD7, 0x83, 0x86, 0x63A2
_PIXEL_WIDTH, _PIXEL_HEIGHT, _ROLL = 0xB0, 0xBA, 0x7675
_BLOCK, _SIMPLE_BLOCK = 0xA1, 0xA3

# Only these are looked into; the others are stepped over. Parents may have an unknown size, so the walk is flat.
_OPENED: Final = {
    _EBML,
    _SEGMENT,
    _INFO,
    _TRACKS,
    _TRACK_ENTRY,
    _VIDEO,
    _PROJECTION,
    _CLUSTER,
    _BLOCK_GROUP,
}


@dataclass
class _Track:
    number: int = 0
    type: int = 0
    codec: bytes = b""
    private: bytes = b""
    width: int = 0
    height: int = 0
    roll: float = 0.0


def read_matroska(data: bytes) -> Header:
    """Size, duration and number of blocks of the first video track. Source: RFC 8794, RFC 9559."""
    steps = Steps("Matroska", len(data))
    at = 0
    doc_type = b""
    scale, duration = 1_000_000, 0.0
    tracks: list[_Track] = []
    blocks: dict[int, int] = {}
    while at < len(data):
        steps.take()
        ident, at = _vint(data, at, keep_marker=True)
        size, at = _vint(data, at, keep_marker=False)
        if size is None:
            # Unknown size is for live recordings: their parents are opened anyway.
            if ident not in _OPENED:
                raise MediaError("corrupt_media", "the Matroska file has an element of unknown size")
            continue
        if at + size > len(data):
            raise cut_short("Matroska")
        if ident == _TRACK_ENTRY:
            tracks.append(_Track())
        if ident in _OPENED:
            continue
        content = data[at : at + min(size, 4096)]
        if ident == _DOC_TYPE:
            doc_type = content.rstrip(b"\0")
        elif ident == _TIMESTAMP_SCALE:
            scale = int.from_bytes(content[:8], "big")
        elif ident == _DURATION:
            duration = _float(content)
        elif ident in (_BLOCK, _SIMPLE_BLOCK):
            track, _ = _vint(content, 0, keep_marker=False)
            blocks[track or 0] = blocks.get(track or 0, 0) + 1
        elif tracks:
            _set(tracks[-1], ident, content)
        at += size
    if doc_type not in (b"webm", b"matroska"):
        raise MediaError("unsupported_media_type", f"EBML document type {printable(doc_type)!r} is not offered")
    video = next((t for t in tracks if t.type == 1), None)
    if video is None:
        raise MediaError("corrupt_media", "the Matroska file has no video stream")
    frames = blocks.get(video.number, 0)
    if frames == 0:
        raise MediaError("corrupt_media", "the Matroska file's video stream has no frames")
    seconds = duration * scale / 1e9
    return Header(
        format="matroska",
        width=video.width,
        height=video.height,
        # Which way it is turned is the decoder's business; here only the sides matter.
        orientation=6 if abs(abs(video.roll) - 90) < 1 else 1,
        frames=frames,
        seconds=seconds if 0 < seconds < float("inf") else None,
        codec=_codec(video),
    )


def _vint(data: bytes, at: int, *, keep_marker: bool) -> tuple[int | None, int]:
    """A variable-length integer and the offset behind it; None for the reserved "unknown"."""
    if at >= len(data):
        raise cut_short("Matroska")
    length = 9 - data[at].bit_length()
    if length > (4 if keep_marker else 8):
        raise MediaError("corrupt_media", "the Matroska file has an element that is none")
    if at + length > len(data):
        raise cut_short("Matroska")
    value = int.from_bytes(data[at : at + length], "big")
    if not keep_marker:
        value &= (1 << 7 * length) - 1
        if value == (1 << 7 * length) - 1:
            return None, at + length
    return value, at + length


def _float(content: bytes) -> float:
    if len(content) == 4:
        return float(struct.unpack(">f", content)[0])
    if len(content) == 8:
        return float(struct.unpack(">d", content)[0])
    return 0.0


def _set(track: _Track, ident: int | None, content: bytes) -> None:
    number = int.from_bytes(content[:8], "big")
    if ident == _TRACK_NUMBER:
        track.number = number
    elif ident == _TRACK_TYPE:
        track.type = number
    elif ident == _CODEC_ID:
        track.codec = content.rstrip(b"\0")
    elif ident == _CODEC_PRIVATE:
        track.private = content
    elif ident == _PIXEL_WIDTH:
        track.width = number
    elif ident == _PIXEL_HEIGHT:
        track.height = number
    elif ident == _ROLL:
        track.roll = _float(content)


def _codec(track: _Track) -> str:
    code = track.codec
    if code == b"V_MS/VFW/FOURCC":
        code = track.private[16:20].upper()
        name = FOURCC.get(code)
    else:
        name = _CODECS.get(code)
    if name is None:
        raise MediaError("unsupported_codec", f"video codec {printable(code)!r} is not offered")
    return name
