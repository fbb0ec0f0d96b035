"""media/arrays_json.py: arrays inside JSON."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from media.arrays_json import DTYPES, array_from_json, array_to_json
from media.errors import MediaError
from media.limits import Limits

LIMITS = Limits()
FINITE = {"allow_nan": False, "allow_infinity": False}
ARRAYS = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda dtype: hnp.arrays(
        dtype,
        hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5),
        elements=FINITE if dtype.startswith("float") else None,
    )
)


@given(array=ARRAYS)
@settings(deadline=None)
def test_base64_round_trip(array: np.ndarray) -> None:
    text = json.dumps(array_to_json(array, floats=False))
    found = array_from_json(json.loads(text), "latents", LIMITS)
    assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())


@given(array=ARRAYS.filter(lambda array: array.size and (array.dtype.kind == "f" or abs(int(array.max())) < 2**63)))
@settings(deadline=None)
def test_lists_round_trip(array: np.ndarray) -> None:
    text = json.dumps(array_to_json(array, floats=True))
    found = array_from_json(json.loads(text), "latents", LIMITS)
    assert found.dtype == (np.float64 if array.dtype.kind == "f" else np.int64)
    assert found.astype(array.dtype).tobytes() == array.tobytes()


def test_the_form_is_as_documented() -> None:
    array = np.array([[1.0, -2.5]], np.float32)
    assert array_to_json(array, floats=False) == {"dtype": "float32", "shape": [1, 2], "data": "AACAPwAAIMA="}
    assert array_to_json(array, floats=True) == [[1.0, -2.5]]
    big_endian = array.astype(">f4").T
    assert array_to_json(big_endian, floats=False) == {"dtype": "float32", "shape": [2, 1], "data": "AACAPwAAIMA="}
    short = array_from_json({"dtype": "F32", "shape": [1, 2], "data": "AACAPwAAIMA="}, "latents", LIMITS)
    assert short.dtype == np.float32
    assert array_from_json([[1, 2.5]], "latents", LIMITS).tolist() == [[1.0, 2.5]]
    assert array_from_json([], "latents", LIMITS).shape == (0,)


def test_what_has_no_place_in_json() -> None:
    with pytest.raises(TypeError, match="complex128"):
        array_to_json(np.zeros(1, complex), floats=False)
    with pytest.raises(ValueError, match="NaN"):
        array_to_json(np.array([np.nan]), floats=True)


GOOD = {"dtype": "float32", "shape": [1, 2], "data": "AACAPwAAIMA="}
BAD: dict[str, tuple[Any, str, str]] = {
    "text": ("1,2", "invalid_parameter", "latents must be nested lists"),
    "number": (3, "invalid_parameter", "latents must be nested lists"),
    "missing": ({"dtype": "float32", "shape": [1]}, "invalid_parameter", "given are 'dtype', 'shape'"),
    "extra": (GOOD | {"order": "F"}, "invalid_parameter", "no more; given are .*'order'"),
    "dtype": (GOOD | {"dtype": "object"}, "invalid_parameter", "has dtype 'object', allowed are float16"),
    "dtype type": (GOOD | {"dtype": 4}, "invalid_parameter", "has dtype no text"),
    "shape": (GOOD | {"shape": [1, -2]}, "invalid_parameter", "has no shape"),
    "shape float": (GOOD | {"shape": [1, 2.0]}, "invalid_parameter", "has no shape"),
    "shape text": (GOOD | {"shape": "12"}, "invalid_parameter", "has no shape"),
    "rank": (GOOD | {"shape": [1] * 5}, "invalid_parameter", "5 dimensions, allowed are 1 to 4"),
    "scalar": (GOOD | {"shape": []}, "invalid_parameter", "0 dimensions"),
    "rows": (GOOD | {"shape": [10**12, 2]}, "too_many_tokens", "1000000000000 rows, at most 262144"),
    "wide": (GOOD | {"shape": [1, 10**12]}, "invalid_parameter", "1000000000000 wide, at most 4096"),
    "bytes": (GOOD | {"shape": [1, 3]}, "invalid_parameter", "12 characters of data; dtype and shape need 12 bytes"),
    "padding": (GOOD | {"data": "AACAPwAAIMAA"}, "invalid_parameter", "9 bytes of data, dtype and shape need 8"),
    "no base64": (GOOD | {"data": "AACAPwAAI*A="}, "invalid_parameter", "no base64"),
    "url alphabet": (GOOD | {"data": "AACAPwAAI-A="}, "invalid_parameter", "no base64"),
    "unicode": (GOOD | {"data": "AACAPwAAI\u00e9A="}, "invalid_parameter", "no base64"),
    "data": (GOOD | {"data": [1]}, "invalid_parameter", "has no data"),
    "nan": (GOOD | {"data": "AADAfwAAIMA="}, "non_finite_input", "latents row 0 holds NaN"),
    "infinite list": ([[0.0], [float("inf")]], "non_finite_input", "latents row 1 holds"),
    "ragged": ([[1, 2], [3]], "invalid_parameter", "list 1 at depth 1 has 1 values, the first one 2"),
    "ragged deep": ([[[1], [2]], [[3], [4, 5]]], "invalid_parameter", "list 3 at depth 2 has 2 values"),
    "mixed depth": ([[1], 2], "invalid_parameter", "list 1 at depth 1 has no list"),
    "mixed depth 2": ([1, [2]], "invalid_parameter", "numbers only"),
    "deep": ([[[[[1]]]]], "invalid_parameter", "5 dimensions"),
    "bool": ([[True]], "invalid_parameter", "numbers only"),
    "null": ([[None, 1.0]], "invalid_parameter", "numbers only"),
    "words": ([["1"]], "invalid_parameter", "numbers only"),
    "huge": ([[10**30]], "invalid_parameter", "beyond 64 bits"),
    "huge float": ([[10**400, 1.0]], "invalid_parameter", "beyond 64 bits"),
    "many": ([[0]] * 262145, "too_many_tokens", "262145 rows"),
    "broad": ([[0] * 4097], "invalid_parameter", "4097 wide"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arrays(name: str) -> None:
    found, code, message = BAD[name]
    with pytest.raises(MediaError, match=message) as caught:
        array_from_json(found, "latents", LIMITS)
    assert caught.value.code == code


@given(
    found=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.fixed_dictionaries(
                {"dtype": st.sampled_from(["float32", "uint8"]), "shape": inner, "data": st.text(max_size=8)}
            )
        ),
        max_leaves=12,
    )
)
@settings(max_examples=300, deadline=2000)
def test_junk_raises_only_media_errors(found: Any) -> None:
    try:
        array = array_from_json(found, "latents", LIMITS)
    except MediaError:
        return
    assert array.dtype.kind in "fiu"
    assert np.isfinite(array).all()
