"""The PLY of Gaussians, read back by the rules of the format rather than by ours."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from media.errors import MediaError
from media.ply import COLUMNS, encode_ply
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
