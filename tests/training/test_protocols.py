"""Protocols: sizes as published, and everything a number depends on in the line beside it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.training.conftest import scene
from training.data import centre_crop
from training.protocols import PROTOCOLS, Protocol, resized


def test_pictures_are_resized_and_cut_to_256() -> None:
    for name in ("imagenet-256", "coco-256"):
        protocol = PROTOCOLS[name]
        for height, width in ((300, 500), (512, 300), (100, 151), (256, 256)):
            assert protocol.fit(scene(0, height, width)[None]).shape == (1, 256, 256, 3)
    square = scene(1, 256, 256)[None]
    assert np.array_equal(PROTOCOLS["imagenet-256"].fit(square), square)
    wide = scene(2, 256, 400)[None]
    assert np.array_equal(PROTOCOLS["imagenet-256"].fit(wide), wide[:, :, 72:328])


def test_clips_are_only_made_smaller() -> None:
    small = scene(3, 40, 60)[None]
    assert np.array_equal(PROTOCOLS["davis"].fit(small), small)
    protocol = replace(PROTOCOLS["tokenbench"], short_side=32)
    assert protocol.fit(np.repeat(scene(3, 64, 96)[None], 2, 0)).shape == (2, 32, 48, 3)
    assert protocol.fit(scene(3, 24, 96)[None]).shape == (1, 24, 96, 3)


def test_plain_leaves_files_as_they_are() -> None:
    picture = scene(4, 200, 400)[None]
    assert np.array_equal(PROTOCOLS["plain"].fit(picture), centre_crop(picture, 256))
    assert PROTOCOLS["plain"].fit(picture).shape == (1, 192, 256, 3)


@pytest.mark.parametrize("filter", ["bilinear", "bicubic", "lanczos"])
def test_resizing_is_antialiased(filter: str) -> None:
    """A fine checkerboard becomes grey; without antialias it would become stripes or one of its colours."""
    board = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    small = resized(np.repeat(board[None, :, :, None], 3, 3), 32, 32, filter)
    assert np.abs(small[:, 2:-2, 2:-2].astype(int) - 127).max() < 12


def test_the_line_says_what_a_number_depends_on() -> None:
    imagenet = PROTOCOLS["imagenet-256"]
    for words in ("imagenet-256", "short side 256 px", "bilinear", "antialias", "centre crop 256", "8-bit", "11 x 11"):
        assert words in imagenet.line("image")
    assert "bicubic" in replace(imagenet, filter="bicubic").line("image")
    clips = PROTOCOLS["tokenbench"].line("video")
    for words in ("at most 720 px", "no crop", "first 300 frames", "one MSE a clip"):
        assert words in clips
    assert "whole clips" in PROTOCOLS["davis"].line("video")
    assert "6 held-out views of 256 px on black" in PROTOCOLS["toys4k"].line("asset")
    assert len({protocol.line("video") for protocol in PROTOCOLS.values()}) == len(PROTOCOLS)


def test_what_is_known_and_what_is_ours_are_apart() -> None:
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name
        assert protocol.ours
        assert bool(protocol.known) == bool(protocol.table) == (name != "plain")
    assert "known of the paper's table 4, ImageNet" in PROTOCOLS["imagenet-256"].sources()
    assert "filter" in PROTOCOLS["imagenet-256"].sources().partition("our choice")[2]
    assert {name: protocol.items for name, protocol in PROTOCOLS.items()} == {
        "imagenet-256": 50_000,
        "coco-256": 5_000,
        "davis": 50,
        "tokenbench": 471,
        "toys4k": None,
        "plain": None,
    }


def test_refusals() -> None:
    with pytest.raises(ValueError, match="filter 'nearest'; there are bilinear, bicubic, lanczos"):
        Protocol(name="x", kind="image", filter="nearest")
    with pytest.raises(ValueError, match="crop 8; wanted 16 pixels or more"):
        Protocol(name="x", kind="image", crop=8)
