"""Mesh files of all formats to records: axes, colours, what is missing, what is refused."""

from __future__ import annotations

import json
import struct
from contextlib import suppress

import numpy as np
import pytest
import trimesh

from media.archive import open_archive
from media.asset_sniff import asset_format
from media.errors import MediaError
from media.limits import Limits
from media.mesh import load_mesh, load_mesh_archive
from media.mesh_parts import UNPAINTED
from media.ply import encode_ply
from media.types import Gaussians, Mesh
from tests.media import meshes
from tests.media.posed import ARMS
from tests.media.test_sniff import stl_that_claims
from tests.paths import DATA, needs_data

LIMITS = Limits()


def load(data: bytes, limits: Limits = LIMITS, **options: str) -> Mesh:
    format = asset_format(data)
    assert format is not None
    if format == "zip":
        return load_mesh_archive(open_archive(data, limits), limits, **options)  # type: ignore[arg-type]
    return load_mesh(data, format, limits, **options)  # type: ignore[arg-type]


def refused(data: bytes, format: str | None = None, limits: Limits = LIMITS) -> MediaError:
    with pytest.raises(MediaError) as caught:
        load_mesh(data, format or asset_format(data) or "", limits)
    return caught.value


def colour_of_face(mesh: Mesh, face: int) -> list[int]:
    """RGB in the middle of a face: material, texture at its nearest pixel, vertex colours."""
    assert mesh.material_of_face is not None
    material = mesh.materials[mesh.material_of_face[face]]
    colour = np.array(material.colour[:3])
    corners = mesh.faces[face]
    if material.texture is not None:
        assert mesh.uv is not None
        u, v = mesh.uv[corners].mean(axis=0)
        height, width = material.texture.shape[:2]
        colour = colour * material.texture[int((1 - v) * height), int(u * width), :3] / 255
    if mesh.colours is not None:
        colour = colour * mesh.colours[corners, :3].mean(axis=0) / 255
    return [round(255 * value) for value in colour]


@pytest.mark.parametrize("write", [meshes.arms_ply, meshes.arms_glb, meshes.arms_obj_zip])
def test_each_format_gives_the_same_arms_in_the_same_place(write: object) -> None:
    mesh = load(write())  # type: ignore[operator]
    found = set()
    for face in range(len(mesh.faces)):
        middle = mesh.vertices[mesh.faces[face]].mean(axis=0)
        arms = [
            number
            for number, arm in enumerate(ARMS)
            if ((middle >= np.array(arm.low) - 1e-4) & (middle <= np.array(arm.high) + 1e-4)).all()
        ]
        assert arms, f"a face at {middle} belongs to no arm: an axis is wrong"
        colours = [list(ARMS[number].colour) for number in arms]
        assert colour_of_face(mesh, face) in colours
        found |= set(arms)
    assert found == {0, 1, 2}


def test_up_turns_or_leaves_and_a_guess_is_told() -> None:
    data = meshes.arms_ply()
    as_it_is, turned = load(data), load(data, up="y")
    assert any("z is taken to be up" in note for note in as_it_is.notes)
    assert not any("taken to be up" in note for note in turned.notes)
    x, y, z = as_it_is.vertices.T
    np.testing.assert_allclose(turned.vertices, np.stack([x, -z, y], axis=1))


def test_an_obj_without_its_files_says_so_and_is_grey() -> None:
    whole = load(meshes.arms_obj_zip())
    assert not any("missing" in note for note in whole.notes)
    no_texture = load(meshes.arms_obj_zip(blue_png=None))
    broken = load(meshes.arms_obj_zip(blue_png=b"\x89PNG\r\n\x1a\n" + bytes(40)))
    for mesh, what in ((no_texture, "is missing"), (broken, "is left out")):
        assert any(f"blue.png' {what}" in note and "grey" in note for note in mesh.notes)
        assert mesh.materials[2] == UNPAINTED, "not the leftover colour of its material, which is black"
        assert mesh.materials[:2] == whole.materials[:2]
    plain = load(meshes.arms_obj_zip(arms_mtl=None))
    assert any("arms.mtl' is missing" in note for note in plain.notes)
    assert plain.material_of_face is None


def test_polygons_negative_indices_and_vertex_colours_of_obj() -> None:
    square = b"v 0 0 0 1 0 0\nv 1 0 0 1 0 0\nv 1 1 0 1 0 0\nv 0 1 0 1 0 0\nf -4 -3 -2 -1\n"
    mesh = load(square, up="z")
    assert mesh.faces.shape == (2, 3)
    assert mesh.colours is not None
    assert mesh.colours.tolist() == [[255, 0, 0, 255]] * 4


def test_cutouts_of_gltf() -> None:
    plane = meshes.box((0, 0, 0), (1, 1, 1))
    material = trimesh.visual.material.PBRMaterial(baseColorFactor=[9, 9, 9, 255], alphaMode="MASK", alphaCutoff=0.25)
    plane.visual = trimesh.visual.TextureVisuals(material=material)
    assert load(trimesh.Scene(plane).export(file_type="glb")).materials[0].cutout == pytest.approx(0.25)


def glb(document: dict[str, object], binary: bytes = b"") -> bytes:
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<II", len(text), 0x4E4F534A) + text
    if binary:
        chunks += struct.pack("<II", len(binary), 0x004E4942) + binary
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def triangle(**changed: object) -> bytes:
    document: dict[str, object] = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
        "accessors": [{"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"}],
        "bufferViews": [{"buffer": 0, "byteLength": 36}],
        "buffers": [{"byteLength": 36}],
    }
    return glb({**document, **changed}, np.float32([[0, 0, 0], [1, 0, 0], [0, 1, 0]]).tobytes())


def test_the_triangle_that_the_next_test_spoils_is_good() -> None:
    assert load(triangle()).faces.shape == (1, 3)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"buffers": [{"byteLength": 36, "uri": "http://127.0.0.1/x.bin"}]}, "never fetched"),
        ({"buffers": [{"byteLength": 36, "uri": "../secret.bin"}]}, "never fetched"),
        ({"images": [{"uri": "picture.png"}]}, "never fetched"),
        ({"accessors": [{"bufferView": 0, "componentType": 5126, "count": 4, "type": "VEC3"}]}, "more than"),
        ({"accessors": [{"componentType": 5126, "count": 50_000_000, "type": "VEC3"}]}, "without bufferView"),
        ({"bufferViews": [{"buffer": 0, "byteLength": 360}]}, "past its buffer"),
        ({"buffers": [{"byteLength": 50_000_000_000}]}, "36 are there"),
        ({"nodes": [{"mesh": 0, "children": [1]}, {"children": [0]}]}, "circle"),
        ({"nodes": [{"children": [2]}, {"children": [2]}, {"mesh": 0}]}, "two parents"),
        ({"nodes": [{"mesh": 0}] * 3000}, "3000 nodes"),
        ({"extensionsUsed": ["KHR_draco_mesh_compression"]}, "uncompressed"),
        ({"meshes": [{"primitives": [{"attributes": {"POSITION": -1}}]}]}, "breaks the rules"),
        ({"accessors": "many"}, "breaks the rules"),
    ],
)
def test_gltf_that_lies_or_asks_for_more(changed: dict[str, object], words: str) -> None:
    error = refused(triangle(**changed))
    assert error.status in (413, 415, 422)
    assert words in error.detail


@pytest.mark.parametrize(
    ("data", "format", "code", "words"),
    [
        (b"v 0 0 0\nv 1 0 0\nv 0 1 0\n", "obj", "empty_object", "no faces"),
        (b"v 0 0 0\nv 1 0 0\nf 1 2 99\n", "obj", "corrupt_media", "entry 99 of 2"),
        (b"v 0 0 0\nv nan 0 0\nv 0 1 0\nf 1 2 3\n", "obj", "non_finite_input", "not finite"),
        (b"v 0 0 0\nv 1e30 0 0\nv 0 1 0\nf 1 2 3\n", "obj", "corrupt_media", "beyond"),
        (b"v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n", "obj", "empty_object", "without area"),
        (b"v 0 0 0\nv a b c\nf 1 2 3\n", "obj", "corrupt_media", "line 2"),
        (b"# nothing\n", "obj", "empty_object", "no faces"),
        (stl_that_claims(50_000_000), "stl", "item_too_large", "50000000 faces or more; at most 2000000"),
        (stl_that_claims(50_000_000, 0), "stl", "item_too_large", "50000000 faces or more; at most 2000000"),
        (
            stl_that_claims(3, header=b"solid by name"),
            "stl",
            "corrupt_media",
            "3 faces, which are 234 bytes; it has 184",
        ),
        (b"solid nothing\nendsolid nothing\n", "stl", "empty_object", "no faces"),
        (stl_that_claims(0, 0), "stl", "empty_object", "no faces"),
        (b"cut", "stl", "corrupt_media", "cut short: it has 3 bytes"),
        (b"OFF\n3000000 1 0\n" + bytes(7_000_000), "off", "item_too_large", "3000000 vertices"),
        (b"OFF\n3 50000000 0\n0 0 0\n", "off", "corrupt_media", "50000000 faces"),
        (
            b"ply\nformat binary_little_endian 1.0\nelement vertex 3\nproperty float x\nproperty float y\n"
            b"property float z\nelement face 50000000\nproperty list uchar int vertex_indices\nend_header\n"
            + bytes(36),
            "ply",
            "corrupt_media",
            "50000000 x face",
        ),
        (
            b"ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nend_header\n0\n1\n",
            "ply",
            "empty_object",
            "2 points",
        ),
        (b"ply\nformat ascii 1.0\n" + bytes(100_000), "ply", "corrupt_media", "no end"),
    ],
)
def test_meshes_that_are_none(data: bytes, format: str, code: str, words: str) -> None:
    error = refused(data, format)
    assert (error.code, words in error.detail) == (code, True), error


def test_limits_count_what_is_there() -> None:
    small = Limits(mesh_faces=20)
    assert refused(meshes.arms_ply(), limits=small).code == "item_too_large"
    with pytest.raises(MediaError, match="at most 20"):
        load(meshes.arms_obj_zip(), limits=small)
    assert refused(meshes.arms_ply(), limits=Limits(mesh_bytes=100)).limit == 100


def test_gaussian_splats_are_told_apart() -> None:
    none = np.zeros((1, 4), np.float32)
    splats = Gaussians(
        positions=none[:, :3], colours=none[:, :3], opacities=none[:, 0], scales=none[:, :3], rotations=none + 1
    )
    error = refused(encode_ply(splats))
    assert error.code == "unsupported_media_type"
    assert "Gaussian splats" in error.detail


@pytest.mark.parametrize("write", [meshes.arms_ply, meshes.arms_glb, meshes.arms_obj_zip])
def test_spoilt_files_give_media_errors_only(write: object) -> None:
    whole = write()  # type: ignore[operator]
    chance = np.random.default_rng(5)
    for _ in range(150):
        data = bytearray(whole)
        if chance.random() < 0.3:
            del data[int(chance.integers(1, len(data))) :]
        else:
            for place in chance.integers(0, len(data), int(chance.integers(1, 6))):
                data[place] = int(chance.integers(256))
        if asset_format(bytes(data)) is None:
            continue
        with suppress(MediaError):
            load(bytes(data))


@needs_data
@pytest.mark.parametrize(
    "name", ["blendswap_cc_by_hamburger.zip", "bunny_npm.off", "cv_bunny.ply", "reallusion_female03.glb"]
)
def test_real_meshes(name: str) -> None:
    mesh = load((DATA / "meshes" / "eval" / name).read_bytes())
    assert len(mesh.faces) > 3000
    if name.endswith((".zip", ".glb")):
        assert any(material.texture is not None for material in mesh.materials)
    else:
        assert mesh.material_of_face is None
