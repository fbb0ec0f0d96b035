"""Views to voxels: the right cells, colours and directions. The published case is in tests/conformance."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest

from media.cameras import Cameras, read_transforms
from media.errors import MediaError
from media.multiview import Views, choose_patches, prepare_images, surface_points, voxelize
from media.types import Voxels
from tests.media.posed import ARMS, cameras, directions, draw, transforms


@pytest.fixture(scope="module")
def arms() -> Views:
    return draw(ARMS)


def misplaced(voxels: Voxels) -> int:
    """Cells that are not on the surface of the arms, plus 1000 for each arm whose tip is bare or of another colour."""
    centres = (voxels.coords + 0.5) / 64 - 0.5
    on_arms = np.zeros(len(centres), bool)
    wrong = 0
    for axis, box in enumerate(ARMS):
        within = ((centres >= np.array(box.low) - 1 / 64) & (centres <= np.array(box.high) + 1 / 64)).all(axis=1)
        on_arms |= within
        tip = within & (centres[:, axis] > box.high[axis] - 0.1)
        colour = voxels.feats[tip].reshape(-1, 3).mean(axis=0) if tip.any() else np.zeros(3)
        others = np.delete(colour, axis)
        wrong += 1000 * int(tip.sum() < 100 or colour[axis] < 0.7 or others.max() > 0.15)
    return wrong + int((~on_arms).sum())


def test_an_asymmetric_object_stands_where_it_was_with_its_colours(arms: Views) -> None:
    voxels = voxelize(arms)
    assert voxels.coords.dtype == np.int32
    assert voxels.feats.dtype == np.float32
    assert voxels.feats.shape == (len(voxels.coords), 768)
    assert misplaced(voxels) == 0
    assert np.array_equal(voxels.coords, np.unique(voxels.coords, axis=0)), "sorted by x, y, z, each once"


@pytest.mark.parametrize(
    ("order", "signs"),
    [
        (order, signs)
        for order in permutations(range(3))
        for signs in product((1, -1), repeat=3)
        if (order, signs) != ((0, 1, 2), (1, 1, 1))
    ],
)
def test_the_check_above_sees_every_flip_and_swap_of_the_grid(
    arms: Views, order: tuple[int, ...], signs: tuple[int, ...]
) -> None:
    voxels = voxelize(arms)
    turned = np.where(np.array(signs) > 0, voxels.coords, 63 - voxels.coords)[:, order]
    assert misplaced(dataclasses.replace(voxels, coords=turned.astype(np.int32))) > 100


@pytest.mark.parametrize(
    "spoil",
    [
        lambda pixels: pixels[:, ::-1],
        lambda pixels: pixels[::-1],
        lambda pixels: pixels.swapaxes(0, 1),
        lambda pixels: pixels[:, :, [2, 1, 0, 3]],
    ],
    ids=["mirrored", "upside down", "rows for columns", "BGR"],
)
def test_the_check_above_sees_pictures_turned_against_their_depth(arms: Views, spoil: Callable[[Any], Any]) -> None:
    assert misplaced(voxelize(dataclasses.replace(arms, images=[spoil(pixels) for pixels in arms.images]))) >= 1000


def test_surface_points_lie_on_the_surface(arms: Views) -> None:
    points = np.concatenate(list(surface_points(arms)))
    off = [
        np.maximum(np.abs(points - (np.array(box.low) + box.high) / 2) - (np.array(box.high) - box.low) / 2, -1).max(
            axis=1
        )
        for box in ARMS
    ]
    assert len(points) > 10_000
    assert np.abs(np.min(off, axis=0)).max() < 2e-6


def straight_down(points: list[list[float]], depths: list[float] | None = None) -> Views:
    """A camera 1 above each point, its principal point in the corner; the only pixel's depth is 1 unless given."""
    poses = np.tile(np.eye(4, dtype=np.float32), (len(points), 1, 1))
    poses[:, 1:3] *= -1
    poses[:, :3, 3] = [[-x, y, z + 1] for x, y, z in points]
    intrinsics = np.tile(np.eye(3, dtype=np.float32), (len(points), 1, 1))
    return Views(
        images=[np.full((4, 4, 3), 51, np.uint8)] * len(points),
        depths=[np.full((1, 1), depth, np.float32) for depth in depths or [1.0] * len(points)],
        cameras=Cameras(world_to_camera=poses, intrinsics=intrinsics),
    )


@pytest.mark.parametrize(
    ("point", "cells"),
    [
        ([0.001, 0.001, 0.001], {(32, 32, 32)}),
        ([0.0, 0.001, 0.001], {(31, 32, 32), (32, 32, 32)}),
        ([0.0, 0.25, 0.001], {(31, 47, 32), (31, 48, 32), (32, 47, 32), (32, 48, 32)}),
        ([0.5, 0.001, -0.499], {(63, 32, 0)}),
        ([-0.5, 0.001, 0.499], {(0, 32, 63)}),
        ([0.0, 0.0, 0.0], set(product((31, 32), repeat=3))),
    ],
    ids=str,
)
def test_a_point_on_a_face_is_in_both_cells(point: list[float], cells: set[tuple[int, ...]]) -> None:
    views = straight_down([point])
    assert next(surface_points(views))[0] == pytest.approx(point, abs=1e-7)
    assert set(map(tuple, voxelize(views).coords.tolist())) == cells


def test_cells_equal_the_published_comparison_of_every_point_with_every_centre() -> None:
    rng = np.random.default_rng(5)
    # Multiples of a quarter cell, some a little beside: many of them on faces and edges, some outside of the cube.
    grid = rng.integers(-140, 140, (600, 3)) / 256 + rng.choice([0, 0, 3e-8, -3e-8, -1e-9, 1e-6], (600, 3))
    views = straight_down(grid.tolist())
    points = np.concatenate(list(surface_points(views)))
    centres = ((2 * np.arange(64) + 1) / 128 - 0.5).astype(np.float32)
    near = np.abs(points[:, :, None] - centres) <= np.float32(1 / 128)
    wanted = np.unique(np.argwhere(np.einsum("ni,nj,nk->ijk", *near.swapaxes(0, 1).astype(np.float32)) > 0), axis=0)
    assert len(wanted) > 600
    assert np.array_equal(voxelize(views).coords, wanted)


def test_the_nearest_view_by_planar_depth_gives_the_patch_and_the_first_of_equals_wins() -> None:
    views = draw(ARMS, count=6)
    rig = views.cameras
    coords = voxelize(views).coords
    choice = choose_patches(coords, rig)
    centres = np.concatenate([(coords + 0.5) / 64 - 0.5, np.ones((len(coords), 1))], axis=1)
    depths = np.einsum("vij,nj->vni", rig.world_to_camera.astype(np.float64), centres)[..., 2]
    picked = depths[choice.view, np.arange(len(coords))]
    assert np.abs(picked - depths.min(axis=0)).max() < 1e-6
    twice = Cameras(world_to_camera=np.repeat(rig.world_to_camera, 2, 0), intrinsics=np.repeat(rig.intrinsics, 2, 0))
    assert np.array_equal(choose_patches(coords, twice).view, 2 * choice.view)


def test_a_centre_outside_of_the_nearest_picture_is_black_and_noted() -> None:
    # The two points' cells have their centres to either side of the rays, which run along the pictures' corners.
    voxels = voxelize(straight_down([[0.001, -0.001, 0.001], [-0.001, 0.001, 0.001]]))
    assert voxels.coords.tolist() == [[31, 32, 32], [32, 31, 32]]
    assert voxels.feats.max(axis=1) == pytest.approx([0.2, 0.2])
    aside = straight_down([[0.001, -0.001, 0.001], [-0.001, 0.001, 0.001]])
    lenses = aside.cameras.intrinsics * np.array([[30, 1, 1], [1, 30, 1], [1, 1, 1]], np.float32)
    voxels = voxelize(changed(aside, cameras=Cameras(world_to_camera=aside.cameras.world_to_camera, intrinsics=lenses)))
    assert voxels.feats.max(axis=1) == pytest.approx([0.0, 0.2])
    assert voxels.notes == ("1 of 2 voxels lie outside of their nearest view's picture and are black",)


def test_transparency_is_dropped_after_a_weighted_resize_and_kept_colours_at_full_size() -> None:
    large = np.zeros((512, 512, 4), np.uint8)
    large[:, :, 0] = 200
    large[:, :256, 3] = 255
    [shrunk] = prepare_images([large])
    assert (shrunk[:, :128, 0] >= 195).all(), "partly covered pixels are not mixed with black"
    assert (shrunk[:, 134:] == 0).all()
    [copied] = prepare_images([large[:256, 128:384]])
    assert (copied == [200, 0, 0]).all(), "hidden colours of a picture that needs no resize survive, as published"


@pytest.mark.parametrize("depth", [-1.0, -np.inf, np.inf, 1e10, 2e6])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_depth_that_is_negative_or_far_away_is_no_surface(depth: float, dtype: type[np.floating]) -> None:
    views = straight_down([[0.1, 0.1, 0.1], [0.2, 0.2, 0.2]], [1.0, -1.0])
    with np.errstate(over="ignore"):
        depths = [views.depths[0], np.full((1, 1), depth, dtype)]
    voxels = voxelize(changed(views, depths=depths))
    assert voxels.coords.tolist() == [[38, 38, 38]]
    assert voxels.notes == ()


def test_a_depth_of_0_is_a_surface_at_the_camera() -> None:
    assert voxelize(straight_down([[0.1, 0.1, -0.8]], [0.0])).coords.tolist() == [[38, 38, 44]]


def test_what_lies_outside_of_the_cube_is_noted() -> None:
    voxels = voxelize(straight_down([[0.1, 0.1, 0.1], [0.2, 0.2, 0.2]], [1.0, 3.0]))
    assert voxels.notes == ("1 of 2 surface pixels lie outside of the cube and are ignored",)


def changed(views: Views, **parts: Any) -> Views:
    return dataclasses.replace(views, **parts)


def with_pose(views: Views, view: int, rows: Any) -> Views:
    poses = views.cameras.world_to_camera.copy()
    poses[view] = rows
    return changed(views, cameras=Cameras(world_to_camera=poses, intrinsics=views.cameras.intrinsics))


def with_lens(views: Views, rows: Any) -> Views:
    lenses = views.cameras.intrinsics.copy()
    lenses[1] = rows
    return changed(views, cameras=Cameras(world_to_camera=views.cameras.world_to_camera, intrinsics=lenses))


def holed(views: Views) -> Views:
    depths = [depth.copy() for depth in views.depths]
    depths[2][3, 4] = np.nan
    return changed(views, depths=depths)


SINGULAR = np.diag([1.0, 1.0, 0.0, 1.0])
BAD_VIEWS: dict[str, tuple[Callable[[Views], Views], str, str]] = {
    "singular pose": (lambda v: with_pose(v, 1, SINGULAR), "invalid_camera", "view 1: world_to_camera is singular"),
    "rank one": (
        lambda v: with_pose(v, 1, np.ones((4, 4)) * [[1], [1], [1], [0]] + SINGULAR * [[0], [0], [0], [1]]),
        "invalid_camera",
        "singular|last row",
    ),
    "zero pose": (lambda v: with_pose(v, 0, np.diag([0, 0, 0, 1.0])), "invalid_camera", "view 0.*singular"),
    "NaN pose": (lambda v: with_pose(v, 2, np.full((4, 4), np.nan)), "invalid_camera", "view 2: .*not finite"),
    "mirrored pose": (lambda v: with_pose(v, 2, np.diag([-1, 1, 1, 1.0])), "invalid_camera", "view 2: .*mirrors"),
    "projective pose": (lambda v: with_pose(v, 2, np.eye(4) + np.eye(4)[::-1]), "invalid_camera", "last row.*1 0 0 1"),
    "no focal length": (lambda v: with_lens(v, np.diag([0, 1, 1.0])), "invalid_camera", "view 1: intrinsics"),
    "negative focal length": (lambda v: with_lens(v, np.diag([-1, 1, 1.0])), "invalid_camera", "fx and fy above 0"),
    "infinite lens": (lambda v: with_lens(v, np.diag([np.inf, 1, 1.0])), "invalid_camera", "not finite"),
    "3x4 poses": (
        lambda v: changed(
            v, cameras=Cameras(world_to_camera=v.cameras.world_to_camera[:, :3], intrinsics=v.cameras.intrinsics)
        ),
        "invalid_camera",
        r"float32 \[V, 4, 4\], not float32 \(4, 3, 4\)",
    ),
    "a lens short": (
        lambda v: changed(
            v, cameras=Cameras(world_to_camera=v.cameras.world_to_camera, intrinsics=v.cameras.intrinsics[1:])
        ),
        "view_mismatch",
        "4 matrices in world_to_camera, 3 in intrinsics",
    ),
    "an image short": (lambda v: changed(v, images=v.images[1:]), "view_mismatch", "3 images, 4 depth maps, 4 cameras"),
    "a depth map short": (lambda v: changed(v, depths=v.depths[1:]), "view_mismatch", "4 images, 3 depth maps"),
    "no views": (
        lambda v: Views(
            images=[],
            depths=[],
            cameras=Cameras(world_to_camera=v.cameras.world_to_camera[:0], intrinsics=v.cameras.intrinsics[:0]),
        ),
        "view_mismatch",
        "0 images, 0 depth maps, 0 cameras",
    ),
    "NaN depth": (holed, "non_finite_input", "view 2: depth row 3, column 4 is NaN"),
    "integer depth": (
        lambda v: changed(v, depths=[d.astype(np.int32) for d in v.depths]),
        "invalid_parameter",
        "int32",
    ),
    "empty depth": (lambda v: changed(v, depths=[d[:0, :0] for d in v.depths]), "invalid_parameter", r"\(0, 0\)"),
    "oblong depth": (lambda v: changed(v, depths=[d[:16] for d in v.depths]), "view_mismatch", "depth map is 32x16"),
    "oblong image": (lambda v: changed(v, images=[i[:, :16] for i in v.images]), "view_mismatch", "image is 16x32"),
    "depth of two sizes": (
        lambda v: changed(v, depths=[*v.depths[:3], v.depths[3][:16, :16]]),
        "view_mismatch",
        "view 3: the depth map's side is 16, that of view 0 is 32",
    ),
    "grey image": (
        lambda v: changed(v, images=[i[:, :, 0] for i in v.images]),
        "invalid_parameter",
        "view 0: an image",
    ),
    "float image": (lambda v: changed(v, images=[i / 255.0 for i in v.images]), "invalid_parameter", "float64"),
    "nothing seen": (
        lambda v: changed(v, depths=[d * 0 - 1 for d in v.depths]),
        "empty_object",
        "none of the 4 depth maps",
    ),
    "all outside": (
        lambda v: changed(v, depths=[np.where(d < 0, d, d + 9) for d in v.depths]),
        "empty_object",
        r"fills no voxel: its \d+ surface pixels lie at x .* to .*, all outside of -0.5 to 0.5",
    ),
}


@pytest.mark.parametrize("name", BAD_VIEWS)
def test_bad_views_are_refused_by_name(name: str) -> None:
    spoil, code, message = BAD_VIEWS[name]
    with pytest.raises(MediaError, match=message) as caught:
        voxelize(spoil(draw(ARMS, count=4, side=32)))
    assert caught.value.code == code
    assert caught.value.status == 422


def test_transforms_give_the_cameras_they_describe() -> None:
    eyes = directions(5) * 2
    document = json.loads(json.dumps(transforms(eyes)))
    names, rig = read_transforms(document)
    assert names == ("000.png", "001.png", "002.png", "003.png", "004.png")
    origin = rig.world_to_camera @ np.array([0, 0, 0, 1], np.float32)
    assert origin[:, :3] == pytest.approx(np.tile([0, 0, 2], (5, 1)), abs=1e-6)
    above = rig.intrinsics[0] @ (rig.world_to_camera[0] @ np.array([0, 0, 0.1, 1], np.float32))[:3]
    assert above[1] / above[2] < 0.5, "up in the world is up in the picture, at a smaller v"
    shared = {
        "camera_angle_x": 1.0,
        "frames": [{**document["frames"][0], "camera_angle_x": 1.0}, document["frames"][1]],
    }
    del shared["frames"][1]["camera_angle_x"]
    lenses = read_transforms(shared)[1].intrinsics
    assert np.array_equal(lenses[0], lenses[1])


def frame(**parts: Any) -> dict[str, Any]:
    return {"frames": [transforms(directions(1) * 2)["frames"][0] | parts]}


BAD_DOCUMENTS: dict[str, tuple[Any, str]] = {
    "list": ([], '"frames"'),
    "no frames": ({"frames": []}, '"frames"'),
    "frames no list": ({"frames": {}}, '"frames"'),
    "frame no object": ({"frames": [3]}, "frame 0"),
    "no name": (frame(file_path=None), 'frame 0: must be an object with a text "file_path"'),
    "no matrix": (frame(transform_matrix=None), "frame 0: transform_matrix is missing or not 4 rows of 4 numbers"),
    "ragged matrix": (frame(transform_matrix=[[1, 0, 0, 0], [0, 1]]), "4 rows of 4 numbers"),
    "text in matrix": (frame(transform_matrix=[["1"] * 4] * 4), "4 rows of 4 numbers"),
    "singular": (frame(transform_matrix=SINGULAR.tolist()), "frame 0: transform_matrix is singular"),
    "NaN": (frame(transform_matrix=(np.eye(4) * np.nan).tolist()), "not finite"),
    "huge": (frame(transform_matrix=[[10**400] * 4] * 4), "4 rows of 4 numbers"),
    "mirrored": (frame(transform_matrix=np.diag([1.0, 1, -1, 1]).tolist()), "mirrors"),
    "no angle": (frame(camera_angle_x=None), "camera_angle_x is missing or not a number"),
    "angle 0": (frame(camera_angle_x=0), "between 0 and pi, not 0"),
    "angle pi": (frame(camera_angle_x=4.0), "between 0 and pi, not 4"),
    "NaN angle": (frame(camera_angle_x=float("nan")), "between 0 and pi, not nan"),
    "true angle": (frame(camera_angle_x=True), "not a number"),
}


@pytest.mark.parametrize("name", BAD_DOCUMENTS)
def test_bad_transforms_are_refused_by_name(name: str) -> None:
    document, message = BAD_DOCUMENTS[name]
    with pytest.raises(MediaError, match=message) as caught:
        read_transforms(document)
    assert caught.value.code == "invalid_camera"


def test_sixteen_cameras_cover_the_object_from_all_sides() -> None:
    centres = np.linalg.inv(cameras(16).world_to_camera)[:, :3, 3]
    assert np.abs(centres.mean(axis=0)).max() < 0.1
