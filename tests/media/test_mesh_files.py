"""Mesh files of all formats: where the surface is, what it is painted with, and what is refused."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from media.archive import open_archive
from media.errors import MediaError
from media.limits import Limits
from media.mesh import MESH_FORMATS, load_mesh, load_mesh_archive, sniff_mesh
from media.mesh_parts import UNPAINTED
from media.ply import encode_ply
from media.types import Gaussians, Mesh
from tests.media import mesh_files as meshes
from tests.paths import DATA, needs_data

LIMITS = Limits()
TRAIN = ("augalas.glb", "antiquechair.zip", "forklift.ply", "largefridge.stl", "pianobench.off", "bonsai_tree.zip")
# Triangles as another reader (trimesh 5.2) counts them.
FACES = {
    **{"blendswap_cc_by_arbolito.ply": 26184, "blendswap_cc_by_biurko3.glb": 17144, "blendswap_cc_by_chest.glb": 7868},
    **{"blendswap_cc_by_coffeetable.off": 220, "blendswap_cc_by_horse.glb": 10184, "bunny_npm.obj": 3674},
    **{"blendswap_cc_by_surveillancecamera.stl": 6019, "blendswap_cc_by_toytrain.zip": 39784, "cv_bunny.ply": 3851},
    **{"reallusion_holdingfemale03.zip": 7354, "pv_airplane.ply": 2452, "bunny_npm.off": 3674},
}


def load(data: bytes, **options: Any) -> Mesh:
    if data.startswith(b"PK"):
        return load_mesh_archive(open_archive(data, LIMITS), LIMITS, **options)
    found = sniff_mesh(data)
    assert found in MESH_FORMATS
    return load_mesh(data, found, LIMITS, **options)


def refused(data: bytes, format: str, limits: Limits = LIMITS) -> MediaError:
    with pytest.raises(MediaError) as caught:
        load_mesh(data, format, limits)
    return caught.value


def check(mesh: Mesh) -> None:
    """What the record promises."""
    assert mesh.vertices.dtype == np.float32
    assert np.isfinite(mesh.vertices).all()
    assert mesh.faces.dtype == np.int32
    assert mesh.faces.min() >= 0
    assert mesh.faces.max() < len(mesh.vertices)
    for array, width in ((mesh.uv, 2), (mesh.colours, 4)):
        assert array is None or array.shape == (len(mesh.vertices), width)
    if mesh.material_of_face is None:
        assert not mesh.materials
    else:
        assert mesh.material_of_face.shape == (len(mesh.faces),)
        assert 0 <= mesh.material_of_face.min() <= mesh.material_of_face.max() < len(mesh.materials)


def painted_places(mesh: Mesh) -> dict[tuple[float, ...], tuple[int, ...]]:
    """Middle of each face -> RGB there, by the nearest texel."""
    assert mesh.material_of_face is not None
    found = {}
    for face, number in zip(mesh.faces, mesh.material_of_face, strict=True):
        material = mesh.materials[number]
        colour = np.array(material.colour[:3])
        if mesh.colours is not None:
            colour = colour * mesh.colours[face, :3].mean(axis=0) / 255
        if material.texture is not None:
            assert mesh.uv is not None
            u, v = mesh.uv[face].mean(axis=0) % 1
            height, width = material.texture.shape[:2]
            colour = colour * material.texture[int((1 - v) * height), int(u * width), :3] / 255
        middle = mesh.vertices[face].mean(axis=0).round(3) + 0.0
        found[tuple(middle.tolist())] = tuple((colour * 255).round().astype(int).tolist())
    return found


EXPECTED = {
    tuple((meshes.POINTS[face].mean(axis=0).round(3) + 0.0).tolist()): tuple(colour.tolist())
    for face, colour in zip(meshes.FACES, meshes.COLOURS, strict=True)
}


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(meshes.textured_gltf().glb(), id="glb, texture"),
        pytest.param(meshes.coloured_gltf().glb(), id="glb, vertices"),
        pytest.param(meshes.factors_gltf().glb(), id="glb, factors"),
        pytest.param(meshes.textured_gltf().gltf(), id="gltf, data URL"),
        pytest.param(meshes.obj_zip(), id="obj zip, texture"),
        pytest.param(meshes.factors_obj_zip(), id="obj zip, colours"),
        pytest.param(meshes.coloured_obj(), id="obj, vertices"),
        pytest.param(meshes.ply(), id="ply"),
        pytest.param(meshes.ply("binary_big_endian"), id="ply, big endian"),
        pytest.param(meshes.ply("ascii"), id="ply, text"),
        pytest.param(meshes.ply(of_faces=True), id="ply, faces"),
        pytest.param(meshes.ply("ascii", of_faces=True), id="ply, text, faces"),
        pytest.param(meshes.off(), id="off, vertices"),
        pytest.param(meshes.off(of_faces=True), id="off, faces"),
        pytest.param(meshes.zipped(**{"scene/model__glb": meshes.textured_gltf().glb()}), id="glb in a zip"),
    ],
)
def test_every_format_puts_the_same_colours_at_the_same_places(data: bytes) -> None:
    mesh = load(data)
    check(mesh)
    places = painted_places(mesh)
    assert places.keys() == EXPECTED.keys()
    assert places == EXPECTED


def test_bytes_of_a_text_are_shades_not_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    shades = np.array([[200, 100, 3], [1, 128, 77], [2, 0, 254]], np.uint8)
    monkeypatch.setattr(meshes, "COLOURS", shades)
    for of_faces in (False, True):
        text, binary = (load(meshes.ply(format, of_faces=of_faces)) for format in ("ascii", "binary_little_endian"))
        assert set(painted_places(text).values()) == {tuple(shade) for shade in shades.tolist()}
        assert painted_places(text) == painted_places(binary)


@pytest.mark.parametrize(
    "data",
    [meshes.plain_gltf().glb(), meshes.stl(), meshes.stl_text(), meshes.obj(), meshes.obj_zip(mtl=b"newmtl other\n")],
    ids=["glb", "stl", "stl, text", "obj alone", "obj zip, other material"],
)
def test_unpainted_meshes_have_no_materials(data: bytes) -> None:
    mesh = load(data)
    check(mesh)
    assert mesh.material_of_face is None
    assert mesh.colours is None
    middles = mesh.vertices[mesh.faces].mean(axis=1).round(3) + 0.0
    assert {tuple(middle) for middle in middles.tolist()} == {
        tuple(np.array(place, np.float32).tolist()) for place in EXPECTED
    }


def test_the_axis_that_is_up_can_be_said_and_an_assumption_is_noted() -> None:
    assert "z is taken to be up" in load(meshes.stl()).notes[-1]
    assert "y is taken to be up" in load(meshes.obj()).notes[-1]
    assert load(meshes.plain_gltf().glb()).notes == ()  # the standard says it
    as_it_is = load(meshes.plain_gltf().glb(), up="z")
    assert np.array_equal(np.unique(as_it_is.vertices, axis=0), np.unique(meshes.Y_UP, axis=0) + np.float32(0))
    turned = load(meshes.stl(), up="y")
    assert turned.notes == ()
    expected = np.stack([meshes.POINTS[:, 0], -meshes.POINTS[:, 2], meshes.POINTS[:, 1]], axis=1)
    assert np.array_equal(turned.vertices, expected)


def test_texture_coordinates_outside_are_kept() -> None:
    outside = meshes.UV + np.array([3, -2])
    wrapped = meshes.textured_gltf(uv=outside)
    mesh = load(wrapped.glb())
    assert mesh.uv is not None
    assert np.allclose(np.unique(mesh.uv, axis=0), np.unique(outside, axis=0))
    assert painted_places(mesh) == EXPECTED


def test_plain_colours_of_gltf_are_linear_light() -> None:
    file = meshes.factors_gltf()
    file.document["materials"][0]["pbrMetallicRoughness"]["baseColorFactor"] = [0.5, 0.0, 1.0, 1.0]
    assert load(file.glb()).materials[0].colour == pytest.approx((0.7354, 0.0, 1.0, 1.0), abs=1e-4)


def test_nodes_lay_out_instances() -> None:
    file = meshes.coloured_gltf()
    half_turn = [0, 0, 1, 0]  # around z, as x, y, z, w
    file.document["nodes"] = [
        {"children": [1, 2], "translation": [10, 0, 0]},
        {"mesh": 0, "scale": [2, 1, 1]},
        {"mesh": 0, "rotation": half_turn, "matrix": None},
        {"mesh": 0, "translation": [99, 0, 0]},  # not in the scene
    ]
    del file.document["nodes"][2]["matrix"]
    mesh = load(file.glb(), up="z")
    check(mesh)
    assert len(mesh.faces) == 6
    points = meshes.Y_UP
    expected = np.concatenate([points * [2, 1, 1] + [10, 0, 0], points * [-1, -1, 1] + [10, 0, 0]])
    assert np.allclose(mesh.vertices[mesh.faces].reshape(-1, 3), expected, atol=1e-6)


def test_a_matrix_is_stored_by_columns() -> None:
    file = meshes.plain_gltf()
    file.document["nodes"][0]["matrix"] = [0, 1, 0, 0, -1, 0, 0, 0, 0, 0, 1, 0, 5, 6, 7, 1]  # a quarter turn around z
    expected = np.stack([-meshes.Y_UP[:, 1], meshes.Y_UP[:, 0], meshes.Y_UP[:, 2]], axis=1) + np.array([5, 6, 7])
    mesh = load(file.glb(), up="z")
    assert np.allclose(mesh.vertices[mesh.faces].reshape(-1, 3), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "order"),
    [(5, [[0, 1, 2], [1, 3, 2], [2, 3, 4]]), (6, [[0, 1, 2], [0, 2, 3], [0, 3, 4]])],
    ids=["strip", "fan"],
)
def test_strips_and_fans(mode: int, order: list[list[int]]) -> None:
    file = meshes.plain_gltf()
    points = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
    file.document["meshes"] = [{"primitives": [{"attributes": {"POSITION": file.add(points)}, "mode": mode}]}]
    mesh = load(file.glb(), up="z")
    assert np.array_equal(mesh.vertices[mesh.faces], points[order])


def test_integers_stand_for_fractions_where_they_are_normalized() -> None:
    file = meshes.textured_gltf()
    from_top = np.stack([meshes.UV[:, 0], 1 - meshes.UV[:, 1]], axis=1)
    meshes.primitive(file)["attributes"]["TEXCOORD_0"] = file.add(
        (from_top * 65535).round().astype(np.uint16), normalized=True
    )
    assert painted_places(load(file.glb())) == EXPECTED


def test_texture_coordinates_are_turned_as_the_extension_says() -> None:
    file = meshes.textured_gltf()
    info = file.document["materials"][0]["pbrMetallicRoughness"]["baseColorTexture"]
    info["extensions"] = {"KHR_texture_transform": {"offset": [0.1, 0.2], "rotation": np.pi / 2, "scale": [0.5, 2]}}
    mesh = load(file.glb())
    assert mesh.uv is not None
    u, v = meshes.UV[0, 0], 1 - meshes.UV[0, 1]
    # Counter-clockwise on the picture: what lay to the right lies above; v counts from the top here.
    expected = (2 * v + 0.1, 1 - (-0.5 * u + 0.2))
    assert mesh.uv[mesh.faces[0, 0]] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("material", "alpha", "cutout"),
    [
        ({}, 100, 0.0),
        ({"alphaMode": "MASK"}, 100, 0.5),
        ({"alphaMode": "MASK", "alphaCutoff": 0.25}, 100, 0.25),
        ({"alphaMode": "BLEND"}, 100, 0.5),
        ({"alphaMode": "BLEND"}, 255, 0.0),
    ],
)
def test_cutouts(material: dict[str, Any], alpha: int, cutout: float) -> None:
    see_through = np.concatenate([meshes.TEXTURE, np.full((16, 16, 1), alpha, np.uint8)], axis=2)
    mesh = load(meshes.textured_gltf(meshes.png(see_through), **material).glb())
    (found,) = mesh.materials
    assert found.cutout == cutout
    assert found.texture is not None
    assert (found.texture[..., 3] == alpha).all()
    assert any("half-transparent" in note for note in mesh.notes) == (
        material.get("alphaMode") == "BLEND" and cutout > 0
    )


def test_a_gltf_finds_its_files_in_a_zip() -> None:
    file = meshes.textured_gltf()
    file.document["images"] = [{"uri": "textures/my%20wood.png"}]
    data = file.gltf("scene.bin")
    files = {"s/scene__gltf": data, "s/scene__bin": file.binary, "s/textures/my wood__png": meshes.png()}
    assert painted_places(load(meshes.zipped(**files))) == EXPECTED
    del files["s/textures/my wood__png"]
    mesh = load(meshes.zipped(**files))
    assert mesh.materials == (UNPAINTED,)
    assert "missing: grey" in mesh.notes[0]
    file.document["materials"][0]["pbrMetallicRoughness"]["baseColorFactor"] = [0, 0, 0, 1]
    files["s/scene__gltf"] = file.gltf("scene.bin")
    assert load(meshes.zipped(**files)).materials == (UNPAINTED,), "the factor is a leftover"
    assert refused(data, "gltf").code == "corrupt_media"


def test_missing_and_unreadable_files_of_an_obj_are_noted() -> None:
    colour = b"newmtl some paint\nKd 0.2 0.4 0.6\nmap_Kd wood.png\n"
    missing = load(meshes.obj_zip(colour, other__txt=b"x"))
    damaged = load(meshes.obj_zip(colour, wood__png=meshes.png()[:40]))
    for mesh, word in ((missing, "missing"), (damaged, "left out")):
        assert mesh.materials == (UNPAINTED,)
        assert any(word in note and "wood.png" in note and "grey" in note for note in mesh.notes)
    alone = load(meshes.zipped(object__obj=meshes.obj()))
    assert alone.material_of_face is None
    assert "object.mtl" in alone.notes[0]


def test_textures_obey_the_limits_of_images_and_are_made_smaller() -> None:
    large = np.repeat(np.repeat(meshes.TEXTURE, 300, axis=0), 300, axis=1)  # 4800 x 4800
    mesh = load(meshes.obj_zip(**{"a/wood__png": meshes.png(large)}))
    (material,) = mesh.materials
    assert material.texture is not None
    assert material.texture.shape == (1600, 1600, 4)
    assert painted_places(mesh) == EXPECTED
    small = Limits(image_pixels=1000 * 1000)
    data = meshes.textured_gltf(meshes.png(large)).glb()
    mesh = load_mesh(data, "glb", small)
    assert mesh.materials[0].texture is None
    assert "1000000" in mesh.notes[0].replace(",", "")
    with pytest.raises(MediaError) as caught:
        load_mesh(meshes.textured_gltf().glb(), "glb", Limits(decode_bytes=16 * 16 * 4 - 1))
    assert caught.value.code == "item_too_large"


def test_polygons_become_triangles() -> None:
    square = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nv 0.5 2 0\n"
    obj = load(f"{square}f 1 2 3 4\nf 1/ 3// 5\n".encode())
    assert len(obj.faces) == 3
    rows = "0 0 0\n1 0 0\n1 1 0\n0 1 0\n0.5 2 0\n"
    mixed = "4 0 1 2 3\n3 0 2 4\n"
    off = load(f"OFF 5 2 0\n{rows}{mixed}".encode())
    head = (
        "ply\nformat {} 1.0\nelement vertex 5\nproperty float x\nproperty float y\nproperty float z\n"
        "element face 2\nproperty list uint8 int32 vertex_index\nend_header\n"
    )
    text = load((head.format("ascii") + rows + mixed).encode())
    binary = np.array(rows.split(), "<f4").tobytes()
    for face in mixed.splitlines():
        size, *corners = map(int, face.split())
        binary += bytes([size]) + np.array(corners, "<i4").tobytes()
    for mesh in (off, text, load(head.format("binary_little_endian").encode() + binary)):
        assert np.array_equal(mesh.faces, [[0, 1, 2], [0, 2, 3], [0, 2, 4]])


def test_a_texture_of_a_ply_is_left_out_and_noted() -> None:
    mesh = load(meshes.ply().replace(b"comment made by a test", b"comment TextureFile a.png"))
    assert "left out" in mesh.notes[0]
    assert painted_places(mesh) == EXPECTED


def test_a_texture_without_coordinates_gives_its_average_colour() -> None:
    uncoordinated = re.sub(rb"/\d+", b"", meshes.obj().replace(b"vt ", b"# "))
    files = {"object__obj": uncoordinated, "object__mtl": b"newmtl some paint\nmap_Kd a.png\n", "a__png": meshes.png()}
    (material,) = load(meshes.zipped(**files)).materials
    assert material.texture is None
    assert material.colour == pytest.approx((0.25, 0.25, 0.5, 1.0), abs=1e-6)


def test_a_gaussian_ply_is_named() -> None:
    rows = {"positions": 3, "colours": 3, "scales": 3, "rotations": 4}
    arrays = {name: np.ones((4, width), np.float32) for name, width in rows.items()}
    error = refused(encode_ply(Gaussians(**arrays, opacities=np.ones(4, np.float32))), "ply")
    assert error.code == "unsupported_media_type"
    assert "Gaussian splats" in error.detail


def changed(change: Callable[[meshes.Gltf], object], file: meshes.Gltf | None = None) -> bytes:
    file = file or meshes.plain_gltf()
    change(file)
    return file.glb()


def ply_head(vertices: int, faces: int, format: str = "ascii") -> bytes:
    axes = "".join(f"property float {axis}\n" for axis in "xyz")
    head = f"ply\nformat {format} 1.0\nelement vertex {vertices}\n{axes}element face {faces}\n"
    return (head + "property list uchar int vertex_indices\nend_header\n").encode()


def nodes(*entries: dict[str, Any]) -> bytes:
    return changed(lambda file: file.document.update(nodes=list(entries)))


NAN_POINTS = np.where(np.arange(27).reshape(9, 3) == 13, np.nan, meshes.POINTS)
ERRORS: list[tuple[str, bytes, str, str]] = [
    ("obj", b"# nothing\nv 0 0 0\n", "empty_object", "no faces"),
    ("obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", "corrupt_media", "entry 9 of 3"),
    ("obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 0\n", "corrupt_media", "before the first"),
    ("obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 -4\n", "corrupt_media", "before the first"),
    ("obj", b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1/1 2/1 3/1\n", "corrupt_media", "texture coordinates"),
    ("obj", b"v 0 0 0\nv 1 0\n", "corrupt_media", "line 2"),
    ("obj", b"v 0 0 0\nv 1 0 x\n", "corrupt_media", "line 2"),
    ("obj", b"v 0 0 0\nv nan 0 0\nv 0 1 0\nf 1 2 3\n", "non_finite_input", "not finite"),
    ("obj", b"v 0 0 0\nv 1e400 0 0\nv 0 1 0\nf 1 2 3\n", "non_finite_input", "not finite"),
    ("obj", b"v 0 0 0\nv 1e30 0 0\nv 0 1 0\nf 1 2 3\n", "corrupt_media", "beyond 1e+06"),
    ("obj", b"v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n", "empty_object", "without area"),
    ("obj", b"v 0 0 0\nv 1 1 1\nv 2 2 2\nf 1 2 3\n", "empty_object", "without area"),
    ("obj", b"v 0 0 0\nv 1 1 1\nf 1 2\n", "empty_object", "three corners"),
    ("stl", meshes.stl(meshes.POINTS[:0]), "empty_object", "no faces"),
    ("stl", meshes.stl()[:-1], "corrupt_media", "it has"),
    ("stl", meshes.stl_text()[:-60], "corrupt_media", "three vertices"),
    ("stl", meshes.stl_text().replace(b"0.5", b"x"), "corrupt_media", "cannot be read"),
    ("stl", meshes.stl(NAN_POINTS), "non_finite_input", "not finite"),
    ("off", b"OFF\n3 1\n0 0 0\n1 0 0\n0 1 0\n3 0 1 3\n", "corrupt_media", "vertex 3"),
    ("off", b"OFF\n3 1\n0 0 0\n1 0 0\n0 1 0\n5 0 1 2\n", "corrupt_media", "cannot be read"),
    ("off", b"OFF\n3 1\n0 0 0\n1 0 0\n0 1 0\n3 0 1 1e300\n", "corrupt_media", "no index"),
    ("off", b"OFF\n3 1\n0 0 0\n1 0\n0 1 0\n3 0 1 2\n", "corrupt_media", "cannot be read"),
    ("off", b"OFF\n1000000 1000000 0\n0 0 0\n", "corrupt_media", "1000000 vertices"),
    ("off", b"OFF\n1000000000 1 0\n0 0 0\n", "corrupt_media", "1000000000 vertices"),
    ("off", b"OFF\n", "corrupt_media", "how many"),
    ("off", b"OFF\n3 0 0\n0 0 0\n1 0 0\n0 1 0\n", "empty_object", "no faces"),
    ("off", b"OFF BINARY\n", "unsupported_codec", "text"),
    ("off", b"4OFF\n3 1 0\n", "unsupported_codec", "three dimensions"),
    ("ply", meshes.ply()[:-1], "corrupt_media", "cut short"),
    ("ply", meshes.ply()[:300], "corrupt_media", "more than is there"),
    ("ply", meshes.ply("ascii")[:-8], "corrupt_media", "cut short"),
    ("ply", meshes.ply("ascii").replace(b"0.5", b"x"), "corrupt_media", "no number"),
    ("ply", meshes.ply().replace(b"format", b"formal"), "corrupt_media", "not understood"),
    ("ply", meshes.ply().replace(b"end_header", b"no_header!"), "corrupt_media", "end_header"),
    ("ply", meshes.ply().replace(b"float x", b"float q"), "corrupt_media", "x, y and z"),
    ("ply", ply_head(3, 0) + b"0 0 0 1 0 0 0 1 0", "empty_object", "no faces"),
    ("ply", ply_head(10**6, 10**6), "corrupt_media", "1000000 x vertex"),
    ("ply", ply_head(3, 10**6) + bytes(99), "corrupt_media", "1000000 x face"),
    ("ply", ply_head(3, 50 * 10**6) + b"0 " * 99, "corrupt_media", "50000000 x face"),
    ("ply", ply_head(3, 1) + b"0 0 0 1 0 0 0 1 0 3 0 1 3", "corrupt_media", "vertex 3"),
    ("ply", ply_head(3, 1) + b"0 0 0 1 0 0 0 1 0 3 0 -1 2", "corrupt_media", "vertex -1"),
    ("ply", ply_head(3, 1) + b"0 0 0 1 0 0 0 1 0 1e30 0 -1 2", "corrupt_media", "more than is there"),
    ("ply", ply_head(3, 1) + b"0 0 0 1 0 0 0 inf 0 3 0 1 2", "non_finite_input", "not finite"),
    ("glb", meshes.plain_gltf().glb()[:-1], "corrupt_media", "bytes"),
    ("glb", meshes.plain_gltf(NAN_POINTS).glb(), "non_finite_input", "not finite"),
    ("glb", changed(lambda f: f.document["accessors"][0].update(count=10**9)), "corrupt_media", "accessor 0"),
    ("glb", changed(lambda f: f.document["accessors"][0].pop("bufferView")), "unsupported_codec", "sparse"),
    ("glb", changed(lambda f: f.document["accessors"][0].update(byteOffset=4)), "corrupt_media", "accessor 0"),
    ("glb", changed(lambda f: f.document["accessors"][0].update(count=-1)), "corrupt_media", "rules"),
    ("glb", changed(lambda f: f.document["accessors"][0].update(count=5)), "corrupt_media", "vertex 8"),
    ("glb", changed(lambda f: f.document["bufferViews"][0].update(byteLength=10**6)), "corrupt_media", "bufferView 0"),
    ("glb", changed(lambda f: f.document["bufferViews"][0].update(byteStride=1)), "corrupt_media", "accessor 0"),
    ("glb", changed(lambda f: f.document.pop("meshes")), "corrupt_media", "rules"),
    ("glb", changed(lambda f: f.document.update(nodes=[{}])), "empty_object", "no faces"),
    ("glb", changed(lambda f: meshes.primitive(f).update(mode=0)), "empty_object", "no faces"),
    ("glb", nodes({"mesh": 0, "scale": [0, 0, 0]}), "empty_object", "without area"),
    ("glb", nodes({"mesh": 0, "scale": [1e9, 1, 1]}), "corrupt_media", "beyond"),
    ("glb", nodes({"mesh": 0, "scale": [1e300, 1, 1], "rotation": [0, 1e300, 0, 1]}), "non_finite_input", "not finite"),
    ("glb", nodes({"children": [1]}, {"children": [0], "mesh": 0}), "corrupt_media", "circle"),
    ("glb", nodes({"children": [0]}), "corrupt_media", "circle"),
    ("glb", nodes({"children": [1, 1]}, {"mesh": 0}), "corrupt_media", "two parents"),
    ("glb", nodes({"children": [1, 2]}, {"children": [2]}, {"mesh": 0}), "corrupt_media", "two parents"),
    ("glb", nodes({"children": [7]}), "corrupt_media", "rules"),
    ("glb", nodes(*[{"mesh": 0}] * 2001), "item_too_large", "2001 nodes"),
    ("glb", changed(lambda f: f.document.update(scenes=[{"nodes": [9]}])), "corrupt_media", "parent"),
    *(
        ("glb", changed(lambda f, n=name: f.document.update(extensionsRequired=[n])), "unsupported_codec", name)  # type: ignore[misc]
        for name in ("KHR_draco_mesh_compression", "EXT_meshopt_compression", "KHR_texture_basisu", "ANY_other")
    ),
    ("gltf", meshes.plain_gltf().gltf("file:///etc/hostname"), "corrupt_media", "never fetched"),
    ("gltf", meshes.plain_gltf().gltf("http://127.0.0.1:9/b.bin"), "corrupt_media", "never fetched"),
    ("gltf", meshes.plain_gltf().gltf("b.bin"), "corrupt_media", "never fetched"),
    ("gltf", meshes.plain_gltf().gltf("data:,abc"), "corrupt_media", "base64"),
    ("gltf", meshes.plain_gltf().gltf("data:;base64,AAAA"), "corrupt_media", "3 are there"),
    ("gltf", b'{"asset": ' + b"[" * 100_000, "corrupt_media", "damaged"),
    ("fbx", b"Kaydara", "unsupported_media_type", "fbx"),
]


@pytest.mark.parametrize(("format", "data", "code", "words"), ERRORS)
def test_what_is_refused(format: str, data: bytes, code: str, words: str) -> None:
    error = refused(data, format)
    assert (error.code, words in error.detail) == (code, True), error


@pytest.mark.parametrize("uri", ["file:///etc/hostname", "http://127.0.0.1:9/b.png", "../b.png"])
def test_textures_are_not_fetched(uri: str) -> None:
    file = meshes.textured_gltf()
    file.document["images"] = [{"uri": uri}]
    assert "never fetched" in refused(file.glb(), "glb").detail
    mtl = f"newmtl some paint\nKd 1 0 0\nmap_Kd {uri}\n".encode()
    assert load(meshes.obj_zip(mtl, other__txt=b"x")).materials == (UNPAINTED,)


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9/b.png", "file:///etc/hostname", "//127.0.0.1:9/b.png"])
def test_textures_are_not_fetched_for_a_gltf_in_a_zip_either(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: object, **__: object) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr("socket.socket.connect", fetch)
    file = meshes.textured_gltf()
    file.document["images"] = [{"uri": uri}]
    with pytest.raises(MediaError, match="image 0") as caught:
        load(meshes.zipped(s__gltf=file.gltf("s.bin"), s__bin=file.binary, b__png=meshes.png()))
    assert (caught.value.code, "never fetched" in caught.value.detail) == ("corrupt_media", True)


@pytest.mark.parametrize(
    ("format", "data"),
    [
        ("glb", meshes.plain_gltf().glb()),
        ("obj", meshes.obj()),
        ("ply", meshes.ply()),
        ("off", meshes.off()),
        ("stl", meshes.stl()),
        ("stl", meshes.stl_text()),
    ],
)
def test_limits_hold(format: str, data: bytes) -> None:
    small = [Limits(mesh_faces=2), Limits(mesh_bytes=len(data) - 1)]
    if format != "stl":
        small.append(Limits(mesh_vertices=8))
    for limits in small:
        error = refused(data, format, limits)
        assert error.code == "item_too_large"
        assert isinstance(error.limit, int)
        assert isinstance(error.actual, int)
        assert error.actual > error.limit
    exact = Limits(mesh_faces=3, mesh_vertices=9, mesh_bytes=len(data), mesh_instances=1)
    assert len(load_mesh(data, format, exact).faces) == 3


def test_instances_count_against_the_limits_before_they_are_laid_out() -> None:
    data = nodes(*[{"mesh": 0}] * 4)
    file = json.loads(data[20 : data.index(b"\0", 20)].rpartition(b"}")[0] + b"}")
    assert file["scenes"] == [{"nodes": [0]}]
    every = changed(lambda f: f.document.update(nodes=[{"mesh": 0}] * 4, scenes=[{"nodes": [0, 1, 2, 3]}]))
    assert len(load_mesh(every, "glb", Limits(mesh_faces=12)).faces) == 12
    assert refused(every, "glb", Limits(mesh_faces=11)).code == "item_too_large"


@pytest.mark.parametrize(
    "data",
    [b"", b"ply", b"{}", b"solid", b"\x89PNG\r\n\x1a\n", b"hello\nworld\n", b"PK\x03\x04", bytes(200), b"#\n" * 3],
)
def test_other_files_are_not_taken_for_meshes(data: bytes) -> None:
    assert sniff_mesh(data) is None


@pytest.mark.parametrize(
    "files", [{"a__txt": b"x"}, {"a__stl": meshes.stl(), "b__stl": meshes.stl()}, {"a__glb": meshes.stl()}]
)
def test_a_zip_holds_one_mesh_of_its_name(files: dict[str, bytes]) -> None:
    with pytest.raises(MediaError) as caught:
        load(meshes.zipped(**files))
    assert caught.value.code == "corrupt_media"


@pytest.mark.parametrize(
    "data",
    [
        meshes.textured_gltf().glb(),
        meshes.textured_gltf().gltf(),
        meshes.ply(),
        meshes.ply("ascii"),
        meshes.obj(),
        meshes.off(),
        meshes.stl_text(),
        meshes.obj_zip(),
    ],
    ids=["glb", "gltf", "ply", "ply, text", "obj", "off", "stl, text", "obj zip"],
)
def test_damaged_files_end_in_a_media_error_or_a_mesh(data: bytes) -> None:
    rng = np.random.default_rng(5)
    format = sniff_mesh(data)
    variants = [data[:length] for length in np.unique(rng.integers(0, len(data), 60))]
    for _ in range(240):
        spoilt = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 5)):
            spoilt[place] = rng.integers(256) if rng.random() < 0.5 else spoilt[place] ^ (1 << rng.integers(8))
        variants.append(bytes(spoilt))
    refusals = 0
    tracemalloc.start()
    try:
        for variant in variants:
            try:
                if format is None:
                    mesh = load_mesh_archive(open_archive(variant, LIMITS), LIMITS)
                else:
                    mesh = load_mesh(variant, format, LIMITS)
            except MediaError:
                refusals += 1
            else:
                check(mesh)
        assert tracemalloc.get_traced_memory()[1] < 40 * 2**20
    finally:
        tracemalloc.stop()
    assert refusals > 20


def shared_meshes() -> list[Any]:
    root = DATA / "meshes"
    found = [*root.glob("eval/*"), *(path for path in root.glob("train/*") if path.name.endswith(TRAIN))]
    return [pytest.param(path, id=path.name) for path in sorted(found)]


@needs_data
@pytest.mark.parametrize("path", shared_meshes())
def test_real_meshes(path: Path) -> None:
    mesh = load(path.read_bytes())
    check(mesh)
    assert len(mesh.faces) == FACES.get(path.name, len(mesh.faces)) > 100
    assert not any("missing" in note or "left out" in note for note in mesh.notes)
    if path.suffix in (".zip", ".glb"):
        assert mesh.materials


def bad_files() -> list[Any]:
    if not DATA.is_dir():
        return []
    rows = json.loads((DATA / "expectations.json").read_text("utf-8"))["bad"]
    kinds = (".obj", ".glb", ".gltf", ".off", ".ply", ".stl", ".zip")
    return [pytest.param(row, id=row["path"]) for row in rows if row["path"].endswith(kinds)]


@needs_data
@pytest.mark.parametrize("row", bad_files())
def test_bad_files(row: dict[str, str]) -> None:
    """By the name that the file has; whether its content is that is for sniff_mesh to say before."""
    data = (DATA / row["path"]).read_bytes()
    format = Path(row["path"]).suffix[1:]
    allowed = {int(code) for code in re.findall(r"\b[2-4]\d\d\b", row["expect"])}
    error = None
    try:
        zipped = format == "zip"
        mesh = load_mesh_archive(open_archive(data, LIMITS), LIMITS) if zipped else load_mesh(data, format, LIMITS)
        check(mesh)
    except MediaError as caught:
        error = caught
    assert (error.status if error else 200) in allowed, error
    assert error is None or error.code != "decode_limit"
