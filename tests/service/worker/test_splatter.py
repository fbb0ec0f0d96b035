"""Gaussians of decoded voxels in a worker: what each kind of job gets, and when it stops."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch

from media import wire
from media.asset import decode_asset
from media.limits import Limits
from media.mesh_views import sphere_cameras
from media.multiview import GRID
from media.types import PosedPictures, Voxels
from model import Tokenizer
from model.rasterizer import render
from model.splat_decoder import SplatDecoder
from service.view import View
from service.worker.budget import Budget
from service.worker.model_thread import ModelThread
from service.worker.runner import Failure, Result, Runner
from service.worker.speed import Speed
from service.worker.splatter import LateError, Splatter, compare, draw
from tests.media.meshes import arms_glb
from tests.service.worker.test_runner import POOL, good, item_payload, job, tokens_payload
from training.gaussian_start import colour_start


def cube(colour: tuple[float, float, float] = (1.0, 0.0, 0.0)) -> Voxels:
    """The surface cells of a cube in one colour."""
    grid = np.stack(np.meshgrid(*[np.arange(24, 40)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    shell = grid[((grid == 24) | (grid == 39)).any(axis=1)].astype(np.int32)
    return Voxels(coords=shell, feats=np.tile(np.float32(colour), (len(shell), 256)))


@pytest.fixture(scope="module")
def splatter() -> Splatter:
    return Splatter(SplatDecoder(colour_start(), name="start", revision="r", note="untrained"))


def run(tokenizer: Tokenizer, splatter: Splatter | None, options: dict[str, object], payload: bytes) -> Result:
    runner = Runner({POOL: tokenizer}, Budget(4096), Speed(1), splatter)
    op = "decode" if "outputs" not in options else "encode"
    (result,) = runner.run(POOL, [job(op, **options)], [payload])  # type: ignore[arg-type]
    return result


def test_a_decode_job_gets_voxels_gaussians_or_pixels_as_it_asks(continuous: Tokenizer, splatter: Splatter) -> None:
    payload = tokens_payload(continuous.encode([cube()])[0])
    count = len(cube().coords)
    plain = good(run(continuous, splatter, {}, payload))
    assert set(plain.arrays) == {"coords", "feats"}
    gaussians = good(run(continuous, splatter, {"splats": {}}, payload))
    assert gaussians.arrays["positions"].shape == (32 * count, 3)
    assert gaussians.meta["note"] == "untrained"
    turn = View(side=32, frames=3).to_json()
    pixels = good(run(continuous, splatter, {"splats": turn}, payload))
    assert pixels.arrays["pixels"].shape == (3, 32, 32, 3)
    assert pixels.meta["fps"] == View().fps


def test_without_a_gaussian_decoder_a_job_that_wants_gaussians_is_told(continuous: Tokenizer) -> None:
    result = run(continuous, None, {"splats": {}}, tokens_payload(continuous.encode([cube()])[0]))
    assert isinstance(result, Failure)
    assert "no Gaussian decoder" in result.detail


def pictures_of(splatter: Splatter, voxels: Voxels) -> PosedPictures:
    cameras = sphere_cameras(3)
    drawn = [np.zeros((24, 24, 3), np.uint8)] * 3
    return PosedPictures(
        pictures=np.stack(drawn),
        world_to_camera=cameras.world_to_camera,
        intrinsics=cameras.intrinsics,
        held_out=True,
    )


def test_a_reconstruction_says_how_near_it_comes(continuous: Tokenizer, splatter: Splatter) -> None:
    views = pictures_of(splatter, cube())
    arrays = {"coords": cube().coords, "feats": np.uint8(255 * cube().feats)}
    arrays |= {name: getattr(views, name) for name in ("pictures", "world_to_camera", "intrinsics")}
    payload = wire.dumps(arrays, {"kind": "voxels", "notes": [], "held_out": True})
    found = good(run(continuous, splatter, {"outputs": ["latents", "reconstruction"]}, payload))
    assert {"latents", "reconstruction.positions"} <= set(found.arrays)
    about = found.meta["reconstruction"]
    assert isinstance(about, dict)
    assert about["views"] == 3
    assert about["held_out"] is True
    assert 0 < about["psnr_db"] < 20, "a red cube is no black picture"
    without = good(run(continuous, splatter, {"outputs": ["reconstruction"]}, item_payload(cube())))
    assert "psnr_db" not in without.meta["reconstruction"]  # type: ignore[operator]


def test_scores_are_best_for_what_was_drawn(splatter: Splatter) -> None:
    (splats,) = splatter._decoder.decode([cube()])
    cameras = sphere_cameras(2)
    black = pictures_of(splatter, cube())
    side = 24
    drawn = [
        render(splats, torch.from_numpy(pose), torch.from_numpy(k), height=side, width=side).colour.clamp(0, 1)
        for pose, k in zip(cameras.world_to_camera, cameras.intrinsics, strict=True)
    ]
    same = PosedPictures(
        pictures=np.stack([(255 * picture).round().byte().numpy() for picture in drawn]),
        world_to_camera=cameras.world_to_camera,
        intrinsics=cameras.intrinsics,
        held_out=False,
    )
    high, low = compare(splats, same)["psnr_db"], compare(splats, black)["psnr_db"]
    assert isinstance(high, float)
    assert isinstance(low, float)
    assert high > 45 > 20 > low


def test_the_start_shows_a_voxel_in_its_colour(splatter: Splatter) -> None:
    (splats,) = splatter._decoder.decode([cube((0.2, 0.6, 0.9))])
    middle = draw(splats, View(side=64, distance=1.2))[0, 32, 32].astype(int)
    assert np.abs(middle - [51, 153, 230]).max() < 20


def test_voxels_of_an_object_lie_where_views_that_made_none_of_them_show_it(splatter: Splatter) -> None:
    asset = decode_asset(arms_glb(), "glb", Limits(), with_pictures=True)
    # Every fourth voxel shows the object as well, in a fourth of the time.
    voxels = Voxels(coords=asset.voxels.coords[::4], feats=asset.voxels.feats[::4])
    views = asset.pictures
    assert views is not None
    assert views.held_out
    some = PosedPictures(
        pictures=views.pictures[::3, ::4, ::4],
        world_to_camera=views.world_to_camera[::3],
        intrinsics=views.intrinsics[::3],
        held_out=True,
    )

    def score(axes: list[int], flipped: int | None, feats: np.ndarray) -> float:
        """PSNR in dB after the axes are taken in that order, and one of them runs the other way."""
        coords = voxels.coords[:, axes]
        if flipped is not None:
            coords[:, flipped] = GRID - 1 - coords[:, flipped]
        order = np.lexsort(coords.T[::-1])
        (splats,) = splatter._decoder.decode([Voxels(coords=coords[order], feats=feats[order])])
        found = compare(splats, some)["psnr_db"]
        assert isinstance(found, float)
        return found

    xyz = [0, 1, 2]
    assert score(xyz, None, voxels.feats) > 16
    wrong = [score(xyz, axis, voxels.feats) for axis in xyz]
    wrong += [score(axes, None, voxels.feats) for axes in ([1, 0, 2], [0, 2, 1], [2, 1, 0])]
    wrong.append(score(xyz, None, voxels.feats.reshape(-1, 3)[:, ::-1].reshape(voxels.feats.shape)))
    assert max(wrong) < 12, wrong


def test_what_is_late_is_not_drawn(splatter: Splatter) -> None:
    (splats,) = splatter._decoder.decode([cube()])
    with pytest.raises(LateError):
        draw(splats, View(side=16), deadline=time.time() - 1)
    assert draw(splats, View(side=16), deadline=math.inf).shape == (1, 16, 16, 3)


async def test_each_picture_is_a_sign_of_life(splatter: Splatter) -> None:
    (splats,) = splatter._decoder.decode([cube()])
    thread = ModelThread()
    moves: list[float | None] = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: moves.append(thread._moved))
    try:
        await thread.run(draw, splats, View(side=16, frames=4))
    finally:
        hook.remove()
        thread.close()
    assert len(moves) == 4
    assert len(set(moves)) == 4
