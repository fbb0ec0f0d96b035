"""media/wire.py and, below it, media/safetensors_file.py."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from media.safetensors_file import HEADER_BYTES, MAX_TENSORS, SafetensorsError, Tensor, read, write
from media.wire import WireError, dumps, loads
from tests.paths import ROOT

DTYPES = [np.dtype(code) for code in ("u1", "i1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8", "?")]
ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter("__metadata__".__ne__)
META = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=5,
)


def file_of(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(dtype: str, shape: list[object], start: object, stop: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@given(arrays=st.dictionaries(NAMES, ARRAYS, max_size=6), meta=META)
@settings(deadline=None)
def test_round_trip(arrays: dict[str, np.ndarray], meta: dict[str, object]) -> None:
    payload = dumps(arrays, meta)
    back, back_meta = loads(payload)
    assert back_meta == meta
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()
        assert back[name].flags.aligned
    assert dumps(dict(reversed(arrays.items())), meta) == payload


@given(arrays=st.dictionaries(NAMES, ARRAYS, max_size=6))
@settings(deadline=None)
def test_the_safetensors_package_reads_what_we_write_and_the_reverse(arrays: dict[str, np.ndarray]) -> None:
    theirs = safetensors.numpy.load(dumps(arrays, {"a": 1}))
    ours, metadata = read(safetensors.numpy.save(arrays, {"k": "v"}))
    assert metadata == {"k": "v"}
    for name, array in arrays.items():
        for found in (theirs[name], ours[name].numpy()):
            assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_views_share_the_buffer_and_odd_layouts_are_copied_right() -> None:
    grid = np.arange(24, dtype=np.int32).reshape(4, 6)
    payload = bytearray(dumps({"turned": grid.T, "big": grid.astype(">i4"), "cut": grid[:, ::2]}, {}))
    arrays, _ = loads(payload)
    assert (arrays["turned"] == grid.T).all()
    assert (arrays["big"] == grid).all()
    assert (arrays["cut"] == grid[:, ::2]).all()
    arrays["cut"][0, 0] = 77
    assert loads(payload)[0]["cut"][0, 0] == 77
    assert not loads(bytes(payload))[0]["cut"].flags.writeable


def test_bf16_rounds_to_nearest_even() -> None:
    # 1 + 2^-8 lies between two bfloat16 values and goes to the even one; 3.4e38 is beyond the largest.
    values = np.array([[1.0, 1 + 2**-8, 1 + 3 * 2**-8, -0.0, 3.4e38, 1e-40]], dtype=np.float32)
    found = read(write({"a": Tensor.bf16_of(values)}, {}))[0]["a"]
    assert found.dtype == "BF16"
    assert found.numpy().shape == (1, 6)
    assert found.numpy()[0, :5].tolist() == [1.0, 1.0, 1.015625, -0.0, np.inf]
    assert found.numpy()[0, 5] == pytest.approx(1e-40, rel=0.01)
    nan = np.array([0xFFFFFFFF, 0x7FC00000, 0x7F800001], np.uint32).view(np.float32)
    assert np.isnan(read(write({"a": Tensor.bf16_of(nan)}, {}))[0]["a"].numpy()).all()


def test_what_cannot_be_sent() -> None:
    with pytest.raises(WireError, match="cannot be sent"):
        dumps({}, {"fps": float("nan")})
    with pytest.raises(TypeError, match="complex64"):
        dumps({"a": np.zeros(1, np.complex64)}, {})
    with pytest.raises(TypeError, match="object"):
        dumps({"a": np.array([None])}, {})
    with pytest.raises(WireError, match="at most 64 fit"):
        dumps({str(k): np.zeros(1) for k in range(MAX_TENSORS + 1)}, {})
    with pytest.raises(WireError, match="header of"):
        dumps({}, {"note": "x" * HEADER_BYTES})


BAD = {
    "empty": (b"", "0 bytes are too few"),
    "no header": (file_of(b""), "does not start with a JSON object"),
    "header claims much": ((10**18).to_bytes(8, "little") + b"{}", "claims 1000000000000000000 bytes"),
    "header cut": (b"\x09" + bytes(7) + b"{}", "claims 9 bytes, the file has 2"),
    "no json": (file_of(b"{a"), "cannot be read"),
    "leading space": (file_of(b" {}"), "does not start"),
    "utf-16": (file_of("{}".encode("utf-16-le")), "cannot be read"),
    "not utf-8": (file_of(b'{"\xff": 1}'), "cannot be read"),
    "too deep": (file_of(b'{"a":' + b"[" * 200_000), "nested too deep"),
    "long number": (file_of(b'{"a":' + b"9" * 50_000 + b"}"), "cannot be read"),
    "nan": (file_of(b'{"a":NaN}'), "NaN, which is no JSON"),
    "same key": (file_of(b'{"a":1,"a":1}'), "same key twice"),
    "same inner key": (file_of(b'{"a":{"dtype":"F32","dtype":"F32"}}'), "same key twice"),
    "metadata number": (file_of({"__metadata__": {"a": 1}}), "map text to text"),
    "metadata list": (file_of({"__metadata__": []}), "map text to text"),
    "lone surrogate": (file_of(b'{"__metadata__":{"a":"\\ud800"}}'), "lone surrogate"),
    "no entry": (file_of({"a": 5}), "described by dtype"),
    "extra field": (file_of({"a": entry("U8", [0], 0, 0) | {"b": 1}}), "described by dtype"),
    "dtype": (file_of({"a": entry("Q4", [0], 0, 0)}), "unknown dtype"),
    "dtype no text": (file_of({"a": entry(["F32"], [0], 0, 0)}), "unknown dtype"),  # type: ignore[arg-type]
    "shape no list": (file_of({"a": entry("U8", 4, 0, 4)}, bytes(4)), "must have a shape"),  # type: ignore[arg-type]
    "negative": (file_of({"a": entry("U8", [-1], 0, 0)}), "none negative"),
    "true is no length": (file_of({"a": entry("U8", [True], 0, 1)}, b"1"), "none negative"),
    "float length": (file_of({"a": entry("U8", [1.0], 0, 1)}, b"1"), "none negative"),
    "rank": (file_of({"a": entry("U8", [1] * 5000, 0, 1)}, b"1"), "at most 8"),
    "huge empty": (file_of({"a": entry("U8", [2**62, 2**62, 0], 0, 0)}), "beyond all memory"),
    "overflow": (file_of({"a": entry("F32", [2**40, 2**40], 0, 16)}, bytes(16)), "beyond all memory"),
    "size": (file_of({"a": entry("F32", [5], 0, 16)}, bytes(16)), "spans 16 bytes, its dtype and shape need 20"),
    "offsets backwards": (file_of({"a": entry("U8", [4], 4, 0)}, bytes(4)), "data_offsets"),
    "three offsets": (file_of({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"1"), "data_offsets"),
    "past the end": (file_of({"a": entry("U8", [9], 0, 9)}, bytes(4)), "ends at byte 9, the file has 4"),
    "hole": (file_of({"a": entry("U8", [1], 1, 2)}, bytes(2)), "leaves bytes unused"),
    "overlap": (file_of({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, bytes(3)), "overlaps"),
    "trailing": (file_of({"a": entry("U8", [1], 0, 1)}, bytes(3)), "2 bytes of data after"),
    "many": (file_of({str(k): entry("U8", [0], 0, 0) for k in range(65)}), "65 tensors, at most 64"),
    "long name": (file_of({"n" * 200: entry("U8", [0], 0, 0)}), "name of 200 characters"),
}


@pytest.mark.parametrize("name", BAD)
def test_hostile_files(name: str) -> None:
    data, message = BAD[name]
    started = time.perf_counter()
    with pytest.raises(SafetensorsError, match=message) as caught:
        read(data)
    assert time.perf_counter() - started < 2
    assert str(caught.value).isascii()
    assert len(str(caught.value)) < 300
    with pytest.raises(WireError, match="damaged"):
        loads(data)


def test_a_header_full_of_tensors_is_refused_in_bounded_time() -> None:
    header = "{" + ",".join(f'"{k}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for k in range(18_000)) + "}"
    assert len(header) < HEADER_BYTES
    started = time.perf_counter()
    with pytest.raises(SafetensorsError, match="18000 tensors"):
        read(file_of(header.encode()))
    assert time.perf_counter() - started < 2


def test_a_foreign_file_is_no_payload() -> None:
    with pytest.raises(WireError, match="no meta"):
        loads(safetensors.numpy.save({"a": np.zeros(2)}))
    with pytest.raises(WireError, match="no object"):
        loads(safetensors.numpy.save({"a": np.zeros(2)}, {"meta": "[1]"}))


@given(data=st.data())
@settings(max_examples=300, deadline=2000)
def test_damaged_payloads_raise_only_wire_errors(data: st.DataObject) -> None:
    payload = bytearray(
        dumps({"pixels": np.zeros((1, 2, 3, 3), np.uint8), "coords": np.ones((2, 4), np.int32)}, {"k": [1, "x"]})
    )
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(payload[: data.draw(st.integers(0, len(payload)))])
    try:
        arrays, meta = loads(damaged)
    except WireError:
        return
    assert all(isinstance(array, np.ndarray) for array in arrays.values())
    assert isinstance(meta, dict)


def test_needs_no_torch_and_no_decoder() -> None:
    code = (
        "import sys, media.wire, media.tokens, media.arrays_json; assert not {'torch', 'PIL', 'av'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)
