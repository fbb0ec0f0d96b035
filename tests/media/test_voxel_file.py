"""Ready-made voxels out of npz and safetensors."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from media.asset import decode_asset
from media.asset_sniff import asset_format
from media.errors import MediaError
from media.limits import Limits
from media.voxel_file import load_voxels

LIMITS = Limits()
COORDS = np.int32([[1, 2, 3], [1, 2, 4], [60, 0, 63]])
FEATS = np.linspace(0, 1, 3 * 768, dtype=np.float32).reshape(3, 768)


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize("write", [npz, lambda **arrays: save(arrays)], ids=["npz", "safetensors"])
def test_both_forms(write: Any) -> None:
    data = write(coords=COORDS, feats=FEATS)
    found = decode_asset(data, asset_format(data) or "", LIMITS).voxels
    assert np.array_equal(found.coords, COORDS)
    assert np.array_equal(found.feats, FEATS)
    assert found.notes == ()
    asked = decode_asset(data, asset_format(data) or "", LIMITS, with_pictures=True)
    assert asked.pictures is None
    assert asked.voxels.notes == ("the reconstruction is not scored: ready-made voxels come without pictures",)


def test_other_types_and_another_order() -> None:
    found = load_voxels(npz(coords=COORDS[::-1].astype(np.uint8), feats=np.uint8(FEATS[::-1] * 255)), LIMITS)
    assert np.array_equal(found.coords, COORDS)
    np.testing.assert_allclose(found.feats, np.floor(FEATS * 255) / 255, atol=1e-6)
    assert found.notes == ("sorted by x, y, z",)
    half = load_voxels(npz(coords=COORDS, feats=FEATS.astype(np.float16)), LIMITS)
    np.testing.assert_allclose(half.feats, FEATS, atol=1e-3)


@pytest.mark.parametrize(
    ("arrays", "code", "words"),
    [
        ({"coords": COORDS}, "corrupt_media", "'feats'"),
        ({"coords": COORDS[:, :2], "feats": FEATS}, "corrupt_media", "wanted integers"),
        ({"coords": COORDS.astype(np.float32), "feats": FEATS}, "corrupt_media", "wanted integers"),
        ({"coords": COORDS, "feats": FEATS[:, :700]}, "corrupt_media", "[3, 768]"),
        ({"coords": COORDS + 60, "feats": FEATS}, "corrupt_media", "wanted 0 to 63"),
        ({"coords": COORDS - 5, "feats": FEATS}, "corrupt_media", "wanted 0 to 63"),
        ({"coords": COORDS[[0, 0, 1]], "feats": FEATS}, "corrupt_media", "twice"),
        ({"coords": COORDS, "feats": FEATS * np.nan}, "non_finite_input", "not finite"),
        ({"coords": COORDS, "feats": FEATS * 2}, "corrupt_media", "wanted 0 to 1"),
        ({"coords": COORDS[:0], "feats": FEATS[:0]}, "empty_object", "no voxel"),
    ],
)
def test_voxels_that_are_none(arrays: dict[str, Any], code: str, words: str) -> None:
    with pytest.raises(MediaError) as caught:
        load_voxels(npz(**arrays), LIMITS)
    assert (caught.value.code, words in caught.value.detail) == (code, True), caught.value


def test_pickles_are_not_opened_and_tokens_are_sent_on() -> None:
    with pytest.raises(MediaError, match="only numbers"):
        load_voxels(npz(coords=np.array([{}], object), feats=FEATS), LIMITS)
    with pytest.raises(MediaError, match="/decode takes them"):
        load_voxels(save({"latents": FEATS, "coords": COORDS}), LIMITS)


def test_more_voxels_than_may_attend_to_each_other() -> None:
    with pytest.raises(MediaError) as caught:
        decode_asset(npz(coords=COORDS, feats=FEATS), "zip", Limits(window_tokens=2))
    assert caught.value.code == "too_many_tokens"
    assert (caught.value.limit, caught.value.actual) == (2, 3)
