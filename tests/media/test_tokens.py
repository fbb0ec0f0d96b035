"""media/tokens.py: the token file."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from media.errors import MediaError
from media.limits import Limits
from media.safetensors_file import Tensor, read, write
from media.tokens import (
    METADATA_BYTES,
    check_decodable,
    dump_tokens,
    layout_to_json,
    load_tokens,
    tokens_from_arrays,
)
from media.types import Layout, Tokens
from tests.paths import DATA, needs_data

LAYOUTS = st.one_of(
    st.builds(
        lambda height, width: Layout(
            kind="image", frames=1, height=height, width=width, grid=(1, -(-height // 16), -(-width // 16))
        ),
        st.integers(1, 70),
        st.integers(1, 70),
    ),
    st.builds(
        lambda frames, height, width, fps: Layout(
            kind="video",
            frames=frames,
            height=height,
            width=width,
            grid=(-(-frames // 4), -(-height // 16), -(-width // 16)),
            fps=fps,
        ),
        st.integers(1, 13),
        st.integers(1, 40),
        st.integers(1, 40),
        st.none() | st.sampled_from([24.0, 29.97, 60.0]),
    ),
    st.just(Layout(kind="voxels", frames=0, height=0, width=0, grid=(0, 0, 0))),
)


def raster(grid: tuple[int, int, int]) -> np.ndarray:
    t, x, y = np.meshgrid(*(np.arange(size) for size in grid), indexing="ij")
    return np.stack([t, x, y, np.zeros_like(t)], axis=-1).reshape(-1, 4).astype(np.int32)


def voxel_coords(seed: int, count: int = 7) -> np.ndarray:
    flat = np.random.default_rng(seed).choice(64**3, count, replace=False)
    coords = np.stack([np.zeros_like(flat), flat // 4096, flat // 64 % 64, flat % 64], axis=1)
    return coords.astype(np.int32)


def item(
    layout: Layout,
    seed: int = 0,
    *,
    codes: bool = False,
    embedding: bool = False,
    features: bool = False,
    width: int = 5,
) -> Tokens:
    rng = np.random.default_rng(seed)
    coords = voxel_coords(seed) if layout.kind == "voxels" else raster(layout.grid)
    count = len(coords)
    return Tokens(
        coords=coords,
        layout=layout,
        latents=None if codes else rng.standard_normal((count, width)).astype(np.float32),
        codes=rng.integers(0, 4096, (count, 8)).astype(np.int16) if codes else None,
        embedding=rng.standard_normal(6).astype(np.float32) if embedding else None,
        features=rng.standard_normal((count, 3)).astype(np.float32) if features else None,
        model="tiny",
        revision="abc123",
    )


IMAGE = Layout(kind="image", frames=1, height=20, width=33, grid=(1, 2, 3))
CLIP = Layout(kind="video", frames=6, height=16, width=30, grid=(2, 1, 2), fps=25.0)
SOLID = Layout(kind="voxels", frames=0, height=0, width=0, grid=(0, 0, 0))


def same(one: Tokens, other: Tokens, rel: float = 0) -> None:
    assert (one.model, one.revision, one.layout) == (other.model, other.revision, other.layout)
    for name in ("coords", "codes", "embedding", "latents", "features"):
        first, second = getattr(one, name), getattr(other, name)
        assert (first is None) == (second is None), name
        if first is not None:
            assert (first.dtype, first.shape) == (second.dtype, second.shape), name
            tolerance = rel if name in ("latents", "features") else 0
            np.testing.assert_allclose(second, first, rtol=tolerance, atol=tolerance * 1e-2)


def refused(code: str, message: str, call: Any, *args: Any, **options: Any) -> MediaError:
    with pytest.raises(MediaError, match=message) as caught:
        call(*args, **options)
    assert caught.value.code == code
    assert caught.value.detail.isascii()
    return caught.value


# --- round trips


@given(
    layouts=st.lists(LAYOUTS, min_size=1, max_size=4),
    dtype=st.sampled_from([("F32", 0.0), ("F16", 2**-10), ("BF16", 2**-8)]),
    codes=st.booleans(),
    embedding=st.booleans(),
    features=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=150)
def test_round_trip(
    layouts: list[Layout], dtype: tuple[Any, float], codes: bool, embedding: bool, features: bool, seed: int
) -> None:
    items = [
        item(layout, seed + k, codes=codes, embedding=embedding, features=features) for k, layout in enumerate(layouts)
    ]
    data = dump_tokens(items, dtype[0])
    assert data == dump_tokens(items, dtype[0])
    back = load_tokens(data, limits=Limits())
    assert len(back) == len(items)
    for one, other in zip(items, back, strict=True):
        same(one, other, dtype[1])
        check_decodable(other, latent_channels=5, codebooks=8)
    # What was rounded once is not changed again.
    again = load_tokens(memoryview(dump_tokens(back, dtype[0])))
    for one, other in zip(back, again, strict=True):
        same(one, other)


@given(values=hnp.arrays(np.float32, (6, 4), elements=st.floats(-1e4, 1e4, width=32)))
@settings(deadline=None)
def test_f32_latents_come_back_bit_for_bit(values: np.ndarray) -> None:
    made = dataclasses.replace(item(IMAGE), latents=values)
    found = load_tokens(dump_tokens([made]))[0].latents
    assert found is not None
    assert found.tobytes() == values.tobytes()


def test_the_file_is_as_documented() -> None:
    data = dump_tokens([item(IMAGE, embedding=True), item(CLIP, embedding=True)], "BF16", posterior="sample", seed=7)
    tensors, metadata = read(data)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()} == {
        "coords": ("I32", (10, 4)),
        "offsets": ("I64", (3,)),
        "latents": ("BF16", (10, 5)),
        "embedding": ("F32", (2, 6)),
    }
    assert tensors["offsets"].numpy().tolist() == [0, 6, 10]
    assert metadata == {
        "format": "atoken-tokens",
        "version": "1",
        "model": "tiny",
        "revision": "abc123",
        "kind": '["image","video"]',
        "size": "[[1,20,33],[6,16,30]]",
        "fps": "[null,25.0]",
        "layout": json.dumps([layout_to_json(IMAGE), layout_to_json(CLIP)], separators=(",", ":")),
        "posterior": "sample",
        "seed": "7",
    }
    single = safetensors.numpy.load(dump_tokens([item(IMAGE, codes=True, embedding=True)]))
    assert {name: (array.dtype.name, array.shape) for name, array in single.items()} == {
        "coords": ("int32", (6, 4)),
        "offsets": ("int64", (2,)),
        "codes": ("int16", (6, 8)),
        "embedding": ("float32", (6,)),
    }


def test_what_does_not_fit_into_one_file() -> None:
    good = item(IMAGE)
    for items, message in (
        ([], "0 items"),
        ([good] * 1025, "1025 items"),
        ([good] * 900, "bytes of metadata"),
        ([dataclasses.replace(good, codes=item(IMAGE, codes=True).codes)], "never both"),
        ([good, dataclasses.replace(good, revision="other")], "one file, one model"),
        ([good, item(IMAGE, embedding=True)], "all must have the same"),
        ([good, item(IMAGE, width=4)], "different widths"),
        ([dataclasses.replace(good, coords=good.coords[:5])], "5 rows of coords"),
        ([dataclasses.replace(good, coords=good.coords[:0])], "N above 0"),
        ([dataclasses.replace(good, embedding=np.zeros((1, 6), np.float32))], "needed is"),
        ([dataclasses.replace(good, latents=np.full((6, 5), np.nan, np.float32))], "not finite in F32"),
        ([dataclasses.replace(good, latents=None, codes=np.full((6, 8), 4096, np.int16))], "allowed are 0 to 4095"),
    ):
        with pytest.raises(ValueError, match=message):
            dump_tokens(items)
    with pytest.raises(ValueError, match="not finite in F16"):
        dump_tokens([dataclasses.replace(good, latents=np.full((6, 5), 1e5, np.float32))], "F16")
    with pytest.raises(ValueError, match="not finite in BF16"):
        dump_tokens([dataclasses.replace(good, latents=np.full((6, 5), 3.4e38, np.float32))], "BF16")


# --- files by other hands


def by_hand(metadata: dict[str, str] | None = None, **arrays: Any) -> bytes:
    made = {"coords": raster((1, 2, 3)), "latents": np.ones((6, 4), np.float32)} | arrays
    return safetensors.numpy.save({name: array for name, array in made.items() if array is not None}, metadata)


def test_latents_and_coords_are_enough() -> None:
    found = load_tokens(by_hand({"model": "tiny"}))
    assert len(found) == 1
    assert found[0].layout == Layout(kind="image", frames=1, height=32, width=48, grid=(1, 2, 3))
    assert (found[0].model, found[0].revision) == ("tiny", "")
    check_decodable(found[0])
    assert load_tokens(by_hand(None))[0].model == ""


def test_layouts_are_inferred_per_item() -> None:
    coords = np.concatenate([raster((2, 1, 2)), voxel_coords(1), raster((1, 1, 1))])
    data = by_hand(
        coords=coords, latents=np.ones((12, 4), np.float32), offsets=np.array([0, 4, 11, 12]), embedding=np.ones((3, 9))
    )
    found = load_tokens(data)
    assert [one.layout.kind for one in found] == ["video", "voxels", "image"]
    assert found[0].layout == Layout(kind="video", frames=8, height=16, width=32, grid=(2, 1, 2))
    for one in found:
        check_decodable(one)
        assert one.embedding is not None
        assert one.embedding.shape == (9,)


@pytest.mark.parametrize(
    ("metadata", "layout"),
    [
        ({"kind": "video"}, Layout(kind="video", frames=4, height=32, width=48, grid=(1, 2, 3))),
        ({"kind": '["image"]', "size": "[[1, 20, 33]]"}, IMAGE),
        ({"size": "[1,20,33]"}, IMAGE),
        ({"size": "[3,20,33]", "fps": "30"}, dataclasses.replace(IMAGE, kind="video", frames=3, fps=30.0)),
        ({"kind": "voxels"}, SOLID),
        ({"layout": json.dumps(layout_to_json(IMAGE))}, IMAGE),
    ],
)
def test_hints_in_the_metadata(metadata: dict[str, str], layout: Layout) -> None:
    assert load_tokens(by_hand(metadata))[0].layout == layout


def test_metadata_that_agrees_or_is_not_ours_is_passed_over() -> None:
    agrees = {
        "kind": '["image"]',
        "size": "[[1,20,33]]",
        "fps": "[null]",
        "layout": json.dumps([layout_to_json(IMAGE)]),
    }
    notes = {"posterior": "anything", "seed": "none", "author": "somebody"}
    assert load_tokens(by_hand(agrees | notes))[0].layout == IMAGE


@pytest.mark.parametrize("dtype", ["<i2", "<i4", "<i8", "u1", "<u2", "<u4", "<u8"])
def test_codes_and_coords_of_any_integer_dtype(dtype: str) -> None:
    codes = np.arange(48).reshape(6, 8)
    found = load_tokens(by_hand(latents=None, codes=codes.astype(dtype), coords=raster((1, 2, 3)).astype(dtype)))[0]
    assert found.codes is not None
    assert (found.codes.dtype, found.coords.dtype) == (np.int16, np.int32)
    assert (found.codes == codes).all()
    check_decodable(found, codebooks=8)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8"])
def test_latents_of_any_float_dtype(dtype: str) -> None:
    found = load_tokens(by_hand(latents=np.full((6, 4), 0.5, dtype), embedding=np.ones((1, 3), dtype)))[0]
    assert found.latents is not None
    assert found.embedding is not None
    assert (found.latents.dtype, found.embedding.dtype, found.embedding.shape) == (np.float32, np.float32, (3,))
    assert (found.latents == 0.5).all()
    # Copies: what happens to them does not depend on the buffer.
    assert found.latents.flags.writeable


HALF = np.zeros((6, 4), np.float32)
SPOILT = HALF.copy()
SPOILT[3, 2] = np.nan
CODES = np.zeros((6, 8), np.int32)
LATE = CODES.copy()
LATE[4, 7] = 4096
FAR = raster((1, 2, 3))
FAR[2, 1] = -1
TWICE = raster((1, 2, 3))
TWICE[4] = TWICE[1]

SAID = json.dumps([layout_to_json(IMAGE)])

BAD_FILES: dict[str, tuple[bytes, str, str]] = {
    "empty": (b"", "invalid_token_file", "0 bytes are too few"),
    "no coords": (by_hand(coords=None), "invalid_token_file", "no tensor coords .* only latents"),
    "nothing": (by_hand(coords=None, latents=None), "invalid_token_file", "none at all"),
    "both": (by_hand(codes=CODES), "invalid_token_file", "latents and codes"),
    "unknown": (by_hand(weights=HALF), "invalid_token_file", "a tensor 'weights', known are coords"),
    "latents int": (by_hand(latents=CODES), "invalid_token_file", "latents has dtype I32, allowed are F32"),
    "codes float": (by_hand(latents=None, codes=HALF), "invalid_token_file", "codes has dtype F32, allowed are I16"),
    "coords float": (by_hand(coords=HALF), "invalid_token_file", "coords has dtype F32"),
    "nan": (by_hand(latents=SPOILT), "non_finite_input", "latents row 3, column 2 is nan"),
    "inf": (by_hand(latents=HALF - np.inf), "non_finite_input", "latents row 0, column 0 is -inf"),
    "f64 beyond f32": (by_hand(latents=HALF.astype("f8") + 1e300), "non_finite_input", r"is 1e\+300"),
    "nan embedding": (by_hand(embedding=np.array([1, np.nan])), "non_finite_input", "embedding row 1 is nan"),
    "nan features": (by_hand(features=SPOILT), "non_finite_input", "features row 3"),
    "code": (
        by_hand(latents=None, codes=LATE),
        "invalid_token_file",
        "codes row 4, column 7 is 4096; allowed is 0 to 4095",
    ),
    "code far": (
        by_hand(latents=None, codes=CODES.astype("u8") + np.uint64(2**63)),
        "invalid_token_file",
        "is 9223372036854775808",
    ),
    "coord": (by_hand(coords=FAR), "invalid_token_file", "coords row 2, column 1 is -1"),
    "coord far": (by_hand(coords=raster((1, 2, 3)) + 4096), "invalid_token_file", "row 0, column 0 is 4096"),
    "coords rank": (by_hand(coords=FAR[0] * 0), "invalid_token_file", r"coords have shape \[4\]"),
    "coords scalar": (by_hand(coords=np.array(1, np.int32)), "invalid_token_file", r"coords have shape \[\]"),
    "coords columns": (by_hand(coords=raster((1, 2, 3))[:, :3]), "invalid_token_file", r"shape \[6, 3\]"),
    "no rows": (by_hand(coords=raster((0, 2, 3)), latents=HALF[:0]), "invalid_token_file", "at least one row"),
    "rows": (by_hand(latents=HALF[:5]), "invalid_token_file", r"latents have shape \[5, 4\], needed is \[6, width\]"),
    "no columns": (by_hand(latents=HALF[:, :0]), "invalid_token_file", r"latents have shape \[6, 0\]"),
    "features rows": (by_hand(features=HALF[:2]), "invalid_token_file", r"features have shape \[2, 4\]"),
    "embedding": (by_hand(embedding=np.ones((2, 3))), "invalid_token_file", r"embedding has shape \[2, 3\].*\[D\] or"),
    "embedding 3": (by_hand(embedding=np.ones((1, 1, 3))), "invalid_token_file", "embedding has shape"),
    "offsets end": (by_hand(offsets=np.array([0, 5])), "invalid_token_file", "from 0 to 5, needed is from 0 to the 6"),
    "offsets far": (by_hand(offsets=np.array([0, 2**60, 6])), "invalid_token_file", "offsets row 1 is 11529"),
    "offsets hollow": (by_hand(offsets=np.array([0, 3, 3, 6])), "invalid_token_file", "row 2 is 3 after 3"),
    "offsets rank": (by_hand(offsets=np.array([[0, 6]])), "invalid_token_file", r"offsets have shape \[1, 2\]"),
    "offsets one": (by_hand(offsets=np.array([0])), "invalid_token_file", r"offsets have shape \[1\]"),
    "offsets and embedding": (
        by_hand(offsets=np.array([0, 3, 6]), embedding=np.ones(3)),
        "invalid_token_file",
        r"needed is \[2, D\]",
    ),
    "items": (
        by_hand(coords=raster((1, 1, 1200)), latents=np.ones((1200, 1)), offsets=np.arange(1201)),
        "too_many_items",
        "1200 items, at most 1024",
    ),
    "format": (by_hand({"format": "pt"}), "invalid_token_file", "format 'pt', this reads format 'atoken-tokens'"),
    "version": (by_hand({"version": "2"}), "invalid_token_file", "version '2', this reads version '1'"),
    "metadata": (by_hand({"x": "y" * METADATA_BYTES}), "invalid_token_file", "65537 bytes of metadata"),
    "model": (by_hand({"model": "m" * 200}), "invalid_token_file", "model must be at most 128"),
    "revision": (by_hand({"revision": "a\nb"}), "invalid_token_file", "revision must be"),
    "layout json": (by_hand({"layout": "[{"}), "invalid_token_file", "layout in the metadata: the JSON cannot"),
    "layout count": (by_hand({"layout": "[]"}), "invalid_token_file", "0 values for 1 items"),
    "layout type": (by_hand({"layout": "[7]"}), "invalid_token_file", "a layout must be an object"),
    "kind": (
        by_hand({"kind": '["cube"]'}),
        "invalid_token_file",
        "kind 'cube'; it must be one of image, video",
    ),
    "kind type": (by_hand({"kind": '[{"a":1}]'}), "invalid_token_file", "it must be one of"),
    "size": (by_hand({"size": "[1, 2]"}), "invalid_token_file", "size in the metadata"),
    "size misfit": (by_hand({"size": "[1, 33, 33]"}), "invalid_token_file", "height 33 does not fit 2 tokens of 16"),
    "fps": (by_hand({"fps": "[0]"}), "invalid_token_file", "fps 0; it must be"),
    "kind misfit": (by_hand({"kind": "video", "layout": SAID}), "invalid_token_file", "has kind video, .* image"),
    "size other": (
        by_hand({"size": "[1,21,33]", "layout": SAID}),
        "invalid_token_file",
        r"item 0 has size \(1, 21, 33\)",
    ),
    "fps other": (by_hand({"fps": "[24]", "layout": SAID}), "invalid_token_file", "has fps 24.0, in its layout None"),
    "fps of an image": (by_hand({"fps": "[24]"}), "invalid_token_file", "only a clip has fps, .* image with 24"),
    "size of voxels": (by_hand({"kind": "voxels", "size": "[1,9,9]"}), "invalid_token_file", "voxels have sizes and"),
    "no raster": (
        by_hand(coords=raster((1, 1, 7))[1:]),
        "invalid_token_file",
        "complete raster, but coords have 6 rows",
    ),
    "no raster, twice": (by_hand(coords=TWICE), "invalid_token_file", "coords rows 1 and 4 are both"),
    "order": (by_hand(coords=raster((1, 2, 3))[::-1].copy()), "invalid_token_file", r"coords row 0 is \[0, 1, 2, 0\]"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name: str) -> None:
    data, code, message = BAD_FILES[name]
    started = time.perf_counter()
    error = refused(code, message, load_tokens, data)
    assert time.perf_counter() - started < 2
    assert error.status in (413, 422)
    assert len(error.detail) < 300


def test_limits() -> None:
    data = dump_tokens([item(IMAGE), item(CLIP)])
    assert len(load_tokens(data, limits=Limits(item_tokens=6, request_tokens=10))) == 2
    error = refused("too_many_tokens", "has 10 rows, at most 9", load_tokens, data, limits=Limits(request_tokens=9))
    assert (error.status, error.limit, error.actual) == (413, 9, 10)
    refused("item_too_large", "item 0 has 6 tokens, at most 5", load_tokens, data, limits=Limits(item_tokens=5))
    # The clip: 6 frames of 16 x 30, three bytes each.
    refused("item_too_large", "item 1 stands for 8640", load_tokens, data, limits=Limits(decode_bytes=8639))
    assert len(load_tokens(data, limits=Limits(decode_bytes=8640))) == 2


def test_a_long_video_is_read_without_limits() -> None:
    layout = Layout(kind="video", frames=4000, height=16, width=1024, grid=(1000, 1, 64))
    data = dump_tokens([item(layout, width=2)], "BF16")
    refused("item_too_large", "64000 tokens, at most 50000", load_tokens, data, limits=Limits(item_tokens=50_000))
    refused("item_too_large", "window of 256 tokens", load_tokens, data, limits=Limits(window_tokens=255))
    check_decodable(load_tokens(data)[0])


# --- arrays from elsewhere


def test_from_arrays() -> None:
    arrays = {"coords": raster((1, 2, 3)).astype(np.int64), "latents": HALF.astype(np.float64)}
    found = tokens_from_arrays(arrays, model="tiny", revision="r", layouts=[IMAGE])
    assert [(one.layout, one.model, one.revision, len(one)) for one in found] == [(IMAGE, "tiny", "r", 6)]
    assert tokens_from_arrays(arrays)[0].layout.height == 32
    # Lists of whole numbers are what a person types for latents, too.
    whole = tokens_from_arrays(arrays | {"latents": np.ones((6, 4), np.int64)})[0]
    assert whole.latents is not None
    assert whole.latents.dtype == np.float32
    refused("invalid_token_file", "2 layouts are given for 1 items", tokens_from_arrays, arrays, layouts=[IMAGE, CLIP])
    refused("invalid_token_file", "'noise', known are", tokens_from_arrays, arrays | {"noise": HALF})
    refused("invalid_token_file", "must be whole numbers, not float32", tokens_from_arrays, arrays | {"coords": HALF})
    refused("invalid_token_file", "must be numbers, not", tokens_from_arrays, arrays | {"latents": HALF.astype(str)})
    refused("too_many_tokens", "6 rows", tokens_from_arrays, arrays, limits=Limits(request_tokens=5))
    refused("invalid_token_file", "model must be", tokens_from_arrays, arrays, model="\n")


# --- hostile bytes

SEEDS = [
    dump_tokens([item(IMAGE, embedding=True, features=True)], "BF16"),
    dump_tokens([item(CLIP, codes=True), item(SOLID, codes=True)]),
    by_hand({"kind": '["image"]', "size": "[[1,20,33]]"}, offsets=np.array([0, 6])),
]


def outcome(data: bytes) -> int:
    """The status of an answer; anything but a MediaError goes through and fails the test."""
    try:
        for tokens in load_tokens(data, limits=Limits()):
            check_decodable(tokens)
    except MediaError as error:
        return error.status
    return 200


@given(data=st.data())
@settings(max_examples=600, deadline=2000)
def test_mutations_raise_only_media_errors(data: st.DataObject) -> None:
    damaged = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 5))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))
    assert outcome(bytes(damaged[:cut])) in (200, 413, 422)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
PER_ITEM = st.sampled_from(["layout", "kind", "size", "fps", "model", "revision", "posterior", "seed"])


@given(
    metadata=st.dictionaries(
        PER_ITEM, JUNK.map(json.dumps) | st.sampled_from(["image", "video", "voxels", "[[1,20,33]]"])
    ),
    arrays=st.dictionaries(
        st.sampled_from(["coords", "offsets", "latents", "codes", "embedding", "features"]),
        st.sampled_from(["<i2", "<i4", "<i8", "u1", "<f2", "<f4", "<f8"]).flatmap(
            lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
        ),
    ),
    good=st.booleans(),
)
@settings(max_examples=400, deadline=2000)
def test_odd_content_raises_only_media_errors(
    metadata: dict[str, str], arrays: dict[str, np.ndarray], good: bool
) -> None:
    whole: dict[str, np.ndarray] = {"coords": raster((1, 2, 3)), "latents": HALF} if good else {}
    data = write({name: Tensor.of(array) for name, array in (whole | arrays).items()}, metadata)
    assert outcome(data) in (200, 413, 422)


def shared_bad_files() -> list[dict[str, str]]:
    path = DATA / "expectations.json"
    if not path.is_file():
        return []
    rows: list[dict[str, str]] = json.loads(path.read_text())["bad"]
    return [row for row in rows if row["path"].endswith(".safetensors")]


@needs_data
def test_the_shared_rows_are_there() -> None:
    assert len(shared_bad_files()) >= 8


@pytest.mark.parametrize("row", shared_bad_files(), ids=lambda row: Path(row["path"]).stem)
def test_shared_bad_files(row: dict[str, str]) -> None:
    """Each row says in `expect` what a server answers; the two that name a reason must get that reason."""
    data = (DATA / row["path"]).read_bytes()
    started = time.perf_counter()
    with pytest.raises(MediaError) as caught:
        load_tokens(data, limits=Limits())
    assert time.perf_counter() - started < 1
    assert str(caught.value.status) == row["expect"][:3]
    stem = Path(row["path"]).stem
    assert caught.value.code == ("non_finite_input" if stem in ("st_nan", "st_inf") else "invalid_token_file")
    if stem == "st_codes_out_of_range":
        assert "codes row 0" in caught.value.detail
