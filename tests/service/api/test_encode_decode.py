"""A picture and a clip to tokens and back over HTTP, in every form that goes in and comes out."""

from __future__ import annotations

import base64
import io
import json
from email import message_from_bytes
from typing import Any

import httpx
import numpy as np
import pytest

from media.limits import Limits
from media.tokens import load_tokens
from media.video import decode_video
from service.api.answers import DecodeAnswer, EncodeAnswer
from tests.service.api.block_worker import CONTINUOUS, DISCRETE
from tests.service.api.conftest import array_of, blocks, mp4, pixels_of, png, problem

TOKENS = {"Accept": "application/vnd.safetensors"}
JSON = {"Accept": "application/json"}
CLIP = np.stack([np.full((40, 56, 3), 20 * step, np.uint8) for step in range(6)])


def encode(
    client: httpx.Client, data: bytes, accept: str = "application/vnd.safetensors", **query: Any
) -> httpx.Response:
    response = client.post("/v1/encode", content=data, params=query, headers={"Accept": accept})
    assert response.status_code == 200, response.text
    return response


@pytest.mark.parametrize("prefix", ["", "/v1"])
@pytest.mark.parametrize("size", [(52, 68), (1, 1), (17, 31), (16, 16), (4, 400)])
def test_picture_to_token_file_and_back_is_exact(client: httpx.Client, prefix: str, size: tuple[int, int]) -> None:
    picture = blocks(*size)
    encoded = client.post(f"{prefix}/encode", content=png(picture), headers={"Content-Type": "image/png", **TOKENS})
    assert encoded.status_code == 200, encoded.text
    assert encoded.headers["content-type"] == "application/vnd.safetensors"
    tokens = -(-size[0] // 16) * -(-size[1] // 16)
    assert encoded.headers["atoken-tokens"] == str(tokens)
    assert encoded.headers["atoken-model"] == CONTINUOUS["name"]
    assert encoded.headers["atoken-revision"] == CONTINUOUS["revision"]
    (item,) = load_tokens(encoded.content)
    assert item.latents is not None
    assert item.latents.shape == (tokens, 48)
    decoded = client.post(f"{prefix}/decode", content=encoded.content)
    assert decoded.status_code == 200, decoded.text
    assert decoded.headers["content-type"] == "image/png"
    got = pixels_of(decoded.content)
    assert got.shape == picture.shape
    if size[0] % 4 == 0 and size[1] % 4 == 0:  # else a block at the edge is a mean with the padding
        np.testing.assert_array_equal(got, picture)


def test_clip_to_token_file_and_back_has_its_frames_and_size(client: httpx.Client) -> None:
    encoded = encode(client, mp4(CLIP))
    assert encoded.headers["atoken-tokens"] == str(2 * 3 * 4)
    decoded = client.post("/v1/decode", content=encoded.content)
    assert decoded.headers["content-type"] == "video/mp4"
    clip = decode_video(decoded.content, Limits())
    assert clip.frames.shape == CLIP.shape
    assert clip.fps == pytest.approx(10.0)
    lossless = client.post("/v1/decode", content=encoded.content, headers={"Accept": "video/x-matroska"})
    frames = decode_video(lossless.content, Limits()).frames
    pixels = client.post("/v1/decode", content=encoded.content, headers={"Accept": "application/x-npy"})
    np.testing.assert_array_equal(frames, np.load(io.BytesIO(pixels.content)))


@pytest.mark.parametrize("media_type", ["image/png", "image/webp", "image/jpeg"])
def test_decode_gives_the_picture_format_that_is_accepted(client: httpx.Client, media_type: str) -> None:
    picture = np.full((32, 48, 3), 77, np.uint8)
    tokens = encode(client, png(picture)).content
    decoded = client.post("/v1/decode", content=tokens, headers={"Accept": media_type}, params={"quality": 95})
    assert decoded.headers["content-type"] == media_type
    assert np.abs(pixels_of(decoded.content).astype(int) - picture).max() <= 2


def test_decode_of_several_items_is_json_or_multipart(client: httpx.Client) -> None:
    pictures = [blocks(32, 32, seed) for seed in range(2)]
    files = [("file", (f"{i}.png", png(picture), "image/png")) for i, picture in enumerate(pictures)]
    tokens = client.post("/encode", files=[*files, ("file", ("c.mp4", mp4(CLIP), "video/mp4"))], headers=TOKENS)
    assert tokens.status_code == 200, tokens.text
    assert len(load_tokens(tokens.content)) == 3

    decoded = client.post("/decode", content=tokens.content)
    answer = DecodeAnswer.model_validate(decoded.json())
    assert [item.kind for item in answer.items] == ["image", "image", "video"]  # type: ignore[union-attr]
    for picture, item in zip(pictures, decoded.json()["items"], strict=False):
        np.testing.assert_array_equal(array_of(item["pixels"]), picture)
    assert array_of(decoded.json()["items"][2]["pixels"]).shape == CLIP.shape

    mixed = client.post("/decode", content=tokens.content, headers={"Accept": "multipart/mixed"})
    head = f"Content-Type: {mixed.headers['content-type']}\r\n\r\n".encode()
    parts: Any = message_from_bytes(head + mixed.content).get_payload()
    assert [part.get_content_type() for part in parts] == ["image/png", "image/png", "video/mp4"]
    first = parts[0].get_payload(decode=True)
    assert isinstance(first, bytes)
    np.testing.assert_array_equal(pixels_of(first), pictures[0])
    problem(client.post("/decode", content=tokens.content, headers={"Accept": "image/png"}), 406, "not_acceptable")


def test_json_answer_has_all_outputs_and_fits_its_schema(client: httpx.Client) -> None:
    picture = blocks(20, 36)
    names = "latents,embedding,features"
    response = encode(client, png(picture), accept="*/*", outputs=names)
    answer = EncodeAnswer.model_validate(response.json())
    assert response.headers["content-type"] == "application/json"
    assert answer.usage.tokens == 6
    (item,) = response.json()["items"]
    assert item["layout"] == {
        "kind": "image", "frames": 1, "height": 20, "width": 36, "grid": [1, 2, 3], "fps": None
    }  # fmt: skip
    assert array_of(item["latents"]).shape == (6, 48)
    assert array_of(item["features"]).shape == (6, 48)
    np.testing.assert_array_equal(array_of(item["coords"])[:, 1:3], [[x, y] for x in range(2) for y in range(3)])
    assert np.linalg.norm(array_of(item["embedding"])) == pytest.approx(1.0, abs=1e-6)


def test_floats_are_nested_lists_on_request(client: httpx.Client) -> None:
    data = png(blocks(16, 32))
    packed = encode(client, data, accept="application/json").json()["items"][0]
    plain = encode(client, data, accept="application/json", floats="true").json()["items"][0]
    np.testing.assert_allclose(plain["latents"], array_of(packed["latents"]), rtol=1e-6)
    assert plain["coords"] == array_of(packed["coords"]).tolist()


def test_json_answer_of_encode_goes_back_into_decode(client: httpx.Client) -> None:
    picture = blocks(20, 36)
    for floats in ("true", "false"):
        answer = encode(client, png(picture), accept="application/json", floats=floats).json()
        item = answer["items"][0]
        body = {name: item[name] for name in ("latents", "coords", "layout")}
        body |= {"model": answer["model"], "revision": answer["revision"]}
        decoded = client.post("/v1/decode", json=body)
        assert decoded.status_code == 200, decoded.text
        np.testing.assert_array_equal(pixels_of(decoded.content), picture)
        several = client.post(
            "/v1/decode", json={"items": [{"id": "a", **{k: item[k] for k in ("latents", "coords")}}]}
        )
        assert pixels_of(several.content).shape == (32, 48, 3), "without a layout: whole patches"


@pytest.mark.parametrize("outputs", ["latents,embedding,features", "codes,reconstruction"])
def test_json_answer_of_encode_can_be_posted_to_decode_as_it_is(client: httpx.Client, outputs: str) -> None:
    picture = blocks(8, 8).repeat(4, axis=0).repeat(4, axis=1)
    files = [("file", ("a.png", png(picture))), ("file", ("b.txt", b"nonsense"))]
    whole = client.post("/encode", files=files[:1], data={"outputs": outputs}).json()
    for body in (whole, whole["items"][0], {"items": whole["items"]}):
        decoded = client.post("/decode", json=body)
        assert decoded.status_code == 200, decoded.text
        np.testing.assert_array_equal(pixels_of(decoded.content), picture)
    problem(client.post("/decode", json={**whole, "usages": 1}), 422, "invalid_parameter")
    problem(client.post("/decode", json={"items": [{**whole["items"][0], "token": 1}]}), 422, "invalid_parameter")

    partial = client.post("/encode", files=files, data={"outputs": outputs}).json()
    for body in (partial["items"][1], {"items": partial["items"][1:]}):
        assert "`status`" in problem(client.post("/decode", json=body), 422, "invalid_parameter")["detail"]
    good, bad = client.post("/decode", json=partial).json()["items"]
    assert (good["status"], bad["status"], bad["error"]["status"]) == ("ok", "error", 422)


def test_codes_go_to_the_model_that_has_them(client: httpx.Client) -> None:
    picture = blocks(8, 8).repeat(4, axis=0).repeat(4, axis=1)
    encoded = encode(client, png(picture), outputs="codes")
    assert encoded.headers["atoken-model"] == DISCRETE["name"]
    (item,) = load_tokens(encoded.content)
    assert item.codes is not None
    assert item.codes.shape == (4, 8)
    decoded = client.post("/decode", content=encoded.content)
    assert decoded.headers["atoken-model"] == DISCRETE["name"]
    np.testing.assert_array_equal(pixels_of(decoded.content), picture)

    both = encode(client, png(picture), accept="application/json", outputs="latents,codes").json()["items"][0]
    assert "codes" in both
    assert "latents" not in both, "of a discrete model the latents follow from the codes"
    bare = {"codes": both["codes"], "coords": both["coords"]}
    np.testing.assert_array_equal(pixels_of(client.post("/decode", json=bare).content), picture)
    assert encode(client, png(picture), model=DISCRETE["name"]).headers["atoken-model"] == DISCRETE["name"]


def test_reconstruction_as_picture_and_in_json(client: httpx.Client) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (33, 50, 3), dtype=np.uint8)
    shown = encode(client, png(picture), accept="image/png", outputs="reconstruction")
    assert shown.headers["content-type"] == "image/png"
    assert pixels_of(shown.content).shape == picture.shape
    item = encode(client, png(picture), accept="application/json", outputs="reconstruction").json()["items"][0]
    found = item["reconstruction"]
    got = pixels_of(base64.b64decode(found["data"]))
    error = np.mean((got.astype(float) - picture) ** 2)
    assert found["media_type"] == "image/png"
    assert found["psnr_db"] == pytest.approx(10 * np.log10(255**2 / error))
    assert "latents" not in item
    exact = encode(client, png(blocks(32, 32)), accept="application/json", outputs="reconstruction").json()
    assert exact["items"][0]["reconstruction"]["psnr_db"] is None
    clip = encode(client, mp4(CLIP), accept="application/json", outputs="reconstruction").json()["items"][0]
    assert clip["reconstruction"]["media_type"] == "video/mp4"
    assert decode_video(base64.b64decode(clip["reconstruction"]["data"]), Limits()).frames.shape == CLIP.shape


def test_fit_crop_drops_and_says_so_in_the_layout(client: httpx.Client) -> None:
    item = encode(client, png(blocks(40, 24)), accept="application/json", fit="crop").json()["items"][0]
    assert (item["layout"]["height"], item["layout"]["width"], item["tokens"]) == (32, 16, 2)
    small = client.post("/encode", content=png(blocks(8, 24)), params={"fit": "crop"})
    problem(small, 422, "image_too_small")


def test_sample_needs_a_seed_and_repeats_with_it(client: httpx.Client) -> None:
    data = png(blocks(16, 16))
    problem(client.post("/encode", content=data, params={"sample": "true"}), 422, "invalid_parameter")
    one, two, other = (encode(client, data, sample="true", seed=seed).content for seed in (1, 1, 2))
    assert one == two
    assert one != other
    assert one != encode(client, data).content


def test_npy_and_npz(client: httpx.Client) -> None:
    data = png(blocks(16, 32))
    latents = np.load(io.BytesIO(encode(client, data, accept="application/x-npy").content), allow_pickle=False)
    assert latents.shape == (2, 48)
    arrays = np.load(io.BytesIO(encode(client, data, accept="application/x-npz", outputs="latents,embedding").content))
    assert set(arrays) == {"latents", "coords", "embedding"}
    np.testing.assert_array_equal(arrays["latents"], latents)
    two = client.post(
        "/encode", content=data, params={"outputs": "latents,embedding"}, headers={"Accept": "application/x-npy"}
    )
    assert problem(two, 406, "not_acceptable")["available"]


@pytest.mark.parametrize("model", ["blocks-continuous", "blocks-discrete"])
def test_an_item_by_itself_goes_back_to_its_model(client: httpx.Client, model: str) -> None:
    """Latents of both have the same shape: only the revision tells them apart."""
    options = {"model": model, "outputs": "latents"}
    answer = client.post("/encode", files={"file": png(blocks(32, 48))}, data=options).json()
    (item,) = answer["items"]
    assert item["revision"] == answer["revision"]
    again = client.post("/decode", json=item, headers={"Accept": "application/json"})
    assert again.json()["model"] == model, again.text
    other = ({"blocks-continuous", "blocks-discrete"} - {model}).pop()
    problem(client.post("/decode", json={**item, "model": other}), 409, "model_mismatch")
    problem(client.post("/decode", json={"items": [item], "model": other}), 409, "model_mismatch")


def test_embed_gives_one_vector_an_item(client: httpx.Client) -> None:
    files = [("file", (f"{i}.png", png(blocks(24, 24, i)), "image/png")) for i in range(3)]
    answer = EncodeAnswer.model_validate(client.post("/v1/embed", files=files).json())
    assert [item.id for item in answer.items] == ["0.png", "1.png", "2.png"]
    stacked = np.load(io.BytesIO(client.post("/embed", files=files, headers={"Accept": "application/x-npy"}).content))
    assert stacked.shape == (3, 48)
    single = np.load(
        io.BytesIO(client.post("/embed", files=files[:1], headers={"Accept": "application/x-npy"}).content)
    )
    np.testing.assert_array_equal(single, stacked[0])
    (first, *_) = load_tokens(client.post("/embed", files=files, headers=TOKENS).content)
    np.testing.assert_array_equal(np.asarray(first.embedding), stacked[0])
    with_features = client.post("/embed", files=files[:1], params={"outputs": "embedding,features"}).json()
    assert array_of(with_features["items"][0]["features"]).shape == (4, 48)


def test_the_three_forms_of_input_give_the_same(client: httpx.Client) -> None:
    data = png(blocks(32, 16))
    text = base64.b64encode(data).decode()
    raw = encode(client, data).content
    options = {"outputs": ["latents"], "model": CONTINUOUS["name"]}
    bodies: list[dict[str, Any]] = [
        {"file": text},
        {"data": [text]},
        {"data": f"data:image/png;base64,{text}"},
        {"items": [{"id": "x", "data": text}], "outputs": "latents"},
        {"file": text, **options},
    ]
    for body in bodies:
        response = client.post("/encode", json=body, headers=TOKENS)
        assert response.content == raw, response.text
    form = client.post("/encode", files={"file": ("a.png", data)}, data=options, headers=TOKENS)
    assert form.content == raw
    part = ("request.json", json.dumps(options), "application/json")
    assert client.post("/encode", files={"request": part, "file": ("a", data)}, headers=TOKENS).content == raw
    # What curl sends with --data-binary and nothing else.
    curl = {"Content-Type": "application/x-www-form-urlencoded", **TOKENS}
    assert client.post("/encode", content=data, headers=curl).content == raw


def test_decode_takes_a_token_file_in_all_three_forms(client: httpx.Client) -> None:
    picture = blocks(32, 16)
    tokens = encode(client, png(picture)).content
    for media_type in ("application/vnd.safetensors", "application/x-safetensors", "application/octet-stream"):
        response = client.post("/decode", content=tokens, headers={"Content-Type": media_type})
        np.testing.assert_array_equal(pixels_of(response.content), picture)
    form = client.post("/decode", files={"file": ("a.tokens", tokens)})
    np.testing.assert_array_equal(pixels_of(form.content), picture)
    body = client.post("/decode", json={"data": base64.b64encode(tokens).decode()})
    np.testing.assert_array_equal(pixels_of(body.content), picture)
    plain = client.post("/decode", content=tokens, params={"floats": "true"}, headers=JSON).json()["items"][0]["pixels"]
    np.testing.assert_array_equal(plain, picture)


def test_headers_of_an_answer(client: httpx.Client) -> None:
    response = client.post("/encode", content=png(blocks(16, 16)), headers={"X-Request-Id": "my-id.1"})
    assert response.headers["x-request-id"] == "my-id.1"
    assert response.json()["id"] == "my-id.1"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-content-type-options"] == "nosniff"
    stages = {entry.split(";")[0].strip() for entry in response.headers["server-timing"].split(",")}
    assert {"recv", "check", "decode", "submit", "queue", "model", "encode"} <= stages
    replaced = client.post("/encode", content=png(blocks(16, 16)), headers={"X-Request-Id": "a b"})
    assert replaced.headers["x-request-id"] not in ("", "a b")


def test_decode_of_voxels_gives_arrays(client: httpx.Client) -> None:
    latents = np.linspace(0.0, 1.0, 3 * 48, dtype=np.float32).reshape(3, 48)
    body = {"latents": latents.tolist(), "coords": [[0, 5, 6, 7], [0, 1, 2, 3], [0, 9, 9, 9]]}
    answer = client.post("/decode", json=body)
    DecodeAnswer.model_validate(answer.json())
    item = answer.json()["items"][0]
    assert item["kind"] == "voxels"
    np.testing.assert_array_equal(array_of(item["coords"]), [[5, 6, 7], [1, 2, 3], [9, 9, 9]])
    assert array_of(item["feats"]).shape == (3, 768)
    arrays = np.load(io.BytesIO(client.post("/decode", json=body, headers={"Accept": "application/x-npz"}).content))
    np.testing.assert_allclose(arrays["feats"][:, ::16], latents, rtol=1e-6)
    problem(client.post("/decode", json=body, headers={"Accept": "image/png"}), 406, "not_acceptable")
