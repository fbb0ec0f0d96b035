import numpy as np
import torch

from media.types import Image, Video, Voxels
from model.config import VARIANTS
from model.linear_path import NEIGHBOURS, neighbour_differences
from training.data import pack_items

CONFIG = VARIANTS["tiny-continuous"]


def items() -> list[Image | Video | Voxels]:
    rng = np.random.default_rng(0)
    coords = rng.permutation(np.indices((3, 3, 3)).reshape(3, -1).T)[:11].astype(np.int32)
    return [
        Image(pixels=np.zeros((48, 64, 3), np.uint8)),
        Voxels(coords=coords, feats=np.zeros((11, 768), np.float32)),
        Video(frames=np.zeros((24, 32, 48, 3), np.uint8)),
        Image(pixels=np.zeros((16, 16, 3), np.uint8)),
    ]


def test_differences_are_those_of_a_plain_search() -> None:
    packed = pack_items(items(), CONFIG)
    latents = torch.randn(len(packed), 48, generator=torch.Generator().manual_seed(0))
    found = neighbour_differences(latents, packed).unflatten(1, (8, 48))
    for start, stop in zip(packed.starts, packed.starts[1:], strict=False):
        places = [tuple(row) for row in packed.coords[start:stop].tolist()]
        for row, (t, x, y, z) in enumerate(places):
            for number, (dx, dy) in enumerate(NEIGHBOURS):
                wanted = torch.zeros(48)
                voxel = t == 1 and not packed.moving[start]
                if not voxel and (t, x + dx, y + dy, z) in places:
                    wanted = latents[start + places.index((t, x + dx, y + dy, z))] - latents[start + row]
                assert torch.equal(found[start + row, number], wanted)


def test_an_item_does_not_know_its_neighbours_in_the_batch() -> None:
    every = items()
    packed = pack_items(every, CONFIG)
    latents = torch.randn(len(packed), 48, generator=torch.Generator().manual_seed(0))
    together = neighbour_differences(latents, packed)
    alone = pack_items(every[:1], CONFIG)
    assert torch.equal(neighbour_differences(latents[: len(alone)], alone), together[: len(alone)])
