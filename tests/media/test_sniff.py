import io
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from media.errors import MediaError
from media.limits import Limits
from media.orientation import from_exif, from_matrix, from_turn_and_mirror, swaps_sides, upright
from media.sniff import Probe, check_size, probe, token_cost
from media.video import VideoWriter, encode_video

LIMITS = Limits()
FRAMES = np.random.default_rng(1).integers(0, 256, (9, 24, 40, 3), np.uint8)


def refused(data: bytes, limits: Limits = LIMITS, declared: str | None = None) -> MediaError:
    with pytest.raises(MediaError) as caught:
        probe(data, limits, declared=declared)
    return caught.value


def outcome(data: bytes) -> Probe | MediaError:
    try:
        return probe(data, LIMITS)
    except MediaError as error:
        return error


def picture(format_name: str, **options: object) -> bytes:
    out = io.BytesIO()
    PILImage.fromarray(FRAMES[0]).save(out, format_name, **options)
    return out.getvalue()


def animation(format_name: str) -> bytes:
    rest = [PILImage.fromarray(frame) for frame in FRAMES[1:]]
    return picture(format_name, save_all=True, append_images=rest, duration=40)


class Pipe(io.RawIOBase):
    """Collects what is written and cannot seek."""

    def __init__(self) -> None:
        self.data = b""

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    def write(self, data: object) -> int:
        piece = bytes(data)  # type: ignore[call-overload]
        self.data += piece
        return len(piece)


def fragmented_mp4() -> bytes:
    pipe = Pipe()
    with VideoWriter(pipe, 24, 40, 25) as writer:  # type: ignore[arg-type]
        writer.write(FRAMES)
    return pipe.data


def png(width: int, height: int, *chunks: bytes) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


SAMPLES: dict[str, Callable[[], bytes]] = {
    "png": lambda: picture("PNG"),
    "jpeg": lambda: picture("JPEG"),
    "webp": lambda: picture("WEBP"),
    "webp lossless": lambda: picture("WEBP", lossless=True),
    "webp animated": lambda: animation("WEBP"),
    "avif": lambda: picture("AVIF"),
    "avif animated": lambda: animation("AVIF"),
    "gif": lambda: animation("GIF"),
    "apng": lambda: animation("PNG"),
    "mp4": lambda: encode_video(FRAMES, 25, "mp4"),
    "mp4 fragmented": fragmented_mp4,
    "mkv": lambda: encode_video(FRAMES, 25, "mkv"),
}
BUILT: dict[str, bytes] = {}


def sample(name: str) -> bytes:
    if name not in BUILT:
        BUILT[name] = SAMPLES[name]()
    return BUILT[name]


@pytest.mark.parametrize("name", SAMPLES)
def test_reads_the_size_of_what_we_and_pillow_write(name: str) -> None:
    found = probe(sample(name), LIMITS)
    assert (found.height, found.width) == (24, 40)
    frames = 9 if name in ("gif", "apng", "mp4", "mp4 fragmented", "mkv") or "animated" in name else 1
    assert found.frames == frames
    is_video = name in ("mp4", "mp4 fragmented", "mkv")
    assert found.kind == ("video" if is_video else "image")
    assert found.tokens == (3 * 2 * 3 if is_video else 2 * 3)
    if is_video:
        assert found.seconds == pytest.approx(9 / 25, abs=0.05)


@pytest.mark.parametrize("name", ["gif", "apng", "webp animated", "avif animated"])
def test_an_animation_is_a_video_only_if_declared(name: str) -> None:
    assert probe(sample(name), LIMITS, declared="image").tokens == 6
    as_video = probe(sample(name), LIMITS, declared="video")
    assert (as_video.kind, as_video.frames, as_video.tokens) == ("video", 9, 18)


@pytest.mark.parametrize(
    ("name", "declared", "is_refused"),
    [
        ("png", "image/jpeg", False),
        ("png", "application/octet-stream", False),
        ("png", "", False),
        ("png", "video", True),
        ("png", "video/mp4", True),
        ("png", "text/plain", True),
        ("mp4", "image", True),
        ("mp4", "VIDEO/webm", False),
        ("mp4", "audio/mp4", True),
    ],
)
def test_declared_kind_is_compared(name: str, declared: str, is_refused: bool) -> None:
    if is_refused:
        assert refused(sample(name), declared=declared).code == "media_type_mismatch"
    else:
        assert isinstance(probe(sample(name), LIMITS, declared=declared), Probe)


@pytest.mark.parametrize("name", SAMPLES)
def test_any_truncation_is_a_media_error_or_still_has_the_size(name: str) -> None:
    data = sample(name)
    for length in sorted({*range(0, min(len(data), 400)), *range(400, len(data), 97)}):
        found = outcome(data[:length])
        if isinstance(found, MediaError):
            assert found.status in (415, 422)
        else:
            # JPEG's header says nothing of its data's length; the decoder will.
            assert (found.height, found.width) == (24, 40)


@pytest.mark.parametrize("name", [n for n in SAMPLES if n not in ("jpeg", "gif", "mp4 fragmented")])
def test_half_a_file_is_cut_short(name: str) -> None:
    assert refused(sample(name)[: len(sample(name)) // 2]).code == "corrupt_media"


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(SAMPLES)), st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=8))))
def test_damaged_headers_never_raise_anything_else(name: str, damage: list[tuple[float, bytes]]) -> None:
    data = bytearray(sample(name))
    for where, what in damage:
        # Mostly in the header, where it matters.
        at = int(where**3 * (len(data) - 1))
        data[at : at + len(what)] = what
    start = time.monotonic()
    found = outcome(bytes(data))
    if isinstance(found, MediaError):
        assert found.status in (413, 415, 422)
    elif found.kind == "voxels":
        assert found.tokens is None  # four bytes may make it look like a mesh; what that costs is known later
    else:
        assert found.tokens is not None
        assert 0 < found.tokens <= LIMITS.item_tokens
    assert time.monotonic() - start < 5


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.sampled_from([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"\x1aE\xdf\xa3", b"\0\0\0\x10ftypisom"]),
    st.binary(max_size=300),
)
def test_noise_behind_a_magic_number_is_a_media_error(magic: bytes, noise: bytes) -> None:
    assert refused(magic + noise).status in (413, 415, 422)


def test_many_tiny_parts_are_refused_quickly() -> None:
    gif = b"GIF89a\x01\0\x01\0\0\0\0" + b"\x21\xfe" + b"\x01x" * 9_000_000
    mp4 = b"\0\0\0\x10ftypisom\0\0\0\0" + b"\0\0\0\x08free" * 2_000_000
    mkv = b"\x1aE\xdf\xa3\x80" + b"\xec\x80" * 9_000_000
    for data in (gif, mp4, mkv):
        start = time.monotonic()
        assert refused(data).code == "corrupt_media"
        assert time.monotonic() - start < 5


def test_sizes_are_refused_from_the_header() -> None:
    assert refused(png(0, 5)).code == "corrupt_media"
    large = refused(png(20_000, 20_000))
    assert (large.code, large.limit, large.actual) == ("image_too_large", LIMITS.image_pixels, 400_000_000)
    assert refused(png(1, 20_000)).code == "image_too_large"
    tokens = refused(png(4096, 4096))
    assert (tokens.code, tokens.limit, tokens.actual) == ("too_many_tokens", 32_768, 65_536)
    assert tokens.detail == (
        "the image of 4096 x 4096 pixels has 65536 tokens, at most 32768 may attend to each other: "
        "shrink it to about 8388608 pixels in all (16 x 16 pixels a token)"
    )
    with pytest.raises(MediaError, match=r"^a window of 16 frames of 4096 x 2048 pixels has 131072 tokens.* 2097152 "):
        check_size("video", 16, 2048, 4096, LIMITS)
    with pytest.raises(MediaError, match=r"^the clip of 9 frames of 32 x 16 pixels has 6 tokens, at most 5 .* frames$"):
        check_size("video", 9, 16, 32, replace(LIMITS, item_tokens=5))
    with pytest.raises(MediaError, match=r"^the image of 32 x 48 pixels has 6 tokens, at most 5 .* about 1280 pixels"):
        check_size("image", 1, 48, 32, replace(LIMITS, item_tokens=5))
    assert refused(png(64, 64), replace(LIMITS, image_bytes=50)).code == "item_too_large"
    assert refused(png(64, 64), replace(LIMITS, decode_bytes=3 * 64 * 64 - 1)).code == "item_too_large"
    assert probe(png(64, 64), replace(LIMITS, decode_bytes=3 * 64 * 64)).tokens == 16


def test_clip_limits_are_checked_from_the_header() -> None:
    data = sample("mp4")
    assert refused(data, replace(LIMITS, video_seconds=0.3)).code == "video_too_long"
    assert refused(data, replace(LIMITS, frames_used=8)).code == "too_many_frames"
    assert refused(data, replace(LIMITS, frames_decoded=8)).code == "too_many_frames"
    assert refused(data, replace(LIMITS, frame_pixels=24 * 40 - 1)).code == "image_too_large"
    assert refused(data, replace(LIMITS, video_bytes=len(data) - 1)).code == "item_too_large"
    assert probe(data, replace(LIMITS, frames_used=8), max_frames=8).tokens == 12


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"BM" + bytes(60), "BMP"),
        (b"II*\0" + bytes(60), "TIFF"),
        (b"%PDF-1.7", "PDF"),
        (b"<svg xmlns=''/>", "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"hello", "no format that is offered"),
    ],
)
def test_other_formats_are_refused_by_name(data: bytes, name: str) -> None:
    error = refused(data)
    assert (error.code, error.status) == ("unsupported_media_type", 415)
    assert name in error.detail
    assert "PNG" in error.detail


def stl_that_claims(count: int, facets: int = 2, header: bytes = b"made by a test") -> bytes:
    return header.ljust(80) + struct.pack("<I", count) + bytes(50 * facets)


@pytest.mark.parametrize(
    ("data", "declared", "format"),
    [
        (stl_that_claims(50_000_000), None, "stl"),
        (stl_that_claims(50_000_000, 0), None, "stl"),
        (stl_that_claims(2**32 - 1, header=bytes(80)), None, "stl"),
        (stl_that_claims(3, header=b"solid by name"), None, "stl"),
        (stl_that_claims(50_000_000)[:-7], "model/stl", "stl"),
        (b"solid nothing\nendsolid nothing\n", None, "stl"),
        (b"cut", "model/stl; charset=binary", "stl"),
        (b"# nothing\n", "model/obj", "obj"),
        (b"g a\nshadow_obj b\n", "Model/OBJ", "obj"),
    ],
)
def test_formats_without_a_magic_number_are_what_they_claim_to_be(
    data: bytes, declared: str | None, format: str
) -> None:
    assert probe(data, LIMITS, declared=declared).format == format


@pytest.mark.parametrize(
    ("data", "declared"),
    [
        (b"# nothing\n", None),
        (b"# nothing\n", "model/gltf-binary"),
        (bytes(40), "model/obj"),
        (bytes(184), None),
        (stl_that_claims(50_000_000)[:-7], None),
        (stl_that_claims(50_000_000, header=b"\x01\x02\x03"), None),
        (stl_that_claims(50_000_000, header=b"x" * 80), None),
        (b"words " * 39, None),
        (b"%PDF-1.7", "model/stl"),
        (b"BM" + bytes(60), "model/obj"),
    ],
)
def test_other_files_are_not(data: bytes, declared: str | None) -> None:
    assert refused(data, declared=declared).code == "unsupported_media_type"


def test_a_picture_that_is_declared_as_a_mesh_is_named() -> None:
    assert refused(sample("png"), declared="model/stl").code == "media_type_mismatch"


def test_codecs_not_on_offer_are_refused_by_name() -> None:
    error = refused(sample("mp4").replace(b"avc1", b"apch"))
    assert (error.code, error.status) == ("unsupported_codec", 415)
    assert "apch" in error.detail
    assert refused(sample("mkv").replace(b"V_FFV1", b"V_WHAT")).code == "unsupported_codec"


def test_avi_subtitle_streams_are_refused() -> None:
    avi = avi_file(b"txts", b"GAB2")
    assert refused(avi).code == "unsupported_codec"


def test_avi_counts_frames_that_are_not_empty() -> None:
    found = probe(avi_file(b"vids", b"MJPG", frames=(b"x" * 10, b"", b"y" * 11, b"")), LIMITS)
    assert (found.format, found.width, found.height, found.frames, found.codec) == ("avi", 40, 24, 2, "mjpeg")
    assert found.seconds == pytest.approx(4 / 25)


def avi_file(kind: bytes, codec: bytes, frames: tuple[bytes, ...] = (b"x",)) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) & 1)

    strh = kind + codec + struct.pack("<12x4I24x", 1, 25, 0, len(frames))
    strf = struct.pack("<IiiHH4s20x", 40, 40, -24, 1, 24, codec)
    streams = b"LIST" + struct.pack("<I", 4 + 8 + len(strh) + 8 + len(strf)) + b"strl"
    streams += chunk(b"strh", strh) + chunk(b"strf", strf)
    header = chunk(b"LIST", b"hdrl" + streams)
    movie = chunk(b"LIST", b"movi" + b"".join(chunk(b"00dc", frame) for frame in frames))
    return chunk(b"RIFF", b"AVI " + header + movie)


def test_matroska_of_unknown_size_is_walked() -> None:
    data = bytearray(sample("mkv"))
    for ident in (b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"):
        at = data.index(ident) + 4
        length = 9 - data[at].bit_length()
        data[at : at + length] = ((1 << 7 * length + 1) - 1).to_bytes(length, "big")
    assert probe(bytes(data), LIMITS).frames == 9


def test_token_cost() -> None:
    assert token_cost("image", 1, 1, 1) == 1
    assert token_cost("image", 1, 256, 256) == 256
    assert token_cost("video", 5, 17, 16) == 2 * 2 * 1
    assert token_cost("video", 5, 33, 47, "crop") == 1 * 2 * 2
    with pytest.raises(MediaError, match="at least 16") as caught:
        token_cost("image", 1, 15, 40, "crop")
    assert caught.value.code == "image_too_small"
    with pytest.raises(MediaError, match="voxels"):
        token_cost("voxels", 1, 16, 16)
    with pytest.raises(MediaError, match="no pixels"):
        token_cost("video", 0, 16, 16)


def test_orientations_agree_with_each_other() -> None:
    pixels = FRAMES[0]
    assert (upright(pixels, 1) == pixels).all()
    assert (upright(pixels, 6) == np.rot90(pixels, -1)).all()
    assert (upright(pixels, 8) == np.rot90(pixels)).all()
    assert (upright(FRAMES, 3) == FRAMES[:, ::-1, ::-1]).all()
    assert [swaps_sides(n) for n in range(1, 9)] == [False] * 4 + [True] * 4
    # x' = -y, y' = x: a quarter turn clockwise where y points down.
    assert from_matrix(0, 1, -1, 0) == 6
    assert from_matrix(-1, 0, 0, -1) == 3
    assert from_matrix(1, 1, -1, 1) is None
    for turns in range(4):
        for columns in (False, True):
            expected = np.rot90(pixels, turns)
            expected = expected[:, ::-1] if columns else expected
            assert (upright(pixels, from_turn_and_mirror(turns, columns, False)) == expected).all()


def test_exif_that_cannot_be_read_means_upright() -> None:
    good = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    assert from_exif(good) == 6
    assert from_exif(good.replace(b"\x06\0\0\0", b"\x63\0\0\0")) == 1
    for length in range(len(good)):
        assert from_exif(good[:length]) in (1, 6)
    assert from_exif(b"II*\0\xff\xff\xff\xff") == 1
