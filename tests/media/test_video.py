import io
import os
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from media.decode import decode_media
from media.errors import MediaError
from media.image import encode_image
from media.limits import Limits
from media.sniff import probe
from media.types import UInt8Array, Video
from media.video import VideoWriter, decode_video, encode_video, iter_video
from tests.media.test_sniff import Pipe, avi_file

LIMITS = Limits()


def clip(frames: int = 9, height: int = 48, width: int = 64) -> UInt8Array:
    """A smooth pattern that moves by one column a frame and has no edge where it wraps."""
    rows, columns = np.mgrid[0:height, 0:width] * (2 * np.pi / np.array([height, width])[:, None, None])
    waves = np.stack([np.sin(rows), np.cos(columns), np.sin(rows + columns)], -1)
    frame = (127 + 90 * waves).astype(np.uint8)
    return np.stack([np.roll(frame, t, 1) for t in range(frames)])


def container(
    frames: UInt8Array,
    format_name: str = "mp4",
    codec: str = "libx264rgb",
    pix_fmt: str = "rgb24",
    *,
    times_ms: list[int] | None = None,
    rotation: int | None = None,
    options: dict[str, str] | None = None,
) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format=format_name) as target:
        stream: Any = target.add_stream(codec, rate=25, options=options or {"qp": "0", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        stream.codec_context.thread_count = 1
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    return out.getvalue()


def refused(data: bytes, limits: Limits = LIMITS, max_frames: int | None = None) -> MediaError:
    with pytest.raises(MediaError) as caught:
        decode_video(data, limits, max_frames=max_frames)
    return caught.value


def psnr(a: UInt8Array, b: UInt8Array) -> float:
    return float(10 * np.log10(255**2 / max(((a.astype(float) - b) ** 2).mean(), 1e-9)))


@pytest.mark.parametrize("size", [(1, 1), (17, 31), (48, 63), (47, 64), (48, 64)])
@pytest.mark.parametrize("format_name", ["mp4", "mkv"])
def test_round_trip_keeps_size_count_and_rate(size: tuple[int, int], format_name: str) -> None:
    frames = clip(7, *size)
    back = decode_video(encode_video(frames, 24, format_name), LIMITS)  # type: ignore[arg-type]
    assert back.frames.shape == frames.shape
    assert back.frames.dtype == np.uint8
    assert back.fps == pytest.approx(24)
    assert back.notes == ()
    if format_name == "mkv":
        assert (back.frames == frames).all()
    else:
        assert psnr(back.frames, frames) > 30


def test_colours_survive_the_lossy_format() -> None:
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 30, 120)):
        frames = np.full((3, 64, 64, 3), colour, np.uint8)
        back = decode_video(encode_video(frames, None), LIMITS)
        assert np.abs(back.frames.reshape(-1, 3).mean(0) - colour).max() < 3
        assert back.fps == 25


def test_television_rates_stay_exact() -> None:
    back = decode_video(encode_video(clip(), 30_000 / 1001, "mkv"), LIMITS)
    assert back.fps == pytest.approx(30_000 / 1001, rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 65])
def test_any_number_of_frames(count: int) -> None:
    frames = clip(count)
    back = decode_video(encode_video(frames, 25, "mkv"), LIMITS)
    assert (back.frames == frames).all()


@pytest.mark.parametrize("format_name", ["mp4", "mkv"])
def test_the_writer_streams_to_what_cannot_seek(format_name: str) -> None:
    frames = clip(40)
    pipe = Pipe()
    with VideoWriter(pipe, 48, 64, 25, format_name) as writer:  # type: ignore[arg-type]
        writer.write(frames[:1])
        for start in range(1, 40, 13):
            writer.write(frames[start : start + 13])
        early = len(pipe.data)
    assert 0 < early < len(pipe.data)
    back = decode_media(pipe.data, LIMITS)
    assert isinstance(back, Video)
    assert back.frames.shape == frames.shape
    assert psnr(back.frames, frames) > 30


def test_the_writer_refuses_nonsense() -> None:
    for arguments in ((0, 64, 25, "mp4"), (48, 64, 0, "mp4"), (48, 64, float("nan"), "mp4"), (48, 64, 25, "avi")):
        with pytest.raises(MediaError) as caught:
            VideoWriter(io.BytesIO(), *arguments)
        assert caught.value.code == "invalid_parameter"
    with (
        pytest.raises(MediaError, match="must have 48 rows"),
        VideoWriter(io.BytesIO(), 48, 64) as writer,
    ):
        writer.write(clip(2, 64, 48))
    with pytest.raises(MediaError, match="at least one frame"):
        VideoWriter(io.BytesIO(), 48, 64).close()
    with pytest.raises(MediaError, match="uint8"):
        encode_video(clip().astype(np.float32), 25)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_is_applied(degrees: int) -> None:
    frames = clip(3)
    data = container(frames, rotation=degrees)
    with av.open(io.BytesIO(data), "r") as source:
        turned = next(source.decode(video=0)).rotation
    back = decode_video(data, LIMITS)
    # FFmpeg's angle is anticlockwise, as numpy's.
    assert (back.frames == np.rot90(frames, turned // 90, (1, 2))).all()
    assert turned % 180 == degrees % 180
    header = probe(data, LIMITS)
    assert (header.height, header.width) == back.frames.shape[1:3]


def test_variable_rate_keeps_every_frame() -> None:
    frames = clip(5)
    back = decode_video(container(frames, times_ms=[0, 10, 50, 250, 400]), LIMITS)
    assert (back.frames == frames).all()
    assert back.fps == pytest.approx(10)
    assert "gaps 10 to 200 ms" in back.notes[0]


@pytest.mark.parametrize(
    ("format_name", "codec", "pix_fmt"),
    [
        ("mp4", "libx264", "yuv420p"),
        ("mp4", "libx265", "yuv420p10le"),
        ("webm", "libvpx-vp9", "yuv420p"),
        ("webm", "libvpx", "yuv420p"),
        ("avi", "mpeg4", "yuv420p"),
        ("avi", "mjpeg", "yuvj420p"),
        ("matroska", "ffv1", "bgr0"),
    ],
)
def test_codecs_on_offer(format_name: str, codec: str, pix_fmt: str) -> None:
    options = {"x265-params": "pools=none:frame-threads=1:log-level=none"} if codec == "libx265" else {}
    frames = clip(8)
    back = decode_media(container(frames, format_name, codec, pix_fmt, options=options), LIMITS)
    assert isinstance(back, Video)
    assert back.frames.shape == frames.shape
    assert back.fps == pytest.approx(25)
    assert psnr(back.frames, frames) > 22


@pytest.mark.parametrize(
    ("format_name", "codec", "pix_fmt"), [("mov", "prores_ks", "yuv422p10le"), ("mov", "qtrle", "rgb24")]
)
def test_codecs_not_on_offer(format_name: str, codec: str, pix_fmt: str) -> None:
    assert refused(container(clip(2), format_name, codec, pix_fmt, options={})).code == "unsupported_codec"


def test_a_codec_that_is_not_the_announced_one_is_refused() -> None:
    data = container(clip(3), "avi", "mpeg4", "yuv420p", options={})
    error = refused(data.replace(b"FMP4", b"H264"))
    assert error.status in (415, 422)


def test_limits_hold_while_decoding() -> None:
    data = encode_video(clip(40), 25, "mp4")
    assert refused(data, replace(LIMITS, frames_decoded=39)).code == "too_many_frames"
    assert refused(data, replace(LIMITS, item_tokens=100)).code == "too_many_tokens"
    assert refused(data, replace(LIMITS, video_seconds=1)).code == "video_too_long"
    assert refused(data, replace(LIMITS, frame_pixels=3071)).code == "image_too_large"


def test_a_matroska_whose_header_is_short_of_frames_is_still_bounded() -> None:
    data = bytearray(encode_video(clip(40), 25, "mkv"))
    honest = probe(bytes(data), LIMITS)
    assert honest.frames == 40
    with iter_video(bytes(data), LIMITS) as reader:
        reader._limits = replace(LIMITS, frames_decoded=10)
        with pytest.raises(MediaError) as caught:
            list(reader)
    assert caught.value.code == "too_many_frames"


def test_a_change_of_size_in_the_stream_is_refused() -> None:
    # In Motion JPEG every frame carries its own size.
    small, large = (jpeg(size) for size in ((24, 40), (48, 80)))
    assert decode_video(avi_file(b"vids", b"MJPG", (small, small)), LIMITS).frames.shape == (2, 24, 40, 3)
    assert refused(avi_file(b"vids", b"MJPG", (small, large))).code == "corrupt_media"


def jpeg(size: tuple[int, int]) -> bytes:
    return encode_image(clip(1, *size)[0], "jpeg")


@pytest.mark.parametrize("format_name", ["mp4", "mkv"])
def test_truncated_clips_are_refused(format_name: str) -> None:
    data = encode_video(clip(30), 25, format_name)  # type: ignore[arg-type]
    for part in (0.3, 0.6, 0.9, 0.99):
        assert refused(data[: int(part * len(data))]).code == "corrupt_media"


def test_max_frames() -> None:
    data = encode_video(clip(30), 25, "mkv")
    back = decode_video(data, replace(LIMITS, frames_used=10), max_frames=10)
    assert (back.frames == clip(30)[:10]).all()
    assert back.notes == ("first 10 of about 30 frames",)
    assert decode_video(data, LIMITS, max_frames=30).notes == ()


def test_iter_video_is_the_same_frame_by_frame(tmp_path: Path) -> None:
    frames = clip(20)
    path = tmp_path / "clip.mkv"
    path.write_bytes(encode_video(frames, 25, "mkv"))
    with path.open("rb") as file, iter_video(file, Limits.local()) as reader:
        assert reader.fps == 25
        assert (reader.height, reader.width) == (48, 64)
        assert all((a == b).all() for a, b in zip(reader, frames, strict=True))
    with iter_video(path.read_bytes(), LIMITS) as reader:
        assert len(list(reader)) == 20
        assert reader.all_notes() == []


def test_scripts_and_playlists_never_reach_the_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mp4").write_bytes(encode_video(clip(), 25))
    monkeypatch.chdir(tmp_path)
    for data in (
        b"ffconcat version 1.0\nfile a.mp4\n",
        b"#EXTM3U\n#EXTINF:1,\nfile://" + os.fsencode(tmp_path / "a.mp4") + b"\n#EXT-X-ENDLIST\n",
    ):
        assert refused(data).code == "unsupported_media_type"
        with path_named_mp4(tmp_path, data).open("rb") as file, pytest.raises(MediaError):
            iter_video(file, LIMITS)


def path_named_mp4(folder: Path, data: bytes) -> Path:
    path = folder / "playlist.mp4"
    path.write_bytes(data)
    return path
