"""The Gaussian decoder's facade: packs, files, cards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from media.types import Voxels
from model import UnsupportedError, WeightsError, weights
from model.splat_decoder import BUNDLED, PASS_VOXELS, SplatDecoder
from model.splats import Splats
from training.gaussian_start import SMALL, colour_start


def voxels(count: int, seed: int) -> Voxels:
    chance = np.random.default_rng(seed)
    places = chance.choice(64**3, count, replace=False)
    coords = np.stack(np.unravel_index(np.sort(places), (64, 64, 64)), axis=1).astype(np.int32)
    return Voxels(coords=coords, feats=chance.random((count, 768), np.float32))


@pytest.fixture
def decoder() -> SplatDecoder:
    torch.manual_seed(3)
    net = colour_start()
    for parameter in net.parameters():  # blocks that do something
        parameter.data += 0.02 * torch.randn_like(parameter)
    return SplatDecoder(net, name="noise", revision="r", note="of tests")


def test_an_asset_knows_no_neighbours_and_packs_are_bounded(decoder: SplatDecoder) -> None:
    items = [voxels(300, 0), voxels(PASS_VOXELS, 1), voxels(1, 2), voxels(500, 3)]
    together = decoder.decode(items)
    assert [len(splats.xyz01) for splats in together] == [32 * len(item.coords) for item in items]
    for item, splats in zip(items, together, strict=True):
        (alone,) = decoder.decode([item])
        for name in ("xyz01", "features_dc", "scaling", "rotation", "opacity"):
            torch.testing.assert_close(getattr(splats, name), getattr(alone, name), rtol=1e-4, atol=1e-5)
    assert decoder.decode([]) == []


def test_our_file_carries_its_sizes_and_its_note(decoder: SplatDecoder, tmp_path: Path) -> None:
    path = tmp_path / "noise.safetensors"
    weights.save(decoder.net, path, metadata={weights.NOTE_KEY: "of tests"})
    again = SplatDecoder.load(str(path))
    assert (again.name, again.note, again.net.config) == ("noise", "of tests", SMALL)
    torch.testing.assert_close(again.decode([voxels(9, 0)])[0].xyz01, decoder.decode([voxels(9, 0)])[0].xyz01)
    assert again.card()["gaussians"] == 32
    assert again.revision != SplatDecoder.load("tiny-splats").revision


def test_what_is_no_decoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="tiny-splats"):
        SplatDecoder.load("nothing")
    with pytest.raises(WeightsError, match="keys that do not fit"):
        SplatDecoder.load(str(BUNDLED.parent / "tiny-continuous.safetensors"))


def test_the_bundled_one_is_small_and_says_what_it_is_worth() -> None:
    found = SplatDecoder.load("tiny-splats")
    assert (BUNDLED / "tiny-splats.safetensors").stat().st_size < 4_000_000
    assert len(found.note) > 20
    (splats,) = found.decode([voxels(50, 0)])
    assert isinstance(splats, Splats)
    assert all(torch.isfinite(value).all() for value in (splats.scales(), splats.positions(), splats.opacities()))
