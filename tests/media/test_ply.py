"""The PLY of Gaussians: written by the rules of the format, and read in all the forms in which others write it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from media.errors import MediaError
from media.ply import COLUMNS, decode_ply, encode_ply, is_gaussian_ply, ply_notes
from media.types import Gaussians
from tests.paths import CONFORMANCE, needs_conformance


def gaussians(count: int = 5) -> Gaussians:
    rng = np.random.default_rng(7)
    arrays = {"positions": 3, "colours": 3, "opacities": 1, "scales": 3, "rotations": 4}
    values = {name: rng.normal(size=(count, width)).astype(np.float32) for name, width in arrays.items()}
    return Gaussians(**{**values, "opacities": values["opacities"][:, 0]})


def read(data: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """Columns of a binary little-endian PLY of one element, as the format's description has it."""
    lines, rows = [], data
    while not lines or lines[-1] != "end_header":
        line, _, rows = rows.partition(b"\n")
        lines.append(line.decode("ascii"))
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    [count] = [int(line.split()[2]) for line in lines if line.startswith("element vertex ")]
    kinds = {"float": "<f4"}
    fields = [(line.split()[2], kinds[line.split()[1]]) for line in lines if line.startswith("property ")]
    table = np.frombuffer(rows, np.dtype(fields))
    assert len(table) == count
    return {name: table[name] for name, _ in fields}


def test_every_attribute_is_in_the_column_of_its_name() -> None:
    given = gaussians()
    columns = read(encode_ply(given))
    assert tuple(columns) == COLUMNS
    for names, array in (
        (("x", "y", "z"), given.positions),
        (("f_dc_0", "f_dc_1", "f_dc_2"), given.colours),
        (("opacity",), given.opacities[:, None]),
        (("scale_0", "scale_1", "scale_2"), given.scales),
        (("rot_0", "rot_1", "rot_2", "rot_3"), given.rotations),
        (("nx", "ny", "nz"), np.zeros((5, 3))),
    ):
        assert np.array_equal(np.stack([columns[name] for name in names], axis=1), array), names


@needs_conformance
def test_header_is_that_of_the_published_writer() -> None:
    published = (CONFORMANCE / "gs_ply" / "point_cloud.ply").read_bytes()
    ours = encode_ply(gaussians(40))
    assert ours.partition(b"end_header\n")[0] == published.partition(b"end_header\n")[0]
    assert len(ours) == len(published)


def test_no_gaussians_are_a_file_too() -> None:
    assert {len(column) for column in read(encode_ply(gaussians(0))).values()} == {0}


@pytest.mark.parametrize("name", ["positions", "colours", "opacities", "scales", "rotations"])
def test_what_does_not_fit_is_refused_by_name(name: str) -> None:
    given = gaussians()
    array = getattr(given, name)
    for bad in (array[:-1], array.astype(np.float64), array[..., None]):
        if name == "positions" and len(bad) != len(array):
            continue  # their number is the number of Gaussians
        with pytest.raises(MediaError, match=rf"{name} must be float32 \[5") as caught:
            encode_ply(dataclasses.replace(given, **{name: bad}))
        assert caught.value.code == "invalid_parameter"
    for value in (np.nan, np.inf):
        spoilt = array.copy()
        spoilt[3] = value
        with pytest.raises(MediaError, match=f"{name} row 3 is") as caught:
            encode_ply(dataclasses.replace(given, **{name: spoilt}))
        assert caught.value.code == "non_finite_input"


def written(columns: dict[str, np.ndarray[Any, Any]], *, end: str = "\n", tail: str = "", more: bytes = b"") -> bytes:
    """A PLY of one's own: columns in the order and types given."""
    kinds = {"<f4": "float", "<f8": "double", "|u1": "uchar", "<i4": "int"}
    table = np.rec.fromarrays(list(columns.values()), names=list(columns))
    lines = ["ply", "format binary_little_endian 1.0", "comment ours", f"element vertex {len(table)}"]
    lines += [f"property {kinds[column.dtype.str]} {name}" for name, column in columns.items()]
    return "".join(f"{line}{end}" for line in [*lines, *tail.split("\n"), "end_header"] if line).encode() + (
        table.tobytes() + more
    )


def same(a: Gaussians, b: Gaussians) -> bool:
    return all(
        getattr(a, field.name).dtype == getattr(b, field.name).dtype
        and np.array_equal(getattr(a, field.name), getattr(b, field.name))
        for field in dataclasses.fields(a)
    )


@pytest.mark.parametrize("count", [0, 1, 40])
def test_what_is_written_is_read(count: int) -> None:
    given = gaussians(count)
    assert same(decode_ply(encode_ply(given)), given)
    assert ply_notes(encode_ply(given)) == ()


def test_properties_are_read_by_name_not_by_place() -> None:
    given = gaussians()
    columns = read(encode_ply(given))
    turned = {name: columns[name] for name in sorted(columns, reverse=True)}
    assert list(turned) != list(columns)
    assert same(decode_ply(written(turned)), given)
    assert same(decode_ply(written(turned, end="\r\n")), given)
    assert same(decode_ply(written(turned).replace(b"property float ", b"property float32 ")), given)
    bare = {name: column for name, column in columns.items() if name not in ("nx", "ny", "nz")}
    assert same(decode_ply(written(bare)), given)


def test_what_is_left_out_is_said() -> None:
    given = gaussians()
    columns = read(encode_ply(given))
    rest = {f"f_rest_{i}": np.full(5, i, np.float32) for i in range(45)}
    data = written({"red": np.zeros(5, np.uint8), **rest, "quality": np.zeros(5), **columns})
    assert same(decode_ply(data), given)
    colours, others = ply_notes(data)
    assert colours.startswith("45 properties f_rest_* left out")
    assert others == "2 other properties left out"
    data = written(columns, tail="element camera 1\nproperty list uchar int numbers", more=b"\x01\0\0\0\0")
    assert same(decode_ply(data), given)
    assert ply_notes(data) == ("elements behind the vertices left out",)


def test_an_infinite_opacity_is_read_as_opaque_or_clear() -> None:
    columns = {name: column.copy() for name, column in read(encode_ply(gaussians())).items()}
    columns["opacity"][:2] = [np.inf, -np.inf]
    back = decode_ply(written(columns)).opacities
    assert back.dtype == np.float32
    assert back[:2].tolist() == [17, -17]
    assert np.array_equal(back[2:], columns["opacity"][2:])


@pytest.mark.parametrize("name", ["y", "f_dc_1", "scale_2", "rot_0", "opacity"])
def test_a_number_that_is_not_finite_is_refused(name: str) -> None:
    columns = {key: column.copy() for key, column in read(encode_ply(gaussians())).items()}
    columns[name][4] = np.nan
    with pytest.raises(MediaError, match="row 4 is") as caught:
        decode_ply(written(columns))
    assert caught.value.code == "non_finite_input"
    assert is_gaussian_ply(written(columns))


@pytest.mark.parametrize("name", [name for name in COLUMNS if name not in ("nx", "ny", "nz")])
def test_every_property_is_needed_as_float(name: str) -> None:
    columns = read(encode_ply(gaussians()))
    without = {key: column for key, column in columns.items() if key != name}
    for data in (written(without), written({**columns, name: columns[name].astype("<f8")})):
        assert not is_gaussian_ply(data)
        with pytest.raises(MediaError, match=f"has {name} as float") as caught:
            decode_ply(data)
        assert caught.value.code == "unsupported_media_type"


def changed(old: bytes, new: bytes) -> bytes:
    data = encode_ply(gaussians())
    assert data.count(old) == 1
    return data.replace(old, new)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "unsupported_media_type"),
        (b"plyx\n", "unsupported_media_type"),
        (changed(b"binary_little_endian", b"ascii"), "unsupported_media_type"),
        (changed(b"binary_little_endian", b"binary_big_endian"), "unsupported_media_type"),
        (changed(b"element vertex", b"element face"), "unsupported_media_type"),
        (changed(b"element vertex 5\n", b"element chunk 1\nelement vertex 5\n"), "unsupported_media_type"),
        (changed(b"element vertex 5", b"element vertex -5"), "corrupt_media"),
        (changed(b"element vertex 5", b"element vertex 5.0"), "corrupt_media"),
        (changed(b"element vertex 5", b"element vertex " + b"9" * 5000), "corrupt_media"),
        (changed(b"element vertex 5", b"element vertex"), "corrupt_media"),
        (changed(b"element vertex 5\n", b""), "corrupt_media"),
        (changed(b"float nx", b"list uchar int nx"), "corrupt_media"),
        (changed(b"float nx", b"quad nx"), "corrupt_media"),
        (changed(b"float nx", b"float x"), "corrupt_media"),
        (changed(b"end_header\n", b"end_headers\n"), "corrupt_media"),
        (changed(b"end_header\n", b""), "corrupt_media"),
        (changed(b"end_header\n", b"comment " + b"x" * 70000 + b"\nend_header\n"), "corrupt_media"),
    ],
)
def test_another_header_is_refused(data: bytes, code: str) -> None:
    assert not is_gaussian_ply(data)
    for reader in (decode_ply, ply_notes):
        with pytest.raises(MediaError) as caught:
            reader(data)
        assert caught.value.code == code


@pytest.mark.parametrize("count", [4, 6, 10**9, 10**17])
def test_the_number_of_vertices_is_checked_against_the_bytes(count: int) -> None:
    data = changed(b"element vertex 5", f"element vertex {count}".encode())
    assert is_gaussian_ply(data)
    with pytest.raises(MediaError, match=f"{count} vertices take {68 * count} bytes .* there are 340") as caught:
        decode_ply(data)
    assert caught.value.code == "corrupt_media"


def test_the_header_alone_tells_a_gaussian_ply() -> None:
    data = encode_ply(gaussians())
    header = len(data) - 5 * 68
    assert is_gaussian_ply(data[:header])
    assert not is_gaussian_ply(data[: header - 1])


def test_spoilt_headers_give_nothing_but_media_errors() -> None:
    rng = np.random.default_rng(3)
    whole = encode_ply(gaussians())
    refused = 0
    for _ in range(3000):
        spoilt = bytearray(whole)
        for place in rng.integers(0, len(whole) - 340, rng.integers(1, 4)):
            spoilt[place] = rng.integers(0, 256)
        is_gaussian_ply(bytes(spoilt))
        try:
            decode_ply(bytes(spoilt))
        except MediaError:
            refused += 1
    assert refused > 2000


@needs_conformance
def test_published_file_is_read() -> None:
    case = CONFORMANCE / "gs_ply"
    back = decode_ply((case / "point_cloud.ply").read_bytes())
    wanted = load_file(case / "expected.safetensors")
    for names, array in (
        (("x", "y", "z"), back.positions),
        (("f_dc_0", "f_dc_1", "f_dc_2"), back.colours),
        (("scale_0", "scale_1", "scale_2"), back.scales),
        (("rot_0", "rot_1", "rot_2", "rot_3"), back.rotations),
    ):
        assert np.abs(np.stack([wanted[name] for name in names], axis=1) - array).max() < 1e-6, names
    # Row 0 is infinite in the file: raw + bias = 27.8 is lost, opaque it stays.
    assert np.abs(wanted["opacity"][1:] - back.opacities[1:]).max() < 1e-4
    assert back.opacities[0] == 17
