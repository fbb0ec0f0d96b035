"""ISO base media files (MP4, MOV, AVIF): boxes walked without a decoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np

from media.errors import MediaError
from media.headers import Header, Steps, cut_short, printable, unpack
from media.orientation import from_matrix, from_turn_and_mirror

_CODECS: Final = {
    b"avc1": "h264",
    b"avc3": "h264",
    b"hvc1": "hevc",
    b"hev1": "hevc",
    b"vp08": "vp8",
    b"vp09": "vp9",
    b"av01": "av1",
    b"mp4v": "mpeg4",
    b"jpeg": "mjpeg",
    b"mjpg": "mjpeg",
    b"MJPG": "mjpeg",
    b"FFV1": "ffv1",
    b"cvid": "cinepak",
}
_HEIF_BRANDS: Final = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}


class Box(NamedTuple):
    """One box: its four letters and where its content lies in the file."""

    name: bytes
    start: int
    end: int


def boxes(data: bytes, start: int, end: int, steps: Steps) -> Iterator[Box]:
    """The boxes between two offsets. A box that runs past the end means a file cut short."""
    at = start
    # Fewer than 8 bytes left over are padding.
    while at + 8 <= end:
        steps.take()
        size, name = int.from_bytes(data[at : at + 4], "big"), bytes(data[at + 4 : at + 8])
        head = 8
        if size == 1:
            size, head = unpack(">Q", data, at + 8)[0], 16
        elif size == 0:
            size = end - at
        if size < head:
            raise MediaError("corrupt_media", "the MP4 or AVIF file has a box smaller than its own header")
        if at + size > end:
            raise cut_short("MP4 or AVIF")
        yield Box(name, at + head, at + size)
        at += size


def brands(data: bytes) -> set[bytes]:
    """The major and compatible brands of a file that starts with an ftyp box."""
    (size,) = unpack(">I", data, 0)
    size = min(size, 4096, len(data))
    return {data[8:12], *(data[at : at + 4] for at in range(16, size - 3, 4))}


def is_avif(found: set[bytes]) -> bool:
    """Whether the brands are those of an AVIF picture or picture sequence."""
    return bool(found & {b"avif", b"avis"})


def is_heif(found: set[bytes]) -> bool:
    """Whether the brands are those of HEIC or another picture in a HEIF file that is no AVIF."""
    return bool(found & _HEIF_BRANDS) and not is_avif(found)


def read_avif(data: bytes) -> Header:
    """Size and orientation of an AVIF's primary picture, and the largest picture inside. Source: ISO/IEC 23008-12."""
    steps = Steps("AVIF", len(data))
    primary: int | None = None
    properties: list[Box] = []
    of_primary: list[int] = []
    associations: dict[int, list[int]] = {}
    frames = 1
    for box in boxes(data, 0, len(data), steps):
        if box.name == b"moov":
            # An image sequence holds its frames in a track, the same as a clip.
            track = next((t for t in _read_moov(data, box, steps).tracks if t.handler in (b"pict", b"vide")), None)
            frames = max(1, track.frames) if track else 1
        if box.name != b"meta":
            continue
        for part in boxes(data, box.start + 4, box.end, steps):
            if part.name == b"pitm":
                version = data[part.start]
                primary = unpack(">I" if version else ">H", data, part.start + 4)[0]
            elif part.name == b"iprp":
                for inner in boxes(data, part.start, part.end, steps):
                    if inner.name == b"ipco":
                        properties = list(boxes(data, inner.start, inner.end, steps))
                    elif inner.name == b"ipma":
                        associations.update(_read_ipma(data, inner, steps))
    if primary is not None:
        of_primary = associations.get(primary, [])
    size: tuple[int, int] | None = None
    turns, mirror_columns, mirror_rows = 0, False, False
    largest = 0
    for number, prop in enumerate(properties, start=1):
        if prop.name == b"ispe":
            width, height = unpack(">II", data, prop.start + 4)
            largest = max(largest, width * height)
            if number in of_primary:
                size = (width, height)
        elif number in of_primary and prop.name == b"irot":
            turns = unpack(">B", data, prop.start)[0] & 3
        elif number in of_primary and prop.name == b"imir":
            mirror_columns = bool(unpack(">B", data, prop.start)[0] & 1)
            mirror_rows = not mirror_columns
        elif number in of_primary and prop.name == b"clap":
            raise MediaError("unsupported_codec", "this AVIF has a clean aperture (a crop), which is not supported")
    if size is None:
        raise MediaError("corrupt_media", "the AVIF file does not say how large its picture is")
    if size[0] * size[1] < largest:
        # Tiles, alpha and depth are never larger than the picture; a decoder would allocate by the largest.
        raise MediaError("corrupt_media", "the AVIF file holds a part larger than its picture")
    orientation = from_turn_and_mirror(turns, mirror_columns, mirror_rows)
    return Header(format="avif", width=size[0], height=size[1], orientation=orientation, frames=frames)


def _read_ipma(data: bytes, box: Box, steps: Steps) -> dict[int, list[int]]:
    version, wide = data[box.start], bool(data[box.start + 3] & 1)
    (count,) = unpack(">I", data, box.start + 4)
    at = box.start + 8
    found: dict[int, list[int]] = {}
    for _ in range(count):
        steps.take()
        item, number = unpack(">IB" if version else ">HB", data, at)
        at += 5 if version else 3
        entries = unpack(f">{number}H" if wide else f">{number}B", data, at)
        at += number * (2 if wide else 1)
        found[item] = [entry & (0x7FFF if wide else 0x7F) for entry in entries]
        if at > box.end:
            raise cut_short("AVIF")
    return found


@dataclass
class _Track:
    number: int = 0
    handler: bytes = b""
    codec: bytes = b""
    width: int = 0
    height: int = 0
    matrix: tuple[float, float, float, float] = (1, 0, 0, 1)
    frames: int = 0
    timescale: int = 0
    duration: int = 0
    default_duration: int = 0


@dataclass
class _Movie:
    tracks: list[_Track] = field(default_factory=list)
    fragmented: bool = False


def read_mp4(data: bytes) -> Header:
    """Size, duration and frame count of an MP4 or MOV file's first video track. Source: ISO/IEC 14496-12."""
    steps = Steps("MP4", len(data))
    movie: _Movie | None = None
    fragments: list[Box] = []
    for box in boxes(data, 0, len(data), steps):
        if box.name == b"moov":
            movie = _read_moov(data, box, steps)
        elif box.name == b"moof":
            fragments.append(box)
    if movie is None:
        raise MediaError("corrupt_media", "the MP4 file has no index (moov box); it may be cut short")
    track = next((t for t in movie.tracks if t.handler == b"vide"), None)
    if track is None:
        raise MediaError("corrupt_media", "the MP4 file has no video stream")
    if track.codec not in _CODECS:
        raise MediaError("unsupported_codec", f"video codec {printable(track.codec)!r} is not offered")
    if movie.fragmented:
        for box in fragments:
            _add_fragment(data, box, track, steps)
    if track.frames == 0:
        raise MediaError("corrupt_media", "the MP4 file's video stream has no frames")
    seconds = track.duration / track.timescale if track.timescale and track.duration else None
    orientation = from_matrix(*track.matrix) or 1
    return Header(
        format="mp4",
        width=track.width,
        height=track.height,
        orientation=orientation,
        frames=track.frames,
        seconds=seconds,
        codec=_CODECS[track.codec],
    )


def _read_moov(data: bytes, moov: Box, steps: Steps) -> _Movie:
    movie = _Movie()
    defaults: dict[int, int] = {}
    for box in boxes(data, moov.start, moov.end, steps):
        if box.name == b"trak":
            movie.tracks.append(_read_trak(data, box, steps))
        elif box.name == b"mvex":
            movie.fragmented = True
            for part in boxes(data, box.start, box.end, steps):
                if part.name == b"trex":
                    track, _, duration = unpack(">III", data, part.start + 4)
                    defaults[track] = duration
    for track_record in movie.tracks:
        track_record.default_duration = defaults.get(track_record.number, 0)
    return movie


def _read_trak(data: bytes, trak: Box, steps: Steps) -> _Track:
    track = _Track()
    for box in boxes(data, trak.start, trak.end, steps):
        if box.name == b"tkhd":
            long = data[box.start] == 1
            (track.number,) = unpack(">I", data, box.start + (20 if long else 12))
            a, b, _, c, d = unpack(">iiiii", data, box.start + (52 if long else 40))
            track.matrix = (a, b, c, d)
        elif box.name == b"mdia":
            for part in boxes(data, box.start, box.end, steps):
                if part.name == b"mdhd":
                    long = data[part.start] == 1
                    track.timescale, track.duration = unpack(
                        ">IQ" if long else ">II", data, part.start + (20 if long else 12)
                    )
                    if track.duration == (2**64 - 1 if long else 2**32 - 1):
                        track.duration = 0  # all ones: unknown
                elif part.name == b"hdlr":
                    track.handler = bytes(data[part.start + 8 : part.start + 12])
                elif part.name == b"minf":
                    for inner in boxes(data, part.start, part.end, steps):
                        if inner.name == b"stbl":
                            _read_sample_tables(data, inner, track, steps)
    return track


def _read_sample_tables(data: bytes, stbl: Box, track: _Track, steps: Steps) -> None:
    timed = sized = 0
    for box in boxes(data, stbl.start, stbl.end, steps):
        if box.name == b"stsd":
            for entry in boxes(data, box.start + 8, box.end, steps):
                track.codec = entry.name
                # In a visual sample entry; other handlers' values here are never looked at.
                if entry.end - entry.start >= 28:
                    track.width, track.height = unpack(">HH", data, entry.start + 24)
                break
        elif box.name == b"stts":
            (count,) = unpack(">I", data, box.start + 4)
            rows = np.frombuffer(data, ">u4", min(count, (box.end - box.start - 8) // 8) * 2, box.start + 8)
            timed = int(rows[::2].sum(dtype=np.uint64))
        elif box.name in (b"stsz", b"stz2"):
            (sized,) = unpack(">I", data, box.start + 8)
    track.frames = max(timed, sized)


def _add_fragment(data: bytes, moof: Box, track: _Track, steps: Steps) -> None:
    for traf in boxes(data, moof.start, moof.end, steps):
        if traf.name != b"traf":
            continue
        mine, default = False, track.default_duration
        for box in boxes(data, traf.start, traf.end, steps):
            if box.name == b"tfhd":
                flags, number = unpack(">II", data, box.start)
                mine = number == track.number
                if flags & 0x8:
                    at = box.start + 8 + (8 if flags & 0x1 else 0) + (4 if flags & 0x2 else 0)
                    (default,) = unpack(">I", data, at)
            elif box.name == b"trun" and mine:
                flags, count = unpack(">II", data, box.start)
                track.frames += count
                if not flags & 0x100:
                    track.duration += count * default
                    continue
                at = box.start + 8 + (4 if flags & 0x1 else 0) + (4 if flags & 0x4 else 0)
                columns = sum(bool(flags & bit) for bit in (0x100, 0x200, 0x400, 0x800))
                if at + 4 * count * columns > box.end:
                    raise cut_short("MP4")
                values = np.frombuffer(data, ">u4", count * columns, at)
                track.duration += int(values[::columns].sum(dtype=np.uint64))
