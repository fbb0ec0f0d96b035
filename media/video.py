"""Video files <-> uint8 arrays, with PyAV. Strangers' files belong into a child process (media.pool).

A client's string never reaches av.open: only nameless bytes do, with the one demuxer that our own header parser
chose, no protocols, and decoders from a short list. Frames are counted and measured as they come.
"""

from __future__ import annotations

import io
import mmap
import struct
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from fractions import Fraction
from types import TracebackType
from typing import Any, BinaryIO, Final, Literal, Self, TypeAlias

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from media.errors import MediaError
from media.limits import Limits
from media.orientation import from_matrix, upright
from media.sniff import VIDEO_FORMATS, Probe, check_frames, check_seconds, check_size, probe
from media.types import UInt8Array, Video

VideoFormat: TypeAlias = Literal["mp4", "mkv"]

_DEMUXERS: Final = {"mp4": "mov", "matroska": "matroska,webm", "avi": "avi"}
# Codec in the header -> the decoder that may open it.
_DECODERS: Final = {
    "h264": "h264",
    "hevc": "hevc",
    "vp8": "vp8",
    "vp9": "vp9",
    "av1": "libdav1d",
    "mpeg4": "mpeg4",
    "mjpeg": "mjpeg",
    "ffv1": "ffv1",
    "cinepak": "cinepak",
}
# Without FULL_CHR_H_INT chroma is doubled instead of interpolated; BITEXACT makes the result independent of the
# machine's vector unit, so that the same clip gives the same codes everywhere.
_SCALING: Final = (
    Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
)
# Untagged video of this height or more is BT.709 by convention, below it BT.601.
_HD_HEIGHT: Final = 720
# Decoders allocate whole macroblocks with a border: a bound on the coded size needs this much room.
_BORDER: Final = 256
_MATRIX: Final = SideDataType.DISPLAYMATRIX
DEFAULT_FPS: Final = 25.0


def decode_video(data: bytes, limits: Limits, *, max_frames: int | None = None) -> Video:
    """Decode a clip to upright RGB frames, every frame once, in order of presentation.

    max_frames: keep only the first so many. fps is the average; a variable rate, a cut and concealed damage are
    in the notes. Raises MediaError.
    """
    header = probe(data, limits, declared="video", max_frames=max_frames)
    return decode_probed_video(data, header, limits, max_frames=max_frames)


def decode_probed_video(data: bytes, header: Probe, limits: Limits, *, max_frames: int | None = None) -> Video:
    """decode_video for a caller who has the probe already."""
    with VideoReader(io.BytesIO(data), header, limits) as reader:
        # The announced number is only how much to reserve; it has passed the limits, and memory is taken as it fills.
        room = min(header.frames or 64, max_frames or header.frames or 64)
        frames = np.empty((0, 0, 0, 3), np.uint8)
        count = 0
        for frame in reader:
            height, width, _ = frame.shape
            check_size("video", count + 1, height, width, limits)
            if count == 0:
                frames = np.empty((room, height, width, 3), np.uint8)
            elif count == len(frames):
                frames = np.concatenate([frames, np.empty_like(frames)])
            frames[count] = frame
            count += 1
            if count == max_frames:
                if header.frames is None or header.frames > count:
                    reader.notes.append(f"first {count} of about {header.frames or 'an unknown number of'} frames")
                break
        return Video(frames=frames[:count], fps=reader.fps, notes=tuple(reader.all_notes()))


def iter_video(source: BinaryIO | bytes, limits: Limits) -> VideoReader:
    """Frames uint8 [H, W, 3] of a clip one by one, in bounded memory, for clips that do not fit into it.

    source: bytes, or a binary file that can seek. The reader also tells fps, height, width and notes, and should
    be closed or used in a `with`. Only the container's header is read at first. Raises MediaError.
    """
    file: BinaryIO = io.BytesIO(source) if isinstance(source, bytes) else source
    # The header parsers want the whole file as bytes; a map of it costs no memory.
    with _mapped(file) as data:
        header = probe(data, limits, declared="video")
    if header.format not in VIDEO_FORMATS:
        raise MediaError("unsupported_media_type", f"an animated {header.format} cannot be read frame by frame")
    file.seek(0)
    return VideoReader(file, header, limits)


class VideoReader:
    """An open clip: iterate once for its frames, uint8 [H, W, 3], upright.

    fps is the container's rate until two frames were read, then the average of what was read.
    """

    def __init__(self, file: BinaryIO, header: Probe, limits: Limits) -> None:
        if header.format not in VIDEO_FORMATS:
            raise MediaError("media_type_mismatch", f"the file is an image ({header.format}), not a video")
        self.header = header
        self.height, self.width = header.height, header.width
        self.notes: list[str] = []
        self._limits = limits
        self._times: list[float] = []
        self._damaged = 0
        self._frames = 0
        with _errors(header.format):
            self._container, self._stream = _open(file, header, limits)
            rate = self._stream.average_rate
        self._rate = float(rate) if rate and 0 < rate < 1000 else None
        self._iterator = self._read()

    def __iter__(self) -> Iterator[UInt8Array]:
        return self._iterator

    def __next__(self) -> UInt8Array:
        return next(self._iterator)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the decoder. The source stays open."""
        self._iterator.close()
        self._container.close()

    @property
    def fps(self) -> float | None:
        """Frames per second; None if neither the container nor the time stamps say."""
        measured = self._measured_fps()
        if measured is None:
            return self._rate
        # The container's rate is exact where time stamps are rounded to milliseconds.
        if self._rate is not None and abs(measured - self._rate) < 0.01 * self._rate:
            return self._rate
        return measured

    def all_notes(self) -> list[str]:
        """What was done to the frames read so far that the sender may not expect."""
        notes = list(self.notes)
        if self._damaged:
            notes.append(f"{self._damaged} frames were damaged and are partly guessed by the decoder")
        gaps = np.diff(self._times)
        # Containers round to a millisecond or to their time base.
        if len(gaps) > 1 and gaps.max() - gaps.min() > max(0.0025, 0.1 * float(gaps.mean())):
            notes.append(
                f"variable frame rate (gaps {1000 * gaps.min():.0f} to {1000 * gaps.max():.0f} ms): "
                "every frame is kept, fps is the average"
            )
        return notes

    def _measured_fps(self) -> float | None:
        if len(self._times) < 2 or self._times[-1] <= self._times[0]:
            return None
        return (len(self._times) - 1) / (self._times[-1] - self._times[0])

    def _read(self) -> Generator[UInt8Array, None, None]:
        convert = VideoReformatter()
        first: tuple[int, int] | None = None
        orientation = 1
        with _errors(self.header.format):
            for frame in self._container.decode(self._stream):
                size = (frame.height, frame.width)
                if first is None:
                    first = size
                    orientation = self._orientation(frame)
                    # Again, because now it is the decoder that says so.
                    check_size("video", 1, *size, self._limits)
                elif size != first:
                    raise MediaError("corrupt_media", f"the picture's size changes in the clip, from {first} to {size}")
                self._frames += 1
                check_frames(self._frames, self._limits)
                if frame.time is not None:
                    self._times.append(frame.time)
                    check_seconds(frame.time - self._times[0], self._limits)
                self._damaged += bool(frame.is_corrupt)
                pixels = upright(_to_rgb(frame, convert), orientation)
                self.height, self.width = pixels.shape[:2]
                yield pixels
        if first is None:
            raise MediaError("corrupt_media", "the clip has no frame that can be decoded")

    def _orientation(self, frame: Any) -> int:
        aspect = self._stream.sample_aspect_ratio
        if aspect and aspect != 1:
            self.notes.append(f"pixels are not square ({aspect}); frames are not stretched")
        # The container of side data is a mapping that cannot list its keys; by number it can be read.
        data = next(
            (d for d in map(frame.side_data.__getitem__, range(len(frame.side_data))) if d.type == _MATRIX), None
        )
        if data is None:
            return 1
        a, b, _, c, d = struct.unpack("=5i", bytes(data)[:20])
        orientation = from_matrix(a, b, c, d)
        if orientation is None:
            self.notes.append("a rotation by other than 90 degrees is ignored")
            return 1
        return orientation


def encode_video(frames: UInt8Array, fps: float | None, format: VideoFormat = "mp4") -> bytes:
    """Encode frames uint8 [T, H, W, 3]; see VideoWriter. fps None: 25."""
    _check_pixels(frames)
    out = io.BytesIO()
    with VideoWriter(out, frames.shape[1], frames.shape[2], fps, format) as writer:
        writer.write(frames)
    return out.getvalue()


class VideoWriter:
    """Writes a clip as its frames come, in bounded memory, to a binary file that may be a pipe or a response.

    format "mp4": H.264 at crf 18, lossy; in 4:2:0 where both sides are even, else in 4:4:4, so that the size stays
    exact. "mkv": FFV1 in RGB, lossless. To a file that cannot seek, MP4 is written in fragments. Use it in a `with`
    or call close(): the last frames are written there.
    """

    def __init__(
        self,
        file: BinaryIO,
        height: int,
        width: int,
        fps: float | None = None,
        format: VideoFormat = "mp4",
    ) -> None:
        if format not in ("mp4", "mkv"):
            raise MediaError("invalid_parameter", f"video format {format!r} is not one of mp4, mkv")
        rate = DEFAULT_FPS if fps is None else fps
        if not 0.01 <= rate <= 1000:
            raise MediaError("invalid_parameter", f"fps must be 0.01 to 1000, not {fps}", limit=1000, actual=rate)
        # The encoders' own bound.
        if not (1 <= height <= 16_384 and 1 <= width <= 16_384):
            raise MediaError("invalid_parameter", f"a video's sides must be 1 to 16384 pixels, not {width} x {height}")
        self.height, self.width, self.format = height, width, format
        self.frames = 0
        # 1001 keeps the television rates (30000/1001) exact.
        exact = Fraction(rate).limit_denominator(1001)
        options: dict[str, str] = {}
        if format == "mp4" and not file.seekable():
            options["movflags"] = "frag_keyframe+empty_moov+default_base_moof"
        self._container = av.open(file, "w", format="matroska" if format == "mkv" else "mp4", options=options)
        if format == "mkv":
            self._stream: Any = self._container.add_stream("ffv1", rate=exact, options={"level": "3", "slicecrc": "1"})
            self._stream.pix_fmt = "bgr0"
        else:
            even = height % 2 == 0 and width % 2 == 0
            self._stream = self._container.add_stream(
                "libx264", rate=exact, options={"crf": "18", "preset": "veryfast"}
            )
            self._stream.pix_fmt = "yuv420p" if even else "yuv444p"
            context = self._stream.codec_context
            context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
            context.color_primaries = context.color_trc = 1  # BT.709
        self._stream.height, self._stream.width = height, width
        self._stream.codec_context.thread_count = 1
        self._stream.codec_context.time_base = 1 / exact
        self._convert = VideoReformatter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._container.close()

    def write(self, frames: UInt8Array) -> None:
        """Append frames uint8 [t, H, W, 3] of the size given at the start."""
        _check_pixels(frames)
        if frames.shape[1:3] != (self.height, self.width):
            raise MediaError(
                "invalid_parameter",
                f"frames must have {self.height} rows and {self.width} columns, not {frames.shape[1:3]}",
            )
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if self.format == "mkv":
                frame = self._convert.reformat(frame, format="bgr0", threads=1)
            else:
                frame = self._convert.reformat(
                    frame,
                    format=self._stream.pix_fmt,
                    dst_colorspace=Colorspace.ITU709,
                    dst_color_range=ColorRange.MPEG,
                    interpolation=_SCALING,
                    threads=1,
                )
            frame.pts, frame.time_base = self.frames, self._stream.codec_context.time_base
            self.frames += 1
            self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write what the encoder holds back and the end of the file. The file object stays open."""
        if self.frames == 0:
            self._container.close()
            raise MediaError("invalid_parameter", "a video needs at least one frame")
        self._container.mux(self._stream.encode(None))
        self._container.close()


def _check_pixels(frames: UInt8Array) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise MediaError("invalid_parameter", f"frames must be uint8 [T, H, W, 3], not {frames.dtype} {frames.shape}")


def _open(file: BinaryIO, header: Probe, limits: Limits) -> tuple[Any, Any]:
    decoder = _DECODERS[header.codec or ""]
    options = {
        "format_whitelist": _DEMUXERS[header.format],
        "protocol_whitelist": "none",
        # Holds for the decoders that FFmpeg opens by itself to fill in missing parameters.
        "codec_whitelist": decoder,
        "max_streams": "8",
        "probesize": "5000000",
        "analyzeduration": "5000000",
    }
    container = av.open(_Nameless(file), "r", options=options)
    try:
        cover = av.stream.Disposition.attached_pic
        stream = next((s for s in container.streams.video if not s.disposition & cover), None)
        if stream is None:
            raise MediaError("corrupt_media", f"the {header.format} file has no video stream")
        context = stream.codec_context
        if context is None or context.name != decoder:
            raise MediaError("unsupported_codec", "the video stream's codec is not the one that the header announces")
        context.thread_type, context.thread_count = "NONE", 1
        context.options = {"max_pixels": str(_coded_pixels(limits))}
    except BaseException:
        container.close()
        raise
    return container, stream


def _coded_pixels(limits: Limits) -> int:
    side = min(limits.image_side, 32_768)
    return min(limits.frame_pixels + 2 * _BORDER * side + _BORDER**2, 2**31 - 1)


class _Nameless:
    """A file without a name, so that nothing inside FFmpeg can resolve other files against it."""

    def __init__(self, file: BinaryIO) -> None:
        self.read: Callable[[int], bytes] = file.read
        self.seek: Callable[[int, int], int] = file.seek
        self.tell: Callable[[], int] = file.tell


def _to_rgb(frame: Any, convert: VideoReformatter) -> UInt8Array:
    untagged = frame.colorspace == 2  # AVCOL_SPC_UNSPECIFIED
    source = Colorspace.ITU709 if untagged and frame.height >= _HD_HEIGHT else None
    rgb = convert.reformat(
        frame,
        format="rgb24",
        src_colorspace=source,
        dst_color_range=ColorRange.JPEG,
        interpolation=_SCALING,
        threads=1,
    )
    return np.asarray(rgb.to_ndarray(), np.uint8)


@contextmanager
def _errors(format_name: str) -> Iterator[None]:
    """Every failure of the decoder becomes a MediaError."""
    try:
        yield
    except (MediaError, GeneratorExit):
        raise
    except MemoryError:
        raise MediaError("decode_limit", "the clip needs more memory than a decoder may take") from None
    except Exception:
        raise MediaError("corrupt_media", f"the {format_name} data is damaged or cut short") from None


@contextmanager
def _mapped(file: BinaryIO) -> Iterator[bytes]:
    file.seek(0)
    try:
        number = file.fileno()
        mapped = mmap.mmap(number, 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # no real file, or an empty one
        yield file.read()
        return
    with mapped:
        yield mapped  # type: ignore[misc]  # slices and indexes like bytes
