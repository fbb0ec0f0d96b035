"""`atoken serve` as a newcomer starts it, with real photographs and clips over HTTP."""

from __future__ import annotations

import base64
import io
import subprocess
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from media.image import decode_image, encode_image
from media.limits import Limits
from media.sniff import token_cost
from media.tokens import load_tokens
from media.types import UInt8Array
from media.video import decode_video
from service.client import Client, ProblemError
from tests.paths import DATA, ROOT, needs_data
from tests.system.deployment import ATOKEN, Atoken

TOKEN_FILE = "application/vnd.safetensors"
PHOTOS = (
    "eval_astronaut.png",
    "eval_chelsea.png",
    "eval_china.jpg",
    "eval_friends_by_aitzol_berasategi.png",
    "eval_camera.png",
    "eval_quokka.jpg",
)
CLIPS = ("eval/tree.avi", "eval/visp_cube2.webm", "odd/odd_size_317x135.mp4", "odd/rotated_90.mp4", "odd/vfr.mp4")


def psnr(a: UInt8Array, b: UInt8Array) -> float:
    return float(-10 * np.log10(max(np.mean((a.astype(float) - b.astype(float)) ** 2), 1e-9) / 255**2))


def photo(height: int, width: int, shift: int = 0) -> UInt8Array:
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float64)
    planes = [128 + 70 * np.sin(rows / (11 + c) + shift) * np.cos(columns / (13 - c)) for c in range(3)]
    return np.asarray(np.stack(planes, axis=-1), np.uint8)


def encode(client: httpx.Client, data: bytes, name: str = "file", **options: Any) -> bytes:
    answer = client.post("/encode", files={"file": (name, data)}, data=options, headers={"Accept": TOKEN_FILE})
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"] == TOKEN_FILE
    return answer.content


def decode(client: httpx.Client, tokens: bytes, accept: str) -> bytes:
    answer = client.post("/decode", content=tokens, headers={"Content-Type": TOKEN_FILE, "Accept": accept})
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"] == accept
    return answer.content


@needs_data
@pytest.mark.parametrize("name", PHOTOS)
def test_a_photograph_to_tokens_and_back(client: httpx.Client, name: str) -> None:
    data = (DATA / "images" / "eval" / name).read_bytes()
    original = decode_image(data, Limits()).pixels
    tokens = encode(client, data, name)
    [item] = load_tokens(tokens)
    height, width = original.shape[:2]
    assert (item.layout.height, item.layout.width) == (height, width)
    assert len(item) == token_cost("image", 1, height, width)
    back = decode_image(decode(client, tokens, "image/png"), Limits()).pixels
    assert back.shape == original.shape
    assert psnr(back, original) > 22


@needs_data
@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_to_tokens_and_back(client: httpx.Client, name: str) -> None:
    data = (DATA / "videos" / name).read_bytes()
    original = decode_video(data, Limits())
    tokens = encode(client, data, name)
    lossless = decode_video(decode(client, tokens, "video/x-matroska"), Limits())
    assert lossless.frames.shape == original.frames.shape
    assert psnr(lossless.frames, original.frames) > 20
    if original.fps is not None:
        assert lossless.fps == pytest.approx(original.fps, rel=0.02)
    small = decode_video(decode(client, tokens, "video/mp4"), Limits())
    assert small.frames.shape == original.frames.shape


def test_a_picture_of_any_size_comes_back_whole(client: httpx.Client) -> None:
    for height, width in ((1, 1), (1, 40), (17, 16), (15, 33), (100, 7)):
        pixels = photo(height, width)
        tokens = encode(client, encode_image(pixels))
        back = decode_image(decode(client, tokens, "image/png"), Limits()).pixels
        assert back.shape == pixels.shape


def test_several_files_in_one_request_and_one_bad_among_them(client: httpx.Client) -> None:
    good = encode_image(photo(40, 40))
    answer = client.post(
        "/encode",
        files=[("file", ("a.png", good)), ("file", ("b.png", b"this is no picture")), ("file", ("c.png", good))],
        headers={"Accept": "application/json"},
    )
    assert answer.status_code == 200, answer.text
    items = answer.json()["items"]
    assert [item["status"] for item in items] == ["ok", "error", "ok"]
    assert items[1]["error"]["code"] == "unsupported_media_type"


def test_codes_come_from_the_model_that_has_them(client: httpx.Client) -> None:
    names = [model["name"].rpartition("/")[2] for model in client.get("/v1/models").json()["data"]]
    assert names == ["tiny-continuous", "tiny-discrete"]
    [item] = load_tokens(encode(client, encode_image(photo(48, 64)), outputs="codes"))
    assert item.model == "tiny-discrete"
    assert item.codes is not None
    assert item.codes.shape == (12, 8)
    assert item.codes.min() >= 0
    assert item.codes.max() <= 4095


def test_an_embedding_of_a_raw_body(client: httpx.Client) -> None:
    data = encode_image(photo(48, 64))
    vectors = []
    for _ in range(2):
        answer = client.post(
            "/v1/embed", content=data, headers={"Content-Type": "image/png", "Accept": "application/json"}
        )
        assert answer.status_code == 200, answer.text
        [item] = answer.json()["items"]
        vectors.append(np.frombuffer(base64.b64decode(item["embedding"]["data"]), "<f4"))
        assert int(answer.headers["Atoken-Tokens"]) == 12
        assert answer.headers["X-Request-Id"]
        assert "model" in answer.headers["Server-Timing"]
    assert np.linalg.norm(vectors[0]) == pytest.approx(1.0, abs=1e-4)
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)


def scores(client: httpx.Client, picture: bytes, texts: list[str]) -> list[float]:
    """Cosines of a picture with texts, all embedded in one request."""
    parts = [("file", ("picture", picture)), *(("text", (None, text)) for text in texts)]
    answer = client.post("/embed", files=parts, headers={"Accept": "application/x-npy"})  # type: ignore[arg-type]
    assert answer.status_code == 200, answer.text
    assert answer.headers["Atoken-Model"] == "tiny-continuous"
    rows = np.load(io.BytesIO(answer.content))
    assert rows.shape == (1 + len(texts), 144)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1.0, atol=1e-4)
    return [float(score) for score in rows[1:] @ rows[0]]


def test_words_find_what_is_in_a_picture(client: httpx.Client) -> None:
    frame = decode_video((ROOT / "examples" / "clip.mp4").read_bytes(), Limits()).frames[0]
    cat, castle, bridge = scores(client, encode_image(frame), ["a cat", "a castle", "a bridge"])
    assert cat > castle
    assert cat > bridge


@needs_data
def test_words_tell_a_bird_from_a_building(client: httpx.Client) -> None:
    bird, castle = scores(client, (DATA / "images/train/tux_birds_owl.webp").read_bytes(), ["a bird", "a castle"])
    assert bird > castle
    bird, castle = scores(client, (DATA / "images/eval/eval_china.jpg").read_bytes(), ["a bird", "a castle"])
    assert castle > bird


def test_a_bad_text_fails_alone_and_the_client_embeds_texts(client: httpx.Client, served: Atoken) -> None:
    answer = client.post("/v1/embed", json={"text": ["a bird", "xyzzy qwxz", "", "a castle"]})
    assert answer.status_code == 200, answer.text
    items = answer.json()["items"]
    assert [item["status"] for item in items] == ["ok", "error", "error", "ok"]
    assert "'xyzzy qwxz': no word of it is known" in items[1]["error"]["detail"]
    assert int(answer.headers["Atoken-Tokens"]) == 2
    cards = {card["name"]: card["text"] for card in client.get("/v1/models").json()["data"]}
    assert cards == {"tiny-continuous": True, "tiny-discrete": True}
    with Client(served.url(), http=client) as python:
        found = python.embed_text(["a bird", "a castle"])
        np.testing.assert_array_equal(found, python.embed_text(["a bird", "a castle"], model="tiny-discrete"))
        with pytest.raises(ProblemError, match=r"invalid_parameter \(item 1\): 'xyzzy'"):
            python.embed_text(["a bird", "xyzzy"])
    kept = np.frombuffer(base64.b64decode(items[0]["embedding"]["data"]), "<f4")
    np.testing.assert_allclose(found[0], kept, atol=1e-6)


def test_a_reconstruction_in_one_request(client: httpx.Client) -> None:
    pixels = photo(33, 47)
    answer = client.post(
        "/encode",
        files={"file": ("a.png", encode_image(pixels))},
        data={"outputs": "reconstruction,latents"},
        headers={"Accept": "application/json"},
    )
    assert answer.status_code == 200, answer.text
    [item] = answer.json()["items"]
    found = item["reconstruction"]
    assert found["media_type"] == "image/png"
    back = decode_image(base64.b64decode(found["data"]), Limits()).pixels
    assert back.shape == pixels.shape
    assert found["psnr_db"] == pytest.approx(psnr(back, pixels), abs=0.01)
    assert "latents" in item


def test_health_limits_metrics_and_documentation(client: httpx.Client) -> None:
    assert client.get("/health/live").status_code == 200
    assert client.get("/health/ready").status_code == 200
    assert client.get("/health").json()["status"] == "ready"
    assert client.get("/v1/limits").json()["media"]["window_tokens"] == 32_768
    assert "atoken_http_requests_total" in client.get("/metrics").text
    assert client.get("/docs").status_code == 200
    assert client.get("/openapi.json").json()["info"]["title"]


def test_the_start_says_what_is_served_and_how_to_use_it(served: Atoken) -> None:
    text = served.out.read_text()
    assert "tiny-continuous" in text
    assert f"{served.url()}/encode" in text
    assert "curl" in text
    assert "float32" in text or "bfloat16" in text
    [started] = served.events("worker_started")
    assert {model["name"] for model in started["models"]} == {"tiny-continuous", "tiny-discrete"}
    assert "unix://:" not in served.err.read_text(), "the password is no text for a log"


@needs_data
def test_hostile_files_are_refused_and_the_service_goes_on(client: httpx.Client) -> None:
    for name in ("png_60000x60000.png", "gif_bomb.gif", "empty.jpg", "truncated.png", "garbage.mp4", "wrong_magic.png"):
        data = (DATA / "bad" / name).read_bytes()
        answer = client.post("/encode", files={"file": (name, data)}, headers={"Accept": TOKEN_FILE})
        assert 400 <= answer.status_code < 500 or name == "gif_bomb.gif", (name, answer.status_code, answer.text)
        if answer.status_code != 200:
            assert answer.headers["Content-Type"] == "application/problem+json"
    for name in ("st_nan.safetensors", "st_codes_out_of_range.safetensors", "st_header_1e18.safetensors"):
        data = (DATA / "bad" / name).read_bytes()
        answer = client.post("/decode", content=data, headers={"Content-Type": TOKEN_FILE})
        assert 400 <= answer.status_code < 500, (name, answer.status_code, answer.text)
    assert client.get("/health/ready").status_code == 200


def test_what_is_too_large_is_said_before_any_work(client: httpx.Client) -> None:
    wide = encode_image(np.zeros((3000, 3000, 3), np.uint8))
    answer = client.post("/encode", files={"file": ("wide.png", wide)})
    assert answer.status_code == 413
    problem = answer.json()
    assert (problem["code"], problem["limit"], problem["actual"]) == ("too_many_tokens", 32_768, 188 * 188)


def test_the_answer_does_not_depend_on_the_neighbours(client: httpx.Client) -> None:
    target = encode_image(photo(64, 80))
    [alone] = load_tokens(encode(client, target))
    files = [("file", (f"{i}.png", encode_image(photo(20 + 9 * i, 90 - 7 * i, i)))) for i in range(8)]
    files.insert(3, ("file", ("target.png", target)))
    answer = client.post("/encode", files=files, headers={"Accept": TOKEN_FILE})
    assert answer.status_code == 200, answer.text
    packed = load_tokens(answer.content)[3]
    assert alone.latents is not None
    assert packed.latents is not None
    error = np.linalg.norm(packed.latents - alone.latents, axis=1) / np.linalg.norm(alone.latents, axis=1)
    assert error.max() < 1e-5


def test_arrays_as_npy(client: httpx.Client) -> None:
    tokens = encode(client, encode_image(photo(40, 24)))
    pixels = np.load(io.BytesIO(decode(client, tokens, "application/x-npy")))
    assert pixels.shape[-3:] == (40, 24, 3)


def test_the_command_line_reads_what_the_service_writes(client: httpx.Client, folder: Path) -> None:
    tokens = folder / "a.tokens"
    tokens.write_bytes(encode(client, encode_image(photo(40, 24))))
    done = subprocess.run(
        [*ATOKEN, "decode", tokens, "-o", folder / "a.png"], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    over_http = decode_image(decode(client, tokens.read_bytes(), "image/png"), Limits()).pixels
    here = decode_image((folder / "a.png").read_bytes(), Limits()).pixels
    assert np.abs(over_http.astype(int) - here.astype(int)).max() <= 1
