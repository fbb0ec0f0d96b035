"""media/token_record.py: the check before a decode, and layouts."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from media.errors import MediaError
from media.token_record import check_decodable, infer_layout, layout_from_json, layout_to_json
from media.types import Layout, Tokens
from tests.media.test_tokens import FAR, IMAGE, LAYOUTS, SOLID, TWICE, item, raster, refused, voxel_coords


def changed(**values: Any) -> Tokens:
    return dataclasses.replace(item(IMAGE), **values)


HIGH = np.zeros((6, 5), np.float32)
HIGH[2, 3] = -20000
UNDER = np.zeros((6, 8), np.int16)
UNDER[5, 0] = -3
DEEP = raster((1, 2, 3))
DEEP[3, 3] = 1
LATER = voxel_coords(3)
LATER[6, 0] = 1
PILED = voxel_coords(3)
PILED[6] = PILED[0]

UNDECODABLE: dict[str, tuple[Tokens, str, str]] = {
    "nothing": (changed(latents=None), "invalid_token_file", "neither latents nor codes"),
    "both": (changed(codes=UNDER), "invalid_token_file", "latents and codes"),
    "range": (
        changed(latents=HIGH),
        "invalid_token_file",
        "latents row 2, column 3 is -20000.0; allowed is -10000 to 10000",
    ),
    "nan": (changed(latents=HIGH * np.nan), "non_finite_input", "latents row 0, column 0 is nan"),
    "rows": (changed(latents=HIGH[:4]), "invalid_token_file", r"latents have shape \[4, 5\]"),
    "codes": (changed(latents=None, codes=UNDER), "invalid_token_file", "codes row 5, column 0 is -3"),
    "z": (changed(coords=DEEP), "invalid_token_file", r"coords row 3 is \[0, 1, 0, 1\], .* needs \[0, 1, 0, 0\]"),
    "order": (changed(coords=raster((1, 3, 2))), "invalid_token_file", r"coords row 2 is \[0, 1, 0, 0\], .* 1 x 2 x 3"),
    "count": (
        changed(coords=raster((1, 1, 3)), latents=HIGH[:1].repeat(3, 0) * 0),
        "invalid_token_file",
        "coords have 3 rows, the raster of 1 x 2 x 3 tokens .* needs 6",
    ),
    "twice": (changed(coords=TWICE), "invalid_token_file", r"coords rows 1 and 4 are both \[0, 0, 1, 0\]"),
    "negative": (changed(coords=FAR), "invalid_token_file", "coords row 2, column 1 is -1; allowed is 0 to 4095"),
    "coords": (changed(coords=raster((1, 2, 3))[:, :2]), "invalid_token_file", r"coords have shape \[6, 2\]"),
    "layout": (
        changed(layout=dataclasses.replace(IMAGE, height=40)),
        "invalid_token_file",
        r"layout: height 40 does not fit 2 tokens of 16 \(17 to 32\)",
    ),
    "image frames": (
        changed(layout=dataclasses.replace(IMAGE, frames=2)),
        "invalid_token_file",
        "an image has 1 frame",
    ),
    "voxel time": (
        dataclasses.replace(item(SOLID, 3), coords=LATER),
        "invalid_token_file",
        "coords row 6, column 0 is 1; allowed is 0",
    ),
    "voxels twice": (dataclasses.replace(item(SOLID, 3), coords=PILED), "invalid_token_file", "rows 0 and 6 are both"),
    "voxel sizes": (
        dataclasses.replace(item(SOLID, 3), layout=dataclasses.replace(SOLID, height=1)),
        "invalid_token_file",
        "voxels have sizes and grid 0",
    ),
}


@pytest.mark.parametrize("name", UNDECODABLE)
def test_undecodable(name: str) -> None:
    tokens, code, message = UNDECODABLE[name]
    refused(code, message, check_decodable, tokens)


def test_widths_of_the_model() -> None:
    check_decodable(item(IMAGE), latent_channels=5, codebooks=0)
    error = refused(
        "invalid_token_file", "5 columns, this model takes 48", check_decodable, item(IMAGE), latent_channels=48
    )
    assert (error.limit, error.actual) == (48, 5)
    refused("invalid_token_file", "takes latents only", check_decodable, item(IMAGE, codes=True), codebooks=0)
    refused(
        "invalid_token_file", "8 columns, this model takes 4", check_decodable, item(IMAGE, codes=True), codebooks=4
    )


def test_the_largest_latent_is_allowed() -> None:
    check_decodable(changed(latents=np.full((6, 5), 1e4, np.float32)))
    check_decodable(changed(latents=np.full((6, 5), -1e4, np.float16)))


# --- layouts


@given(layout=LAYOUTS)
def test_layout_json_round_trip(layout: Layout) -> None:
    assert layout_from_json(json.loads(json.dumps(layout_to_json(layout)))) == layout


@given(layout=LAYOUTS)
def test_inferred_layouts_fit_what_encode_says(layout: Layout) -> None:
    coords = voxel_coords(0) if layout.kind == "voxels" else raster(layout.grid)
    size = None if layout.kind == "voxels" else (layout.frames, layout.height, layout.width)
    assert infer_layout(coords, kind=layout.kind, size=size, fps=layout.fps) == layout


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "cube"},
        {"kind": None},
        {"frames": -1},
        {"frames": True},
        {"height": 20.0},
        {"width": 10**30},
        {"width": 0},
        {"grid": [1, 2]},
        {"grid": [1, 2, "3"]},
        {"grid": [2, 2, 3]},
        {"fps": "30"},
        {"fps": -1},
        {"fps": True},
        {"extra": 1},
    ],
    ids=str,
)
def test_bad_layouts(change: dict[str, object]) -> None:
    with pytest.raises(MediaError) as caught:
        layout_from_json(layout_to_json(IMAGE) | change)
    assert caught.value.code == "invalid_token_file"


def test_voxels_lie_in_the_grid() -> None:
    coords = voxel_coords(0)
    coords[3, 2] = 64
    with pytest.raises(MediaError, match=r"coords row 3, column 2 is 64; allowed is 0 to 63"):
        check_decodable(dataclasses.replace(item(SOLID), coords=coords))
    coords[3, 2], coords[:, 0] = 5, 1
    check_decodable(dataclasses.replace(item(SOLID), coords=coords))
