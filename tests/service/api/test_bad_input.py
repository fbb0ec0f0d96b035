"""Whatever is sent that cannot be used: a problem document that says what was given and what is allowed."""

from __future__ import annotations

import base64
import io
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from media.image import encode_image
from media.safetensors_file import Tensor, write
from media.tokens import load_tokens
from tests.service.api.block_worker import CONTINUOUS, DISCRETE
from tests.service.api.conftest import blocks, png, problem
from tests.service.api.rig import Api

PICTURE = png(blocks(32, 32))
TEXT = base64.b64encode(PICTURE).decode()
COORDS = [[0, 0, 0, 0], [0, 0, 1, 0]]
SAFETENSORS = "application/vnd.safetensors"
LATENTS = [[0.5] * 48] * 2
LAYOUT = {"kind": "image", "frames": 1, "height": 16, "width": 32, "grid": [1, 1, 2]}


def chunks(data: bytes, size: int = 65_536) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


@pytest.fixture(autouse=True)
def still_healthy(api: Api) -> Iterator[None]:
    yield
    assert api.healthy


# --- bodies


@pytest.mark.parametrize("path", ["/encode", "/v1/embed", "/decode"])
def test_empty_body(client: httpx.Client, path: str) -> None:
    problem(client.post(path), 400, "truncated_body")
    problem(client.post(path, content=b"", headers={"Content-Type": "image/png"}), 400, "truncated_body")
    problem(client.post(path, content=b"", headers={"Content-Type": "application/json"}), 400, "truncated_body")
    problem(client.post(path, files={"file": ("a.png", b"")}), 400, "truncated_body")


@pytest.mark.parametrize("media_type", ["text/plain", "application/xml", "audio/mp4", "font/ttf", "x"])
def test_content_type_that_is_not_offered(client: httpx.Client, media_type: str) -> None:
    response = client.post("/encode", content=PICTURE, headers={"Content-Type": media_type})
    assert "multipart/form-data" in problem(response, 415, "unsupported_media_type")["detail"]


def test_wrong_magic_and_contradicting_type(client: httpx.Client) -> None:
    problem(client.post("/encode", content=bytes(8) + PICTURE[8:]), 415, "unsupported_media_type")
    problem(client.post("/encode", content=b"hello"), 415, "unsupported_media_type")
    as_video = client.post("/encode", content=PICTURE, headers={"Content-Type": "video/mp4"})
    problem(as_video, 415, "media_type_mismatch")
    tokens = client.post("/encode", content=PICTURE, headers={"Accept": "application/vnd.safetensors"}).content
    assert "/decode takes them" in problem(client.post("/encode", content=tokens), 422, "corrupt_media")["detail"]
    picture = problem(client.post("/decode", content=PICTURE), 422, "invalid_token_file")
    assert "this is a png file, not a token file; /encode takes it" in picture["detail"]


def test_truncated_picture(client: httpx.Client) -> None:
    problem(client.post("/encode", content=PICTURE[: len(PICTURE) // 2]), 422, "corrupt_media")


def test_header_that_claims_60000_pixels_a_side(client: httpx.Client) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    end = struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    begun = time.monotonic()
    found = problem(client.post("/encode", content=b"\x89PNG\r\n\x1a\n" + chunk + end), 422, "image_too_large")
    assert found["actual"] == 3_600_000_000
    assert found["limit"] < found["actual"]
    assert time.monotonic() - begun < 2.0


def test_content_encoding_is_refused(client: httpx.Client) -> None:
    response = client.post("/encode", content=zlib.compress(PICTURE), headers={"Content-Encoding": "gzip"})
    problem(response, 415, "unsupported_media_type")
    assert client.post("/encode", content=PICTURE, headers={"Content-Encoding": "identity"}).status_code == 200


@pytest.mark.parametrize("accept", ["image/png", "text/html", "application/json;q=0", "video/*"])
def test_accept_that_nothing_fits(client: httpx.Client, accept: str) -> None:
    found = problem(client.post("/encode", content=PICTURE, headers={"Accept": accept}), 406, "not_acceptable")
    assert "application/vnd.safetensors" in found["available"]


@pytest.mark.parametrize("accept", ["png", "*/png", "application/json;q=2", "application/json;q=x", "/"])
def test_accept_that_is_malformed(client: httpx.Client, accept: str) -> None:
    problem(client.post("/encode", content=PICTURE, headers={"Accept": accept}), 400, "invalid_header")


@pytest.mark.parametrize(
    "headers", [{"Request-Timeout": "soon"}, {"Request-Timeout": "-1"}, {"Request-Timeout": "nan"}]
)
def test_malformed_headers(client: httpx.Client, headers: dict[str, str]) -> None:
    problem(client.post("/encode", content=PICTURE, headers=headers), 400, "invalid_header")


def test_too_many_headers(client: httpx.Client) -> None:
    problem(client.get("/v1/limits", headers={f"x-{i}": "1" for i in range(100)}), 400, "invalid_header")


@pytest.mark.parametrize("count", [1, 5])
def test_headers_that_are_too_large_together(api: Api, count: int) -> None:
    limit = api.settings.header_bytes
    headers = {f"x-{i}": "a" * (limit // count) for i in range(count)}
    for response in (
        api.client.get("/v1/limits", headers=headers),
        api.client.post("/encode", content=PICTURE, headers=headers),
    ):
        found = problem(response, 431, "headers_too_large")
        assert found["limit"] == limit
        assert found["actual"] > limit
    assert api.client.get("/v1/limits", headers={"x-0": "a" * (limit // 2)}).status_code == 200


# --- options


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ({"output": "latents"}, "output"),
        ({"outputs": "latent"}, "outputs"),
        ({"outputs": ""}, "outputs"),
        ({"fit": "stretch"}, "fit"),
        ({"floats": "perhaps"}, "floats"),
        ({"seed": "-1"}, "seed"),
        ({"seed": "1.5"}, "seed"),
        ({"sample": "maybe"}, "sample"),
        ({"on_error": "ignore"}, "on_error"),
        ({"model": "m" * 300}, "model"),
    ],
)
def test_option_that_is_unknown_or_out_of_range(client: httpx.Client, query: dict[str, str], name: str) -> None:
    found = problem(client.post("/encode", content=PICTURE, params=query), 422, "invalid_parameter")
    assert name in found["errors"][0]["field"]
    field = problem(client.post("/encode", files={"file": PICTURE}, data=query), 422, "invalid_parameter")
    assert name in field["errors"][0]["field"]
    body = problem(client.post("/encode", json={"file": TEXT, **query}), 422, "invalid_parameter")
    assert name in body["errors"][0]["field"]


def test_unknown_names_are_told_with_the_known_ones(client: httpx.Client) -> None:
    found = problem(client.post("/encode", json={"file": TEXT, "output": ["latents"]}), 422, "invalid_parameter")
    assert "`output`" in found["detail"]
    assert "outputs" in found["detail"]
    nested = problem(
        client.post("/encode", json={"items": [{"data": TEXT, "kind": "image"}]}), 422, "invalid_parameter"
    )
    assert nested["errors"][0]["field"] == "items.0.kind"
    assert "data" in nested["detail"]


def test_option_given_twice(client: httpx.Client) -> None:
    problem(client.post("/encode?model=a&model=b", content=PICTURE), 422, "invalid_parameter")
    both = client.post("/encode", files={"file": PICTURE}, data={"fit": "pad"}, params={"fit": "crop"})
    assert "fit" in problem(both, 422, "invalid_parameter")["detail"]
    repeated = client.post("/encode", content=PICTURE, params=[("outputs", "latents"), ("outputs", "embedding")])
    assert {"latents", "embedding"} <= set(repeated.json()["items"][0])


def test_model_that_nobody_has(client: httpx.Client) -> None:
    found = problem(client.post("/encode", content=PICTURE, params={"model": "gpt"}), 404, "model_not_found")
    assert CONTINUOUS["name"] in found["detail"]
    configured = client.post("/encode", content=PICTURE, params={"model": "not-started"})
    problem(configured, 503, "no_worker")
    assert int(configured.headers["retry-after"]) >= 1


def test_output_that_a_model_cannot_do(client: httpx.Client) -> None:
    query = {"model": CONTINUOUS["name"], "outputs": "codes"}
    found = problem(client.post("/encode", content=PICTURE, params=query), 422, "unsupported_output")
    assert DISCRETE["name"] in found["detail"]
    assert "codes" in found["models"][DISCRETE["name"]]


# --- multipart


def multipart(*parts: bytes, boundary: bytes = b"XX") -> bytes:
    return b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + b"--\r\n"


def file_part(data: bytes = PICTURE, name: bytes = b"file") -> bytes:
    return b'Content-Disposition: form-data; name="%s"; filename="a.png"\r\n\r\n%s' % (name, data)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (multipart(file_part())[:-6], 400, "invalid_multipart"),
        (multipart(file_part())[: len(PICTURE) // 2], 400, "invalid_multipart"),
        (b"no boundary at all", 400, "invalid_multipart"),
        (b"--XX--\r\n", 422, "invalid_parameter"),
        (multipart(b"Content-Type: image/png\r\n\r\nx"), 400, "invalid_multipart"),
        (multipart(file_part(name=b"image")), 422, "invalid_parameter"),
        (multipart(b'Content-Disposition: form-data; name="model"\r\n\r\nx'), 422, "invalid_parameter"),
        (multipart(file_part(), b'Content-Disposition: form-data; name="model"\r\n\r\n\xff'), 422, "invalid_parameter"),
        (multipart(file_part(), b'Content-Disposition: form-data; name="request"\r\n\r\n{'), 400, "invalid_json"),
        (multipart(file_part(), b'Content-Disposition: form-data; name="request"\r\n\r\n[]'), 422, "invalid_parameter"),
        (
            multipart(file_part(), b'Content-Disposition: form-data; name="fit"\r\n\r\n' + b"a" * 70_000),
            413,
            "body_too_large",
        ),
        (multipart(b"X-Long: " + b"a" * 20_000 + b"\r\n\r\n"), 400, "invalid_multipart"),
        (multipart(*[file_part(b"x")] * 65), 413, "too_many_items"),
        (multipart(*[b'Content-Disposition: form-data; name="outputs"\r\n\r\nlatents'] * 81), 413, "too_many_items"),
    ],
)
def test_multipart_that_is_wrong(client: httpx.Client, body: bytes, status: int, code: str) -> None:
    response = client.post("/encode", content=body, headers={"Content-Type": "multipart/form-data; boundary=XX"})
    problem(response, status, code)


def test_multipart_without_a_usable_boundary(client: httpx.Client) -> None:
    for header in (
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=" + "a" * 80,
    ):
        response = client.post("/encode", content=multipart(file_part()), headers={"Content-Type": header})
        problem(response, 400, "invalid_multipart")


def test_missing_file_part_names_what_is_there(client: httpx.Client) -> None:
    response = client.post("/encode", files={"model": (None, "x"), "fit": (None, "pad")})
    detail = problem(response, 422, "invalid_parameter")["detail"]
    assert "`file`" in detail
    assert "fit, model" in detail


# --- JSON


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b'{"file": NaN}', 422, "non_finite_input"),
        (b'{"file": [-Infinity]}', 422, "non_finite_input"),
        (b'{"file": "\xff"}', 400, "invalid_json"),
        ('{"file": ""}'.encode("utf-16"), 400, "invalid_json"),
        (b'{"file": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "invalid_json"),
        (b'{"file": ' + b"[" * 40 + b"]" * 40 + b"}", 400, "invalid_json"),
        (b"[]", 422, "invalid_parameter"),
        (b"null", 422, "invalid_parameter"),
        (b"{}", 422, "invalid_parameter"),
        (b'{"file": 7}', 422, "invalid_parameter"),
        (b'{"file": []}', 422, "invalid_parameter"),
        (b'{"file": "YQ==", "data": "YQ=="}', 422, "invalid_parameter"),
        (b'{"file": "not base64!"}', 422, "invalid_parameter"),
        (b'{"file": "YQ"}', 415, "unsupported_media_type"),
        (b'{"file": "YQA"}', 415, "unsupported_media_type"),
        (b'{"file": "Y"}', 422, "invalid_parameter"),
        (b'{"file": "YQ==="}', 422, "invalid_parameter"),
        (b'{"file": ""}', 400, "truncated_body"),
        (b'{"file": "http://127.0.0.1:9/a.png"}', 422, "invalid_parameter"),
        (b'{"file": "file:///etc/hostname"}', 422, "invalid_parameter"),
        (b'{"file": "data:image/png,abc"}', 422, "invalid_parameter"),
        (b'{"file": "YWJjZGVmZw=="}', 415, "unsupported_media_type"),
        (b'{"items": [{"id": "a"}]}', 422, "invalid_parameter"),
        (b'{"items": [{"id": 5, "data": "YQ=="}]}', 422, "invalid_parameter"),
        (b'{"seed": ' + b"9" * 5000 + b', "file": "YQ=="}', 422, "non_finite_input"),
        (b'{"seed": ' + b"9" * 30 + b', "file": "YQ=="}', 422, "invalid_parameter"),
        (b'{"file": [' + b",".join([b'"YQ=="'] * 65) + b"]}", 413, "too_many_items"),
        (b'{"file": [' + b"1.5," * 2_100_000 + b"1]}", 413, "body_too_large"),
        (b'{"file": [' + b"[]," * 1_100_000 + b"1]}", 413, "body_too_large"),
    ],
)
def test_json_that_is_wrong(client: httpx.Client, body: bytes, status: int, code: str) -> None:
    begun = time.monotonic()
    problem(client.post("/encode", content=body, headers={"Content-Type": "application/json"}), status, code)
    assert time.monotonic() - begun < 5.0


def test_problem_does_not_repeat_what_was_sent(client: httpx.Client) -> None:
    response = client.post("/encode", json={"file": "secret-payload!", "fit": "pad"})
    assert "secret" not in problem(response, 422, "invalid_parameter")["detail"]
    for value in ({"secret": 1}, ["secret", 5]):
        response = client.post("/encode", json={"file": value})
        assert "secret" not in problem(response, 422, "invalid_parameter")["detail"]


@pytest.mark.parametrize(
    ("path", "body", "detail"),
    [
        (
            "/encode",
            {"outputs": "latent"},
            "`outputs`: given is 'latent', allowed are latents, codes, embedding, features, reconstruction",
        ),
        ("/embed", {"outputs": ["latents"]}, "`outputs`: given is 'latents', allowed are embedding, features"),
        ("/encode", {"outputs": ""}, "`outputs`: given is none, allowed are latents"),
        ("/encode", {"outputs": 7}, "`outputs`: given is 7, allowed are latents"),
        ("/encode", {"outputs": "x" * 9000}, "`outputs`: given is '" + "x" * 50 + "'..., allowed are latents"),
        ("/encode", {"fit": "stretch"}, "`fit`: given is 'stretch', wanted is 'pad' or 'crop'"),
        ("/encode", {"seed": 1.5, "sample": True}, "`seed`: given is 1.5, wanted is a whole number"),
        ("/encode", {"seed": -1, "sample": True}, "`seed`: given is -1, wanted is at least 0"),
        ("/encode", {"floats": "perhaps"}, "`floats`: given is 'perhaps', wanted is true or false"),
        ("/encode", {"file": [TEXT, 7]}, "`file`: given is a number, wanted is base64 text or a list of such"),
        ("/encode", {"model": "m" * 300}, "`model`: given are 300 characters, at most 200 are allowed"),
        ("/decode", {"quality": 101, "file": None}, "`quality`: given is 101, wanted is at most 100"),
        ("/decode", {"layout": "image", "file": None}, "`layout`: given is text, wanted is an object"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(
    client: httpx.Client, path: str, body: dict[str, Any], detail: str
) -> None:
    content = {"file": TEXT} if path != "/decode" else {"latents": LATENTS, "coords": COORDS}
    sent = {name: value for name, value in (content | body).items() if value is not None}
    assert detail in problem(client.post(path, json=sent), 422, "invalid_parameter")["detail"]


@pytest.mark.parametrize("sample", [{}, {"sample": False}])
def test_a_seed_without_sampling_is_refused(client: httpx.Client, sample: dict[str, bool]) -> None:
    found = problem(client.post("/encode", json={"file": TEXT, "seed": 1, **sample}), 422, "invalid_parameter")
    assert "`seed`" in found["detail"]
    assert "`sample=true`" in found["detail"]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/encode", {"file": "not base64!"}, "`file`"),
        ("/encode", {"data": ["not base64!"]}, "`data.0`"),
        ("/encode", {"items": [{"data": "not base64!"}]}, "`items.0.data`"),
        ("/decode", {"data": "not base64!"}, "`data`"),
        ("/decode", {"items": [{"data": "not base64!"}]}, "`items.0.data`"),
    ],
)
def test_bad_base64_is_told_with_its_field(client: httpx.Client, path: str, body: dict[str, Any], field: str) -> None:
    detail = problem(client.post(path, json=body), 422, "invalid_parameter")["detail"]
    assert detail.startswith(f"{field} is not valid base64")


def test_base64_may_be_sent_without_padding(client: httpx.Client) -> None:
    for missing in range(3):
        picture = PICTURE + bytes(-(len(PICTURE) + missing) % 3)  # what follows a PNG's end is not read
        text = base64.b64encode(picture).decode()
        assert text.count("=") == missing
        for sent in (text, text.rstrip("="), "data:image/png;base64," + text.rstrip("=")):
            response = client.post("/encode", json={"file": sent})
            assert response.status_code == 200, response.text
    arrays = [np.zeros((1, 8), np.uint8), np.zeros((1, 4), np.int32)]
    tensors = [
        {"dtype": str(array.dtype), "shape": list(array.shape), "data": base64.b64encode(array.tobytes()).decode()}
        for array in arrays
    ]
    assert [tensor["data"].count("=") for tensor in tensors] == [1, 2]
    for strip in ("", "="):
        codes, coords = ({**tensor, "data": tensor["data"].rstrip(strip)} for tensor in tensors)
        response = client.post("/decode", json={"codes": codes, "coords": coords})
        assert response.status_code == 200, response.text


def test_a_format_that_holds_no_reconstruction_says_so(client: httpx.Client) -> None:
    for outputs in ("reconstruction", "latents,reconstruction"):
        response = client.post(
            "/encode",
            content=PICTURE,
            params={"outputs": outputs},
            headers={"Accept": "application/vnd.safetensors"},
        )
        detail = problem(response, 406, "not_acceptable")["detail"]
        assert "a reconstruction is pixels, which a token file, npy and npz do not hold" in detail


# --- tokens


def test_nan_in_latents_of_a_token_file(client: httpx.Client) -> None:
    latents = np.full((2, 48), np.nan, np.float32)
    data = write({"latents": Tensor.of(latents), "coords": Tensor.of(np.array(COORDS, np.int32))}, {})
    problem(client.post("/decode", content=data), 422, "non_finite_input")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"latents": LATENTS}, "invalid_token_file"),
        ({"coords": COORDS}, "invalid_token_file"),
        ({"latents": LATENTS, "codes": [[1] * 8] * 2, "coords": COORDS}, "invalid_token_file"),
        ({"latents": [[1e5] * 48] * 2, "coords": COORDS}, "invalid_token_file"),
        ({"latents": [[0.5] * 47] * 2, "coords": COORDS}, "invalid_token_file"),
        ({"latents": LATENTS[:1], "coords": COORDS}, "invalid_token_file"),
        ({"latents": "x", "coords": COORDS}, "invalid_parameter"),
        ({"latents": [[0.5] * 48, [0.5] * 3], "coords": COORDS}, "invalid_parameter"),
        ({"latents": [["a"] * 48] * 2, "coords": COORDS}, "invalid_parameter"),
        ({"latents": LATENTS, "coords": [[0, 0, 0, 0]] * 2}, "invalid_token_file"),
        ({"latents": LATENTS, "coords": [[0, 0, 0, 0], [0, 0, 2, 0]]}, "invalid_token_file"),
        ({"latents": LATENTS, "coords": [[0, 0, 1, 0], [0, 0, 0, 0]]}, "invalid_token_file"),
        ({"latents": LATENTS, "coords": [[0, 0, -1, 0], [0, 0, 0, 0]]}, "invalid_token_file"),
        ({"latents": LATENTS, "coords": [[0, 0, 0, 0], [0, 0, 5000, 0]]}, "invalid_token_file"),
        ({"latents": LATENTS, "coords": [[0.5, 0, 0, 0]] * 2}, "invalid_token_file"),
        ({"codes": [[1] * 8, [4096] * 8], "coords": COORDS}, "invalid_token_file"),
        ({"codes": [[1] * 8, [-1] * 8], "coords": COORDS}, "invalid_token_file"),
        ({"codes": [[1] * 7] * 2, "coords": COORDS}, "invalid_token_file"),
        ({"codes": [[1.5] * 8] * 2, "coords": COORDS}, "invalid_token_file"),
        ({"codes": {"a": "b"}, "coords": "x"}, "invalid_parameter"),
        ({"latents": LATENTS, "coords": COORDS, "layout": {"kind": "image"}}, "invalid_token_file"),
        ({"latents": LATENTS, "coords": COORDS, "shape": [1]}, "invalid_parameter"),
        ({"items": []}, "invalid_parameter"),
        ({"items": [{}], "data": "YQ=="}, "invalid_parameter"),
        ({"data": "YQ==", "coords": COORDS}, "invalid_parameter"),
        ({}, "invalid_parameter"),
    ],
)
def test_tokens_that_cannot_be_decoded(client: httpx.Client, body: dict[str, Any], code: str) -> None:
    problem(client.post("/decode", json=body), 422, code)


def test_tensor_whose_bytes_do_not_fit_its_shape(client: httpx.Client) -> None:
    tensor = {"dtype": "float32", "shape": [2, 48], "data": base64.b64encode(bytes(100)).decode()}
    problem(client.post("/decode", json={"latents": tensor, "coords": COORDS}), 422, "invalid_parameter")
    huge = {"dtype": "float32", "shape": [2**40, 48], "data": ""}
    problem(client.post("/decode", json={"latents": huge, "coords": COORDS}), 413, "too_many_tokens")


def test_tokens_of_another_model_or_revision(client: httpx.Client) -> None:
    tokens = client.post("/encode", content=PICTURE, headers={"Accept": "application/vnd.safetensors"}).content
    (item,) = load_tokens(tokens)
    latents, coords = Tensor.of(np.asarray(item.latents)), Tensor.of(item.coords)

    def file(**metadata: str) -> bytes:
        return write({"latents": latents, "coords": coords}, metadata)

    assert client.post("/decode", content=file()).status_code == 200, "who does not say is believed"
    for metadata in ({"model": "another"}, {"model": CONTINUOUS["name"], "revision": "f" * 32}):
        problem(client.post("/decode", content=file(**metadata)), 409, "model_mismatch")
        assert client.post("/decode", content=file(**metadata), params={"force": "true"}).status_code == 200
    other = client.post("/decode", content=tokens, params={"model": DISCRETE["name"]})
    problem(other, 409, "model_mismatch")
    arrays = {"latents": LATENTS, "coords": COORDS, "model": CONTINUOUS["name"], "revision": "f" * 32}
    problem(client.post("/decode", json=arrays), 409, "model_mismatch")


def test_more_tokens_to_decode_than_an_item_may_have(client: httpx.Client) -> None:
    coords = np.zeros((40_000, 4), np.int32)
    coords[:, 1], coords[:, 2] = np.arange(40_000) // 200, np.arange(40_000) % 200
    data = write({"codes": Tensor.of(np.zeros((40_000, 8), np.int16)), "coords": Tensor.of(coords)}, {})
    found = problem(client.post("/decode", content=data), 413, "item_too_large")
    assert (found["limit"], found["actual"]) == (32_768, 40_000)


# --- addresses and methods


def test_unknown_address_and_method(client: httpx.Client) -> None:
    problem(client.get("/nothing"), 404, "not_found")
    problem(client.post("/encode/"), 404, "not_found")
    problem(client.post("/v2/encode", content=PICTURE), 404, "not_found")
    wrong = client.get("/v1/encode")
    problem(wrong, 405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    problem(client.put("/decode", content=b"x"), 405, "method_not_allowed")
    problem(client.get("/errors/none"), 404, "not_found")


# --- sizes


@pytest.fixture(scope="module")
def small(redis_url: str, worker: object) -> Iterator[Api]:
    with Api(redis_url, body_bytes=100_000, json_bytes=50_000, request_items=4) as running:
        yield running


def test_body_over_the_limit_by_its_announced_length(small: Api) -> None:
    found = problem(small.client.post("/encode", content=bytes(100_001)), 413, "body_too_large")
    assert found["limit"] == 100_000
    assert small.client.post("/encode", content=bytes(100_000)).status_code == 415
    as_json = small.client.post("/encode", content=b" " * 50_001, headers={"Content-Type": "application/json"})
    assert problem(as_json, 413, "body_too_large")["limit"] == 50_000
    assert small.healthy


def test_body_over_the_limit_in_chunks(small: Api) -> None:
    problem(small.client.post("/encode", content=chunks(bytes(300_000))), 413, "body_too_large")
    long_json = small.client.post(
        "/encode", content=chunks(b" " * 60_000), headers={"Content-Type": "application/json"}
    )
    problem(long_json, 413, "body_too_large")
    inside = small.client.post("/encode", content=chunks(PICTURE))
    assert inside.status_code == 200
    assert small.healthy


def test_body_without_end_is_answered_and_cut_off(small: Api) -> None:
    with socket.create_connection(("127.0.0.1", small.port), timeout=20.0) as connection:
        connection.sendall(b"POST /encode HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
        begun = time.monotonic()
        answer = b""
        connection.setblocking(True)
        try:
            while time.monotonic() - begun < 15.0:
                connection.sendall(chunk)
                connection.settimeout(0.001)
                try:
                    received = connection.recv(65_536)
                    answer += received
                    if not received:
                        break
                except TimeoutError:
                    pass
                connection.settimeout(20.0)
        except (ConnectionResetError, BrokenPipeError):
            pass
        assert b"413" in answer.split(b"\r\n")[0]
        assert b"body_too_large" in answer
        assert time.monotonic() - begun < 10.0, "the server went on listening"
    assert small.healthy


def test_more_items_than_allowed(small: Api) -> None:
    files = [("file", (f"{i}.png", png(blocks(16, 16)))) for i in range(5)]
    problem(small.client.post("/encode", files=files), 413, "too_many_items")
    data = png(blocks(16, 16))
    both = small.client.post("/encode", json={"file": [base64.b64encode(data).decode()] * 5})
    assert problem(both, 413, "too_many_items")["actual"] == 5


def test_more_tokens_than_allowed(redis_url: str, worker: object) -> None:
    limits = {"item_tokens": 16, "request_tokens": 20}
    with Api(redis_url, media=limits) as tight:
        one = problem(tight.client.post("/encode", content=png(blocks(80, 64))), 413, "too_many_tokens")
        assert (one["limit"], one["actual"]) == (16, 20)
        files = [("file", (f"{i}.png", png(blocks(48, 48)))) for i in range(3)]
        all_of_them = problem(tight.client.post("/encode", files=files), 413, "too_many_tokens")
        assert (all_of_them["limit"], all_of_them["actual"]) == (20, 27)
        assert tight.client.post("/encode", files=files[:2]).status_code == 200


def test_decode_to_more_bytes_than_allowed(redis_url: str, worker: object) -> None:
    with Api(redis_url, media={"decode_bytes": 5000}) as tight:
        clip = {"latents": LATENTS, "coords": COORDS, "layout": {**LAYOUT, "kind": "video", "frames": 4}}
        assert tight.client.post("/decode", json={**clip, "layout": LAYOUT}).status_code == 200
        found = problem(tight.client.post("/decode", json=clip), 413, "item_too_large")
        assert found["actual"] == 4 * 16 * 32 * 3


def test_slow_upload(redis_url: str, worker: object) -> None:
    with (
        Api(redis_url, upload_timeout_s=0.5) as strict,
        socket.create_connection(("127.0.0.1", strict.port), timeout=10.0) as connection,
    ):
        head = b"POST /encode HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\nContent-Type: image/png\r\n\r\n"
        connection.sendall(head + b"\x89PNG")
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
        assert b" 408 " in answer.split(b"\r\n")[0]
        assert b"upload_timeout" in answer


def test_half_a_head(redis_url: str, worker: object) -> None:
    """On a new connection and on a kept one; a request in two pieces is served, and nothing runs between two."""
    request = b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"
    with Api(redis_url, head_timeout_s=1.0, keep_alive_s=5) as api:
        for first in (b"", request):
            with socket.create_connection(("127.0.0.1", api.port), timeout=10.0) as connection:
                if first:
                    connection.sendall(first[:20])
                    time.sleep(0.2)
                    connection.sendall(first[20:])
                    answer = b""
                    while b'"live"' not in answer:
                        answer += connection.recv(65_536)
                    time.sleep(1.5)
                begin = time.monotonic()
                connection.sendall(b"POST /enc")
                assert connection.recv(65_536) == b""
                assert 0.5 < time.monotonic() - begin < 5.0


def test_slow_reader(redis_url: str, worker: object) -> None:
    """An answer that nobody takes is in flight, for so long as a client may; then its memory is free again."""
    picture = encode_image(np.zeros((2048, 2048, 3), np.uint8))  # 17 MB as JSON: more than sockets hold
    with Api(redis_url, answer_stall_s=1.5) as api, socket.socket() as connection:
        tokens = api.client.post("/encode", content=picture, headers={"Accept": SAFETENSORS})
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        connection.connect(("127.0.0.1", api.port))
        head = f"POST /decode HTTP/1.1\r\nHost: a\r\nAccept: application/json\r\nContent-Type: {SAFETENSORS}\r\n"
        connection.sendall(head.encode() + f"Content-Length: {len(tokens.content)}\r\n\r\n".encode() + tokens.content)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        assert "atoken_http_in_flight 1.0" in api.client.get("/metrics").text
        give_up = time.monotonic() + 10.0
        while 'code="client_closed",op="decode"' not in api.client.get("/metrics").text:
            assert time.monotonic() < give_up
            time.sleep(0.05)
        assert "atoken_http_in_flight 0.0" in api.client.get("/metrics").text


def test_client_that_leaves_in_the_middle_of_its_upload(api: Api) -> None:
    with socket.create_connection(("127.0.0.1", api.port), timeout=10.0) as connection:
        connection.sendall(b"POST /encode HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nabc")
    give_up = time.monotonic() + 5.0
    while 'code="client_closed",op="encode"' not in api.client.get("/metrics").text:
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_npy_is_not_unpickled(client: httpx.Client) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([object()], dtype=object), allow_pickle=True)
    problem(client.post("/encode", content=buffer.getvalue()), 415, "unsupported_media_type")
    problem(client.post("/decode", content=buffer.getvalue()), 422, "invalid_token_file")
