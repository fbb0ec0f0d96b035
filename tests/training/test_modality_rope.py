"""The ablation: each modality turns by its own axes, and only by those."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from media.types import Image, Video, Voxels
from model.packed import PackedTokens
from model.rope import rotary_table
from tests.training.tiny_run import recipe
from training.batches import Sample, pack_samples
from training.fresh import fresh
from training.modality_rope import AXES, modality_table, use_modality_rope

MODEL = recipe().model(recipe().stage("asset"))
ITEMS = {
    "image": Image(pixels=np.zeros((48, 64, 3), np.uint8)),
    "video": Video(frames=np.zeros((8, 32, 32, 3), np.uint8)),
    "voxels": Voxels(coords=np.array([[3, 4, 5], [6, 7, 9]], np.int32), feats=np.full((2, 768), 0.5, np.float32)),
}


def packed_of(name: str) -> PackedTokens:
    return pack_samples([Sample(ITEMS[name])], [0], MODEL).packed


@pytest.mark.parametrize("name", ITEMS)
def test_only_the_axes_of_the_modality_turn(name: str) -> None:
    packed = packed_of(name)
    table = modality_table(packed, 16)
    assert table.shape == rotary_table(packed.coords, 16).shape
    for axis in range(4):
        coords = packed.coords.clone()
        coords[:, axis] += 5 if (name, axis) != ("image", 0) else 7  # t = 1 would make an asset of it
        moved = PackedTokens(
            feats=packed.feats, coords=coords, starts=packed.starts, extents=packed.extents, moving=packed.moving
        )
        if name == "voxels" and axis == 0:
            continue  # t is how an asset is known
        changed = not torch.equal(modality_table(moved, 16), table)
        assert changed == (axis in AXES[name]), axis


def test_every_axis_gets_its_part_of_the_pairs() -> None:
    packed = packed_of("video")
    counts = []
    for axis in AXES["video"]:
        coords = torch.zeros_like(packed.coords)
        coords[:, axis] = 1
        alone = PackedTokens(
            feats=packed.feats, coords=coords, starts=packed.starts, extents=packed.extents, moving=packed.moving
        )
        counts.append(int((modality_table(alone, 72)[0, 1::2] != 0).sum()))
    assert counts == [12, 12, 12]


def test_the_switch_changes_what_the_network_gives() -> None:
    packed = packed_of("voxels")
    net, other = fresh(MODEL, 0), fresh(MODEL, 0)
    use_modality_rope(other)
    assert not torch.allclose(net.encode(packed), other.encode(packed))
