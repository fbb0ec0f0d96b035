"""Meshes drawn from all sides: depth that is right, colours at their place, nothing mirrored."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import trimesh

from media.asset import decode_asset
from media.limits import Limits
from media.mesh import load_mesh
from media.mesh_parts import UNPAINTED
from media.mesh_views import SIDE, VIEWS, normalize, on_black, render_views, sphere_cameras
from media.multiview import voxelize
from media.types import Material, Mesh
from tests.media import meshes
from tests.media.test_multiview import misplaced


def record(mesh: trimesh.Trimesh, **paint: object) -> Mesh:
    return Mesh(vertices=np.float32(mesh.vertices), faces=np.int32(mesh.faces), **paint)  # type: ignore[arg-type]


def quad(material: Material, z: float = 0.0, side: float = 1.0) -> Mesh:
    """An upright square in the plane y = -z, facing -y: x to the right, z up, uv over all of it."""
    h = side / 2
    return Mesh(
        vertices=np.float32([[-h, z, -h], [h, z, -h], [h, z, h], [-h, z, h]]),
        faces=np.int32([[0, 1, 2], [0, 2, 3]]),
        materials=(material,),
        material_of_face=np.zeros(2, np.int32),
        uv=np.float32([[0, 0], [1, 0], [1, 1], [0, 1]]),
    )


@pytest.mark.parametrize("write", [meshes.arms_ply, meshes.arms_glb])
def test_arms_stand_where_they_were_with_their_colours(write: object) -> None:
    data = write()  # type: ignore[operator]
    mesh = load_mesh(data, "ply" if data.startswith(b"ply") else "glb", Limits())
    views = render_views(mesh, sphere_cameras(16), 192)
    assert misplaced(voxelize(views)) == 0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_check_sees_a_flipped_axis(axis: int) -> None:
    mesh = load_mesh(meshes.arms_ply(), "ply", Limits())
    mesh.vertices[:, axis] *= -1
    assert misplaced(voxelize(render_views(mesh, sphere_cameras(12), 128))) > 500


def test_depth_of_a_sphere_is_the_planar_distance() -> None:
    radius, side = 0.4, 128
    ball = record(trimesh.creation.icosphere(subdivisions=5, radius=radius))
    cameras = sphere_cameras(5)
    views = render_views(ball, cameras, side)
    step = (2 * np.arange(side) / side - 1) * math.tan(math.radians(20))
    rays = np.stack(
        [np.broadcast_to(step, (side, side)), np.broadcast_to(step[:, None], (side, side)), np.ones((side, side))]
    )
    a, b, c = (rays**2).sum(axis=0), -2 * 2.0 * rays[2], 2.0**2 - radius**2
    root = b**2 - 4 * a * c
    exact = np.where(root > 0, (-b - np.sqrt(np.maximum(root, 0))) / (2 * a), -1)
    sure = np.abs(root) > 0.05
    for depth in views.depths:
        assert ((depth > 0) == (exact > 0))[sure].all()
        inner = sure & (exact > 0)
        assert np.abs(depth - exact)[inner].max() < 2e-3


def test_a_texture_is_not_mirrored_and_not_upside_down() -> None:
    texture = np.zeros((8, 8, 4), np.uint8)
    texture[..., 3] = 255
    texture[:4, :4, 0] = 255  # red: upper left
    texture[:4, 4:, 1] = 255  # green: upper right
    texture[4:, :4, 2] = 255  # blue: lower left
    cameras = sphere_cameras(1, turn=-math.pi / 2)  # on the equator, at -y
    (picture,) = render_views(quad(Material(texture=texture)), cameras, 64).images
    assert picture[22, 22, :3].tolist() == [255, 0, 0]
    assert picture[22, 42, :3].tolist() == [0, 255, 0]
    assert picture[42, 22, :3].tolist() == [0, 0, 255]
    assert picture[42, 42, :3].tolist() == [0, 0, 0]
    assert picture[2, 2, 3] == 0


def test_holes_show_what_is_behind() -> None:
    texture = np.zeros((4, 4, 4), np.uint8)
    texture[..., :] = (0, 255, 0, 255)
    texture[:, :2, 3] = 0  # the left half is cut out
    leaf, wall = quad(Material(texture=texture, cutout=0.5)), quad(Material(colour=(1.0, 0.0, 0.0, 1.0)), z=0.3)
    both = Mesh(
        vertices=np.concatenate([leaf.vertices, wall.vertices]),
        faces=np.concatenate([leaf.faces, wall.faces + 4]),
        materials=leaf.materials + wall.materials,
        material_of_face=np.int32([0, 0, 1, 1]),
        uv=np.concatenate([leaf.uv, wall.uv]),  # type: ignore[arg-type]
    )
    views = render_views(both, sphere_cameras(1, turn=-math.pi / 2), 64)
    assert views.images[0][32, 24, :3].tolist() == [255, 0, 0]
    assert views.images[0][32, 40, :3].tolist() == [0, 255, 0]
    assert views.depths[0][32, 24] == pytest.approx(2.3, abs=1e-3)
    assert views.depths[0][32, 40] == pytest.approx(2.0, abs=1e-3)


def test_unpainted_meshes_are_grey_with_a_shape_that_light_shows() -> None:
    views = render_views(record(meshes.box((-0.4, -0.4, -0.4), (0.4, 0.4, 0.4))), sphere_cameras(12), 96)
    shades = set()
    for picture in views.images:
        seen = picture[picture[..., 3] == 255][:, :3]
        assert (seen == seen[:, :1]).all(), "grey"
        shades |= set(np.unique(seen[:, 0]).tolist())
    # Six sides, each of one shade whatever the camera.
    assert len(shades) == 6


def test_what_has_lost_its_texture_is_drawn_like_an_unpainted_mesh_times_its_colours() -> None:
    bare = record(meshes.box((-0.4, -0.4, -0.4), (0.4, 0.4, 0.4)))
    owner = np.zeros(len(bare.faces), np.int32)
    lost = replace(bare, materials=(UNPAINTED, Material()), material_of_face=owner)
    colours = np.full((len(bare.vertices), 4), (255, 51, 0, 255), np.uint8)
    cameras = sphere_cameras(3)
    pictures = [
        np.stack(render_views(mesh, cameras, 48).images)
        for mesh in (bare, lost, replace(lost, colours=colours), replace(lost, material_of_face=owner + 1))
    ]
    assert np.array_equal(pictures[1], pictures[0])
    times = pictures[0] * np.array([1, 0.2, 0, 1])
    assert np.abs(pictures[2] - times).max() <= 1
    assert (pictures[3][pictures[3][..., 3] > 0] == 255).all(), "beside it what has a colour is without light"


def test_normalize_fills_the_cube_and_nothing_falls_out() -> None:
    mesh = normalize(record(meshes.box((10, 20, 30), (14, 21, 32))))
    low, high = mesh.vertices.min(axis=0), mesh.vertices.max(axis=0)
    np.testing.assert_allclose(low, -high, atol=1e-6)
    assert 0.999 < (high - low)[0] < 1
    assert (high - low)[1] == pytest.approx((high - low)[0] / 4, rel=1e-5)
    voxels = voxelize(render_views(mesh, sphere_cameras(12), 128))
    assert not any("outside" in note for note in voxels.notes)


def test_cameras_look_at_the_middle_from_all_around() -> None:
    cameras = sphere_cameras(24)
    cameras.check()
    eyes = np.array([-pose[:3, :3].T @ pose[:3, 3] for pose in cameras.world_to_camera])
    np.testing.assert_allclose(np.linalg.norm(eyes, axis=1), 2, rtol=1e-5)
    np.testing.assert_allclose(eyes.mean(axis=0), 0, atol=0.1)
    np.testing.assert_allclose(cameras.world_to_camera[:, :3, 3], [[0, 0, 2]] * 24, atol=1e-6)
    others = sphere_cameras(6, turn=math.pi / 5)
    gaps = np.linalg.norm(cameras.world_to_camera[:, None, 2, :3] - others.world_to_camera[None, :, 2, :3], axis=2)
    assert gaps.min() > 0.05, "views that are held out are no views of the first set"


def test_a_reconstruction_of_a_mesh_is_compared_with_views_that_made_no_voxel() -> None:
    asset = decode_asset(meshes.arms_glb(), "glb", Limits(), with_pictures=True)
    plain = decode_asset(meshes.arms_glb(), "glb", Limits())
    assert np.array_equal(asset.voxels.feats, plain.voxels.feats)
    assert np.array_equal(asset.voxels.coords, plain.voxels.coords)
    assert asset.pictures is not None
    assert asset.pictures.held_out is True
    made = voxelize(render_views(normalize(load_mesh(meshes.arms_glb(), "glb", Limits())), sphere_cameras(VIEWS), SIDE))
    assert np.array_equal(asset.voxels.feats, made.feats), "these are the views that the next lines are about"
    used, compared = sphere_cameras(VIEWS).world_to_camera, asset.pictures.world_to_camera
    gaps = np.linalg.norm(compared[:, None, 2, :3] - used[None, :, 2, :3], axis=2)
    assert gaps.min() > 0.05


def test_a_mesh_without_area_and_one_around_the_cameras() -> None:
    thin = Mesh(vertices=np.float32([[0, 0, 0], [0.4, 0, 0], [0.8, 0, 0]]), faces=np.int32([[0, 1, 2]]))
    assert all((depth == -1).all() for depth in render_views(thin, sphere_cameras(3), 32).depths)
    around = record(trimesh.creation.box(extents=(9, 9, 9)))
    for depth in render_views(around, sphere_cameras(3), 32).depths:
        # Sides that reach behind the camera are left out; what is drawn lies before it, at the walls.
        assert depth.max() < 9
        assert (depth[depth > 0] > 2).all()


def test_on_black() -> None:
    picture = np.uint8([[[200, 100, 50, 255], [200, 100, 50, 0], [200, 100, 50, 128]]])
    assert on_black(picture).tolist() == [[[200, 100, 50], [0, 0, 0], [100, 50, 25]]]
