import io
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image as PILImage
from PIL import ImageCms

from media.decode import decode_media
from media.errors import MediaError
from media.image import decode_animation, decode_image, encode_image
from media.limits import Limits
from media.types import Image, UInt8Array, Video

LIMITS = Limits()
RNG = np.random.default_rng(2)
PIXELS = RNG.integers(0, 256, (20, 30, 3), np.uint8)


def smooth(height: int = 40, width: int = 64) -> UInt8Array:
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [rows * 255 // (height - 1), columns * 255 // (width - 1), np.full_like(rows, 40)]
    return np.stack(channels, -1).astype(np.uint8)


def saved(picture: PILImage.Image, format_name: str, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, format_name, **options)
    return out.getvalue()


def refused(data: bytes, limits: Limits = LIMITS) -> MediaError:
    with pytest.raises(MediaError) as caught:
        decode_image(data, limits)
    return caught.value


@pytest.mark.parametrize("format_name", ["PNG", "WEBP", "GIF"])
def test_lossless_formats_are_exact(format_name: str) -> None:
    picture = PILImage.fromarray(PIXELS)
    if format_name == "GIF":
        picture = picture.convert("P")
    image = decode_image(saved(picture, format_name, lossless=True), LIMITS)
    assert image.pixels.dtype == np.uint8
    assert (image.pixels == np.asarray(picture.convert("RGB"))).all()
    assert image.notes == ()


@pytest.mark.parametrize("format_name", ["JPEG", "AVIF", "WEBP"])
def test_lossy_formats_are_close(format_name: str) -> None:
    image = decode_image(saved(PILImage.fromarray(smooth()), format_name, quality=95), LIMITS)
    assert np.abs(image.pixels.astype(int) - smooth()).mean() < 3


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(format_name: str, orientation: int) -> None:
    stored = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.swapaxes(0, 1),
        6: lambda p: np.rot90(p),  # undone by a quarter turn clockwise
        7: lambda p: np.rot90(p, 2).swapaxes(0, 1),
        8: lambda p: np.rot90(p, -1),
    }[orientation](smooth())
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format_name == "WEBP" else {"quality": 95}
    data = saved(PILImage.fromarray(np.ascontiguousarray(stored)), format_name, exif=exif, **options)
    image = decode_image(data, LIMITS)
    assert image.pixels.shape == (40, 64, 3)
    assert image.pixels.flags.c_contiguous
    assert np.abs(image.pixels.astype(int) - smooth()).mean() < 3


def test_sixteen_bits_are_scaled() -> None:
    wide = np.array([[0, 128, 129, 32_768, 65_407, 65_535]], np.uint16)
    image = decode_image(saved(PILImage.fromarray(wide), "PNG"), LIMITS)
    assert image.pixels[0, :, 0].tolist() == [0, 0, 1, 128, 255, 255]
    assert (image.pixels == image.pixels[..., :1]).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB key"])
def test_transparency_is_laid_over_white(mode: str) -> None:
    if mode == "RGBA":
        values: npt.NDArray[np.uint8] = np.array([[[200, 100, 0, 0], [200, 100, 0, 128], [200, 100, 0, 255]]], np.uint8)
        data = saved(PILImage.fromarray(values), "PNG")
        expected = [[255, 255, 255], [227, 177, 127], [200, 100, 0]]
    elif mode == "LA":
        data = saved(PILImage.fromarray(np.array([[[50, 0], [50, 255]]], np.uint8), "LA"), "PNG")
        expected = [[255] * 3, [50] * 3]
    else:
        picture = PILImage.new("P" if mode == "P" else "RGB", (2, 1), 0 if mode == "P" else (9, 9, 9))
        if mode == "P":
            picture.putpalette([9, 9, 9, 70, 80, 90])
        picture.putpixel((1, 0), 1 if mode == "P" else (70, 80, 90))
        data = saved(picture, "PNG", transparency=0 if mode == "P" else (9, 9, 9))
        expected = [[255] * 3, [70, 80, 90]]
    image = decode_image(data, LIMITS)
    assert np.abs(image.pixels[0].astype(int) - expected).max() <= 1
    assert image.notes == ("transparency laid over white",)


def test_alpha_that_is_solid_is_not_noted() -> None:
    values = np.dstack([PIXELS, np.full(PIXELS.shape[:2], 255, np.uint8)])
    image = decode_image(saved(PILImage.fromarray(values), "PNG"), LIMITS)
    assert (image.pixels == PIXELS).all()
    assert image.notes == ()


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_other_modes_become_rgb(mode: str) -> None:
    picture = PILImage.fromarray(PIXELS).convert(mode)
    image = decode_image(saved(picture, "PNG"), LIMITS)
    assert (image.pixels == np.asarray(picture.convert("RGB"))).all()


def test_cmyk_is_not_inverted() -> None:
    data = saved(PILImage.new("RGB", (32, 32), (250, 200, 10)).convert("CMYK"), "JPEG", quality=95)
    image = decode_image(data, LIMITS)
    assert np.abs(image.pixels.reshape(-1, 3).mean(0) - [250, 200, 10]).max() < 4
    assert "CMYK" in image.notes[0]


def test_colour_profiles_are_converted() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = decode_image(saved(PILImage.fromarray(PIXELS), "PNG", icc_profile=srgb), LIMITS)
    assert (plain.pixels == PIXELS).all()
    assert plain.notes == ()
    # A grey profile cannot describe an RGB picture: ignored, and said so.
    odd = decode_image(saved(PILImage.fromarray(PIXELS), "PNG", icc_profile=b"nonsense" * 30), LIMITS)
    assert (odd.pixels == PIXELS).all()
    assert "ignored" in odd.notes[0]


@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "PNG", "AVIF"])
def test_animations(format_name: str) -> None:
    pictures = [PILImage.fromarray(np.roll(smooth(), 8 * k, 1)) for k in range(5)]
    options = {"lossless": True} if format_name == "WEBP" else {}
    data = saved(pictures[0], format_name, save_all=True, append_images=pictures[1:], duration=40, **options)
    first = decode_media(data, LIMITS)
    assert isinstance(first, Image)
    assert "first of 5 frames" in first.notes
    clip = decode_media(data, LIMITS, "video")
    assert isinstance(clip, Video)
    assert clip.frames.shape == (5, 40, 64, 3)
    assert clip.fps == pytest.approx(25)
    for frame, picture in zip(clip.frames, pictures, strict=True):
        assert np.abs(frame.astype(int) - np.asarray(picture)).mean() < 12
    assert decode_animation(data, LIMITS, max_frames=2).frames.shape[0] == 2
    with pytest.raises(MediaError) as caught:
        decode_animation(data, replace(LIMITS, frames_used=4))
    assert caught.value.code == "too_many_frames"


def test_uneven_animation_gets_the_average_rate_and_a_note() -> None:
    pictures = [PILImage.fromarray(np.roll(smooth(), 8 * k, 1)) for k in range(4)]
    data = saved(pictures[0], "GIF", save_all=True, append_images=pictures[1:], duration=[40, 40, 40, 280])
    clip = decode_animation(data, LIMITS)
    assert clip.fps == pytest.approx(10)
    assert "variable frame rate" in clip.notes[0]


@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP", "AVIF", "GIF"])
def test_truncated_files_are_refused(format_name: str) -> None:
    data = saved(PILImage.fromarray(smooth(200, 200)), format_name)
    for part in (0.4, 0.7, 0.95):
        error = refused(data[: int(part * len(data))])
        assert (error.code, error.status) == ("corrupt_media", 422)


def test_trailing_bytes_are_ignored() -> None:
    data = saved(PILImage.fromarray(PIXELS), "PNG") + bytes(500)
    assert (decode_image(data, LIMITS).pixels == PIXELS).all()


def test_a_canvas_that_lies_about_the_size_is_refused() -> None:
    exif = PILImage.Exif()
    exif[0x0112] = 1
    data = bytearray(saved(PILImage.fromarray(smooth()), "WEBP", exif=exif))
    at = data.index(b"VP8X") + 12
    data[at : at + 3] = (31).to_bytes(3, "little")
    assert "canvas" in refused(bytes(data)).detail


def test_an_avif_never_decodes_to_another_size_than_announced() -> None:
    data = bytearray(saved(PILImage.fromarray(smooth()), "AVIF"))
    at = data.index(b"ispe") + 8
    data[at : at + 8] = (32).to_bytes(4, "big") * 2
    # The decoder scales to the announced size; the picture that it really holds is bounded by the child's limits.
    assert decode_image(bytes(data), LIMITS).pixels.shape == (32, 32, 3)


def test_no_other_format_reaches_pillow() -> None:
    assert refused(saved(PILImage.fromarray(PIXELS), "TIFF")).code == "unsupported_media_type"
    assert refused(b"%!PS-Adobe-3.0 EPSF-3.0\n").code == "unsupported_media_type"


@pytest.mark.parametrize(("format_name", "quality"), [("png", 90), ("webp", 100)])
def test_encode_lossless(format_name: str, quality: int) -> None:
    data = encode_image(PIXELS, format_name, quality)  # type: ignore[arg-type]
    assert (decode_image(data, LIMITS).pixels == PIXELS).all()


@pytest.mark.parametrize("format_name", ["webp", "jpeg"])
def test_encode_lossy(format_name: str) -> None:
    good, poor = (encode_image(smooth(), format_name, quality) for quality in (95, 5))  # type: ignore[arg-type]
    assert len(poor) < len(good)
    assert np.abs(decode_image(good, LIMITS).pixels.astype(int) - smooth()).mean() < 3


def test_encode_keeps_any_size() -> None:
    for shape in ((1, 1, 3), (1, 300, 3), (17, 31, 3)):
        pixels = RNG.integers(0, 256, shape, np.uint8)
        assert (decode_image(encode_image(pixels[:, ::-1]), LIMITS).pixels == pixels[:, ::-1]).all()


def test_encode_refuses_what_it_cannot_hold() -> None:
    cases: list[tuple[UInt8Array, str, int]] = [
        (PIXELS[..., :1], "png", 90),
        (PIXELS[:0], "png", 90),
        (PIXELS.astype(np.float32), "png", 90),
        (PIXELS, "tiff", 90),
        (PIXELS, "jpeg", 0),
        (np.zeros((1, 16_384, 3), np.uint8), "webp", 90),
    ]
    for pixels, format_name, quality in cases:
        with pytest.raises(MediaError) as caught:
            encode_image(pixels, format_name, quality)  # type: ignore[arg-type]
        assert caught.value.code == "invalid_parameter"
