"""The batch-invariant mode: an item's tokens and pixels are bit for bit the same whatever shares its pack."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from media.types import Image, Item, Tokens, Video, Voxels
from model import Tokenizer, fsq
from model.config import VARIANTS
from model.errors import UnsupportedError
from model.network import build


def _items() -> list[Item]:
    """Images of odd sizes, two alike, clips of one and of two windows, and voxels."""
    chance = np.random.default_rng(7)

    def pixels(*shape: int) -> np.ndarray:
        return chance.integers(0, 256, (*shape, 3), dtype=np.uint8)

    places = np.unique(chance.integers(0, 64, (90, 3)), axis=0).astype(np.int32)
    return [
        Image(pixels=pixels(16, 16)),
        Image(pixels=pixels(100, 37)),
        Video(frames=pixels(21, 33, 48), fps=24.0),
        Image(pixels=pixels(100, 37)),
        Voxels(coords=places, feats=chance.random((len(places), 768), dtype=np.float32)),
        Image(pixels=pixels(160, 224)),
        Video(frames=pixels(4, 64, 64), fps=None),
    ]


def _published(bottleneck: str) -> Tokenizer:
    """The published layers in small, with random weights: no linear path, biases and norms as in the large ones."""
    config = VARIANTS["tiny-continuous" if bottleneck == "gaussian" else "tiny-discrete"]
    config = replace(config, linear_path=False, experts=0, marks=0, components=0)
    torch.manual_seed(3)
    net = build(config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return Tokenizer(net, name="random", revision="0" * 64, batch_invariant=True)


@pytest.fixture(scope="module", params=["tiny-continuous", "tiny-discrete", "gaussian", "fsq"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param in ("gaussian", "fsq"):
        return _published(request.param)
    return Tokenizer.load(request.param, device="cpu", batch_invariant=True)


def _same(one: Tokens, other: Tokens) -> None:
    for name in ("coords", "latents", "codes", "embedding", "features"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert np.array_equal(a, b), f"{name} of {one.layout.kind} {one.layout.grid}"


@pytest.mark.parametrize("pass_tokens", [2048, 100])
def test_tokens_and_pixels_do_not_know_their_neighbours(tokenizer: Tokenizer, pass_tokens: int) -> None:
    items = _items()
    outputs = [name for name in tokenizer.outputs if name != "latents"] + (
        [] if tokenizer.config.codebooks else ["latents"]
    )
    alone = [tokenizer.encode([item], outputs)[0] for item in items]
    shown = [tokenizer.decode([tokens])[0] for tokens in alone]
    usual, tokenizer.pass_tokens = tokenizer.pass_tokens, pass_tokens
    try:
        for order in (list(range(len(items))), [5, 2, 0, 6, 1, 4, 3], [3, 3, 1, 1, 1]):
            packed = tokenizer.encode([items[i] for i in order], outputs)
            for index, tokens in zip(order, packed, strict=True):
                _same(tokens, alone[index])
            for index, item in zip(order, tokenizer.decode(packed), strict=True):
                assert type(item) is type(shown[index])
                for name in ("pixels", "frames", "coords", "feats"):
                    if hasattr(item, name):
                        assert np.array_equal(getattr(item, name), getattr(shown[index], name)), (index, name)
    finally:
        tokenizer.pass_tokens = usual


def test_a_stream_gives_the_bits_of_the_whole(tokenizer: Tokenizer) -> None:
    clip = next(item for item in _items() if isinstance(item, Video))
    outputs = ["embedding", "codes" if tokenizer.config.codebooks else "latents"]
    _same(tokenizer.encode_video(clip.frames, outputs, fps=clip.fps), tokenizer.encode([clip], outputs)[0])


@pytest.mark.parametrize("tokenizer", ["tiny-continuous", "gaussian"], indirect=True)
def test_a_seed_draws_the_same(tokenizer: Tokenizer) -> None:
    items = _items()
    packed = tokenizer.encode(items, ["latents"], seeds=list(range(len(items))))
    for seed, (item, tokens) in enumerate(zip(items, packed, strict=True)):
        _same(tokenizer.encode([item], ["latents"], seeds=[seed])[0], tokens)


@pytest.mark.parametrize("tokenizer", ["tiny-continuous", "tiny-discrete"], indirect=True)
def test_it_agrees_with_the_usual_mode_to_rounding(tokenizer: Tokenizer) -> None:
    usual = Tokenizer.load(tokenizer.name, device="cpu")
    assert tokenizer.card()["batch_invariant"]
    assert not usual.card()["batch_invariant"]
    for one, other in zip(usual.encode(_items(), ["latents"]), tokenizer.encode(_items(), ["latents"]), strict=True):
        assert one.latents is not None
        assert other.latents is not None
        if usual.config.bottleneck == "gaussian":
            assert np.abs(one.latents - other.latents).max() < 1e-4 * np.abs(one.latents).max()
        else:
            assert (one.latents == other.latents).mean() > 0.999


def test_it_is_not_for_training(tokenizer: Tokenizer) -> None:
    with pytest.raises(UnsupportedError, match="no_grad"):
        tokenizer.net.proj(torch.zeros(2, tokenizer.config.encoder.width, requires_grad=True))


@pytest.mark.parametrize("tokenizer", ["tiny-discrete", "fsq"], indirect=True)
def test_codes_are_those_of_the_latents(tokenizer: Tokenizer) -> None:
    (codes,), (values,) = (tokenizer.encode(_items()[:1], [name]) for name in ("codes", "latents"))
    assert codes.codes is not None
    assert values.latents is not None
    assert np.array_equal(fsq.values_to_codes(torch.from_numpy(values.latents), 8).numpy(), codes.codes)
