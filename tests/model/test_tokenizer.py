"""What the facade promises: nothing lost, no neighbour has a say, memory and streams agree with the plain call."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from media.types import Image, Item, Tokens, Video, Voxels
from model import RangeError, ShapeError, Tokenizer, UnsupportedError, fsq
from model.patchify import layout_of, patchify, to_uint8, unpatchify
from model.verify import rowwise_error
from tests.model.samples import mixed_items, random_image, random_video, random_voxels, small_config, small_tokenizer

ALL = {"latents", "embedding", "features"}


def _pixels(item: Item) -> np.ndarray:
    return item.pixels if isinstance(item, Image) else item.frames if isinstance(item, Video) else item.feats


def test_arguments_that_do_not_fit_are_named(continuous: Tokenizer) -> None:
    image = random_image(np.random.default_rng(6), 16, 16)
    bad: list[tuple[type[Exception], str, list, dict]] = [
        (UnsupportedError, "wanted 'pad' or 'crop'", [image], {"fit": "x"}),
        (UnsupportedError, "list or set", [image], {"outputs": "latents"}),
        (ShapeError, "2 fits", [image], {"fit": ["pad", "pad"]}),
        (ShapeError, "0 seeds", [image], {"seeds": []}),
        (ShapeError, "type list", [[1, 2]], {}),
    ]
    for error, match, items, arguments in bad:
        with pytest.raises(error, match=match):
            continuous.encode(items, **arguments)
    assert continuous.embed([]).shape == (0, 72)


@given(frames=st.integers(1, 37), height=st.integers(1, 70), width=st.integers(1, 70))
@settings(max_examples=40, deadline=None)
def test_patchify_loses_nothing(frames: int, height: int, width: int) -> None:
    config = small_config()
    rng = np.random.default_rng(frames * 7919 + height * 71 + width)
    item: Item = random_image(rng, height, width) if frames == 1 else random_video(rng, frames, height, width)
    layout = layout_of(item, config)
    back = to_uint8(unpatchify(patchify(item, layout, config), layout.grid, config))
    back = back[: layout.frames, :height, :width]
    assert np.array_equal(back[0] if frames == 1 else back, _pixels(item))


def test_sizes_and_counts_come_back(continuous: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    items = [
        *(random_image(rng, *size) for size in [(1, 1), (1, 4000), (17, 31), (256, 16)]),
        *(random_video(rng, *size) for size in [(2, 16, 16), (4, 1, 9), (17, 33, 16), (65, 16, 16)]),
        random_voxels(rng, 5),
    ]
    for item, back in zip(items, continuous.decode(continuous.encode(items)), strict=True):
        assert back.kind == item.kind
        assert _pixels(back).shape == _pixels(item).shape
        if isinstance(item, Voxels):
            assert isinstance(back, Voxels)
            assert np.array_equal(back.coords, item.coords)


def test_a_clip_of_one_frame_stays_a_clip_unless_cropped_as_published(continuous: Tokenizer) -> None:
    video = random_video(np.random.default_rng(0), 1, 32, 32)
    image = Image(pixels=video.frames[0])
    kept = continuous.encode([video])[0]
    back = continuous.decode([kept])[0]
    assert isinstance(back, Video)
    assert back.frames.shape == (1, 32, 32, 3)
    of_video, of_image = continuous.encode([video, image], fit="crop")
    assert of_video.layout == of_image.layout
    assert rowwise_error(of_video.latents, of_image.latents) < 1e-5


def test_published_crop_drops_and_says_so_in_the_layout(continuous: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    image, video = continuous.encode([random_image(rng, 33, 50), random_video(rng, 7, 40, 16)], fit="crop")
    assert (image.layout.height, image.layout.width, len(image)) == (32, 48, 6)
    assert (video.layout.frames, video.layout.height, len(video)) == (4, 32, 2)
    with pytest.raises(RangeError, match="fit='pad'"):
        continuous.encode([random_image(rng, 8, 50)], fit="crop")


@pytest.mark.parametrize("bottleneck", ["gaussian", "fsq"])
def test_twenty_random_mixes_agree_with_each_item_alone(bottleneck: str) -> None:
    tokenizer = small_tokenizer(bottleneck, pass_tokens=64)
    what = {"codes", "embedding", "features"} if bottleneck == "fsq" else ALL
    rng = np.random.default_rng(1)
    items = mixed_items(rng)
    alone = [tokenizer.encode([item], what)[0] for item in items]
    pictures = [tokenizer.decode([tokens])[0] for tokens in alone]
    differing = values = 0
    for _ in range(20):
        order = rng.permutation(len(items))[: rng.integers(1, len(items) + 1)]
        mixed = tokenizer.encode([items[i] for i in order], what)
        for i, tokens in zip(order, mixed, strict=True):
            _same_tokens(tokens, alone[i])
        for i, back in zip(order, tokenizer.decode([alone[i] for i in order]), strict=True):
            got, want = _pixels(back).astype(float), _pixels(pictures[i]).astype(float)
            if back.kind == "voxels":
                assert rowwise_error(got, want) < 1e-5
            else:
                assert np.abs(got - want).max() <= 1
                differing += int((got != want).sum())
                values += got.size
    # Over all pictures: in the smallest, one value on the edge between two levels is more than this share.
    assert differing <= 1e-3 * values


def _same_tokens(got: Tokens, want: Tokens) -> None:
    for name in ("latents", "embedding", "features"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None)
        assert a is None or rowwise_error(np.atleast_2d(a), np.atleast_2d(b)) < 1e-5
    if want.codes is not None:
        assert got.codes is not None
        assert (got.codes != want.codes).mean() < 1e-3  # only entries at a rounding boundary may differ
    assert np.array_equal(got.coords, want.coords)


def test_codes_differ_only_at_rounding_boundaries(discrete: Tokenizer) -> None:
    rng = np.random.default_rng(2)
    items = mixed_items(rng)
    packed = discrete.encode(items, {"codes", "features"})
    thresholds = np.array(fsq.THRESHOLDS)
    for item, tokens in zip(items, packed, strict=True):
        alone = discrete.encode([item], {"codes", "features"})[0]
        z = alone.features @ discrete.net.proj.weight[:48].detach().numpy().T
        margin = np.abs(z[:, :, None] - thresholds).min((1, 2))
        differ = (alone.codes != tokens.codes).any(1)
        assert not (differ & (margin > 1e-4)).any()


@pytest.mark.parametrize("frames", [1, 3, 16, 17, 37, 64])
def test_stream_equals_the_plain_call(continuous: Tokenizer, frames: int) -> None:
    video = random_video(np.random.default_rng(3), frames, 20, 33)
    plain = continuous.encode([video], ALL)[0]
    stream = continuous.encode_video(iter(video.frames), ALL, fps=24.0)
    assert stream.layout == plain.layout
    _same_tokens(stream, plain)
    back = continuous.decode([plain])[0]
    pieces = np.concatenate(list(continuous.decode_stream(plain)))
    assert np.array_equal(pieces, _pixels(back))


def test_sampling_needs_a_seed_and_knows_no_neighbours(continuous: Tokenizer) -> None:
    rng = np.random.default_rng(4)
    video, image = random_video(rng, 37, 16, 32), random_image(rng, 32, 32)
    a = continuous.encode([video, image], seeds=[7, None])
    b = continuous.encode([image, video], seeds=[None, 7])
    stream = continuous.encode_video(iter(video.frames), seed=7)
    mean = continuous.encode([video])[0]
    assert rowwise_error(a[0].latents, b[1].latents) < 1e-5
    assert rowwise_error(stream.latents, b[1].latents) < 1e-5
    assert rowwise_error(a[0].latents, mean.latents) > 1e-3
    other = continuous.encode([video], seeds=[8])[0]
    assert rowwise_error(a[0].latents, other.latents) > 1e-3
    with pytest.raises(RangeError, match="seed"):
        continuous.encode([image], seeds=[-1])


def test_sampled_noise_is_standard_normal() -> None:
    from model.gaussian import sample

    noise = sample(torch.zeros(4000, 48), torch.zeros(4000, 48), seed=3).numpy()
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 0.01
    assert abs((np.abs(noise) > 1.96).mean() - 0.05) < 0.005
    assert np.array_equal(
        noise[1000:], sample(torch.zeros(3000, 48), torch.zeros(3000, 48), 3, first_token=1000).numpy()
    )


def test_discrete_latents_are_the_values_of_the_codes(discrete: Tokenizer) -> None:
    image = random_image(np.random.default_rng(5), 48, 48)
    both, latents = discrete.encode([image], {"codes", "latents"})[0], discrete.encode([image], {"latents"})[0]
    assert both.latents is None
    assert latents.codes is None
    values = fsq.codes_to_values(torch.from_numpy(both.codes), 48).numpy()
    assert np.array_equal(values, latents.latents)
    assert np.array_equal(discrete.decode([both])[0].pixels, discrete.decode([latents])[0].pixels)


def test_what_a_model_cannot_do_is_named(continuous: Tokenizer, discrete: Tokenizer) -> None:
    image = random_image(np.random.default_rng(6), 32, 32)
    with pytest.raises(UnsupportedError, match="codes"):
        continuous.encode([image], {"codes"})
    with pytest.raises(UnsupportedError, match="pictures"):
        continuous.encode([image], {"pictures"})
    codes = discrete.encode([image], {"codes"})[0]
    with pytest.raises(UnsupportedError, match="small-gaussian"):
        continuous.decode([replace(codes, revision="1" * 64)])
    with pytest.raises(UnsupportedError, match="continuous"):
        continuous.decode([codes], any_model=True)


def test_bad_tokens_are_refused_by_name(continuous: Tokenizer, discrete: Tokenizer) -> None:
    image = random_image(np.random.default_rng(7), 32, 48)
    tokens, codes = continuous.encode([image])[0], discrete.encode([image], {"codes"})[0]
    latents = tokens.latents.copy()
    latents[3, 5] = np.nan
    bad: list[tuple[Tokenizer, Tokens, type[Exception], str]] = [
        (continuous, replace(tokens, latents=latents), RangeError, "row 3"),
        (continuous, replace(tokens, latents=tokens.latents[:, :32]), ShapeError, "48"),
        (continuous, replace(tokens, coords=tokens.coords[::-1].copy()), ShapeError, "raster"),
        (continuous, replace(tokens, latents=None), ShapeError, "neither"),
        (continuous, replace(tokens, layout=replace(tokens.layout, width=49)), ShapeError, "grid"),
        (discrete, replace(codes, codes=codes.codes + np.int16(4096)), RangeError, "4095"),
        (discrete, replace(codes, codes=codes.codes[:, :4]), ShapeError, "8"),
    ]
    for tokenizer, item, error, match in bad:
        with pytest.raises(error, match=match):
            tokenizer.decode([item])


@pytest.mark.parametrize(
    "item",
    [
        Image(pixels=np.zeros((0, 4, 3), np.uint8)),
        Image(pixels=np.zeros((4, 4), np.uint8)),
        Image(pixels=np.zeros((4, 4, 3), np.float32)),
        Video(frames=np.zeros((4, 4, 3), np.uint8)),
        Voxels(coords=np.zeros((2, 3), np.int32), feats=np.zeros((3, 768), np.float32)),
    ],
)
def test_arrays_that_are_no_item(continuous: Tokenizer, item: Item) -> None:
    with pytest.raises(ShapeError, match="wanted"):
        continuous.encode([item])


def test_voxels_outside_of_the_grid(continuous: Tokenizer) -> None:
    with pytest.raises(RangeError, match="63"):
        continuous.encode([Voxels(coords=np.array([[0, 0, 64]], np.int32), feats=np.zeros((1, 768), np.float32))])


def test_frames_of_different_sizes_in_a_stream(continuous: Tokenizer) -> None:
    frames = [np.zeros((16, 16, 3), np.uint8), np.zeros((16, 32, 3), np.uint8)]
    with pytest.raises(ShapeError, match="alike"):
        continuous.encode_video(frames)
    with pytest.raises(ShapeError, match="at least one"):
        continuous.encode_video([])
