"""service/client against a real server on a real socket: a small app that speaks the service's contract."""

import dataclasses
import io
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy
import uvicorn
from fastapi import FastAPI, Request, Response

from media.arrays_json import array_to_json
from media.tokens import dump_tokens, load_tokens
from media.types import Layout, Tokens
from service.client import AnswerError, Client, Model, ProblemError, TokenFile, UnreachableError
from service.client.client import _seconds
from tests.paths import ROOT

IMAGE = Layout(kind="image", frames=1, height=20, width=33, grid=(1, 2, 3))
CLIP = Layout(kind="video", frames=6, height=16, width=30, grid=(2, 1, 2), fps=25.0)
CARD = {
    "name": "tiny",
    "revision": "abc",
    "outputs": ["latents", "embedding"],
    "kinds": ["image", "video"],
    "latent_channels": 4,
    "embedding_dim": 6,
    "parameters": 123,
}
SAFETENSORS = "application/vnd.safetensors"


@dataclasses.dataclass
class Seen:
    """What the server saw of a request."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    files: list[tuple[str, bytes]]


class TinyService:
    """The contract in small: latents are made from the file's bytes, so that a mix-up of items shows."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.failures: list[Response] = []
        self.dtype: Any = "F32"
        self.app = FastAPI()
        self.app.add_api_route("/{path:path}", self.answer, methods=["GET", "POST"])
        self.url = ""

    async def answer(self, request: Request, path: str) -> Response:
        if request.headers.get("content-type", "").startswith("multipart/"):
            async with request.form() as form:
                files = [(part.filename, await part.read()) for part in form.getlist("file")]  # type: ignore[union-attr]
        else:
            files = [("", await request.body())]
        is_text = request.headers.get("content-type") == "application/json"
        self.seen.append(Seen(request.method, path, dict(request.query_params), dict(request.headers), files))  # type: ignore[arg-type]
        if self.failures:
            return self.failures.pop(0)
        if path == "v1/models":
            return self.json({"object": "list", "data": [CARD]})
        if path == "v1/limits":
            return self.json({"body_bytes": 67108864, "media": {"item_tokens": 32768}})
        if path == "v1/embed" and is_text:
            rows = [np.full(6, len(text), np.float32) for text in json.loads(files[0][1])["text"]]
            return self.json({"items": [{"kind": "text", "embedding": array_to_json(row, False)} for row in rows]})
        if path in ("v1/encode", "v1/embed"):
            items = [self.tokens(data, path.removeprefix("v1/")) for _, data in files]
            return Response(dump_tokens(items, self.dtype), media_type=SAFETENSORS)
        assert path == "v1/decode"
        found = load_tokens(files[0][1])
        if request.headers["accept"] != "application/json":
            return Response(b"picture of " + files[0][1][:8], media_type=request.headers["accept"])
        return self.json({"items": [self.decoded(tokens) for tokens in found]})

    @staticmethod
    def json(body: dict[str, Any], status: int = 200, **headers: str) -> Response:
        kind = "application/json" if status < 400 else "application/problem+json"
        return Response(json.dumps(body), status, media_type=kind, headers={"X-Request-Id": "r-1"} | headers)

    @staticmethod
    def tokens(data: bytes, op: str) -> Tokens:
        layout = CLIP if data.startswith(b"clip") else IMAGE
        t, x, y = np.meshgrid(*(np.arange(size) for size in layout.grid), indexing="ij")
        coords = np.stack([t, x, y, t * 0], axis=-1).reshape(-1, 4).astype(np.int32)
        count = len(coords)
        embed = {"embedding": np.full(6, data[-1], np.float32), "features": np.full((count, 2), 0.5, np.float32)}
        arrays: dict[str, Any] = {"latents": np.full((count, 4), data[-1], np.float32)} if op == "encode" else embed
        if data.startswith(b"codes"):
            arrays = {"codes": np.full((count, 8), data[-1], np.int16)}
        return Tokens(coords=coords, layout=layout, model="tiny", revision="abc", **arrays)

    @staticmethod
    def decoded(tokens: Tokens) -> dict[str, Any]:
        assert tokens.latents is not None
        layout = tokens.layout
        pixels = np.full((layout.frames, layout.height, layout.width, 3), tokens.latents[0, 0], np.uint8)
        shown = pixels[0] if layout.kind == "image" else pixels
        return {
            "id": "x",
            "status": "ok",
            "kind": layout.kind,
            "fps": layout.fps,
            "pixels": array_to_json(shown, False),
        }


@pytest.fixture(scope="module")
def running() -> Iterator[TinyService]:
    service = TinyService()
    config = uvicorn.Config(service.app, port=0, http="h11", ws="none", lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < deadline, "the server did not start within 30 s"
        time.sleep(0.01)
    service.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield service
    server.should_exit = True
    thread.join(timeout=30)
    assert not thread.is_alive()


@pytest.fixture
def service(running: TinyService) -> TinyService:
    running.seen.clear()
    running.failures.clear()
    running.dtype = "F32"
    return running


@pytest.fixture
def client(service: TinyService) -> Iterator[Client]:
    # No proxy from the environment may come between the test and loopback.
    with (
        httpx.Client(trust_env=False) as http,
        Client(service.url + "/", timeout_s=20, max_wait_s=0.05, http=http) as made,
    ):
        yield made


def problem(status: int, code: str, **headers: str) -> Response:
    return TinyService.json({"code": code, "detail": f"because of {code}", "status": status}, status, **headers)


def test_one_file_is_sent_as_it_is(client: Client, service: TinyService) -> None:
    tokens = client.encode(b"image 7", outputs=["latents", "embedding"], model="tiny", fit="crop", sample=True, seed=5)
    seen = service.seen[0]
    assert (seen.method, seen.path, seen.files) == ("POST", "v1/encode", [("", b"image 7")])
    assert seen.query == {
        "outputs": "latents,embedding",
        "model": "tiny",
        "fit": "crop",
        "sample": "true",
        "seed": "5",
    }
    assert seen.headers["accept"] == SAFETENSORS
    assert seen.headers["request-timeout"] == "20"
    assert (tokens.model, tokens.revision, len(tokens.items)) == ("tiny", "abc", 1)
    item = tokens.items[0]
    assert (item.kind, item.frames, item.height, item.width, item.fps, len(item)) == ("image", 1, 20, 33, None, 6)
    assert item.latents is not None
    assert item.latents.dtype == np.float32
    assert (item.latents == ord("7")).all()
    assert item.coords.tolist()[-1] == [0, 1, 2, 0]
    assert item.codes is item.embedding is item.features is None


def test_several_files_come_back_in_order(client: Client, service: TinyService, tmp_path: Path) -> None:
    path = tmp_path / "p\u00e4th one.png"
    path.write_bytes(b"clip 2")
    tokens = client.encode([b"image 1", path, str(path)])
    assert [data for _, data in service.seen[0].files] == [b"image 1", b"clip 2", b"clip 2"]
    assert [name for name, _ in service.seen[0].files] == ["0", path.name, path.name]
    assert service.seen[0].query == {}
    assert [item.kind for item in tokens.items] == ["image", "video", "video"]
    assert [item.latents[0, 0] for item in tokens.items if item.latents is not None] == [ord("1"), ord("2"), ord("2")]
    assert (tokens.items[1].frames, tokens.items[1].fps) == (6, 25.0)


def test_embed_and_codes(client: Client, service: TinyService) -> None:
    one = client.embed(b"image 3", outputs="embedding,features").items[0]
    assert one.embedding is not None
    assert one.features is not None
    assert (one.embedding.shape, one.features.shape) == ((6,), (6, 2))
    assert service.seen[0].query == {"outputs": "embedding,features"}
    two = client.embed([b"image 3", b"image 4"]).items
    assert [item.embedding[0] for item in two if item.embedding is not None] == [ord("3"), ord("4")]
    codes = client.encode(b"codes 9").items[0].codes
    assert codes is not None
    assert (codes.dtype, codes.shape, int(codes[0, 0])) == (np.int16, (6, 8), ord("9"))


def test_texts_are_embedded_in_order(client: Client, service: TinyService) -> None:
    found = client.embed_text(["a bird", "a castle"], model="tiny")
    assert (found.dtype, found.shape, found[:, 0].tolist()) == (np.float32, (2, 6), [6, 8])
    seen = service.seen[0]
    assert (seen.method, seen.path, seen.query) == ("POST", "v1/embed", {"model": "tiny", "on_error": "fail"})
    assert json.loads(seen.files[0][1]) == {"text": ["a bird", "a castle"]}
    assert client.embed_text("a bird").shape == (1, 6)
    with pytest.raises(ValueError, match="no text to send"):
        client.embed_text([])
    for answer in ({}, {"items": []}, {"items": [{"embedding": 1}]}, {"items": 3}):
        service.failures = [TinyService.json(answer)]
        with pytest.raises(AnswerError, match="the answer of embed cannot be read"):
            client.embed_text("a bird")


def test_a_bad_text_fails_the_call_with_its_place(client: Client, service: TinyService) -> None:
    body = {"code": "invalid_parameter", "detail": "'xyzzy': no word of it is known", "item": 1}
    service.failures = [TinyService.json(body, 422)]
    with pytest.raises(ProblemError, match=r"invalid_parameter \(item 1\): 'xyzzy'") as caught:
        client.embed_text(["a bird", "xyzzy"])
    assert caught.value.item == 1


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_every_float_dtype_is_read(client: Client, service: TinyService, dtype: str) -> None:
    service.dtype = dtype
    latents = client.encode(b"image 7").items[0].latents
    assert latents is not None
    assert latents.dtype == np.float32
    assert (latents == ord("7")).all()


def test_tokens_are_saved_loaded_and_posted_back(client: Client, service: TinyService, tmp_path: Path) -> None:
    tokens = client.encode([b"image 1", b"clip 2"])
    tokens.save(tmp_path / "two.tokens")
    again = TokenFile.load(tmp_path / "two.tokens")
    assert again.data == tokens.data
    for given in (tokens, tokens.data, tmp_path / "two.tokens", str(tmp_path / "two.tokens")):
        image, clip = client.decode(given, force=True)
        assert image.pixels is not None
        assert clip.pixels is not None
        assert (image.kind, image.pixels.shape, image.pixels.dtype) == ("image", (20, 33, 3), np.uint8)
        assert (clip.kind, clip.pixels.shape, clip.fps) == ("video", (6, 16, 30, 3), 25.0)
        assert (image.pixels[0, 0, 0], clip.pixels[0, 0, 0, 0]) == (ord("1"), ord("2"))
    assert [seen.files[0][1] for seen in service.seen[1:]] == [tokens.data] * 4
    assert service.seen[1].query == {"force": "true", "on_error": "fail"}
    assert service.seen[1].headers["content-type"] == SAFETENSORS


def test_decode_to_a_file(client: Client, service: TinyService, tmp_path: Path) -> None:
    tokens = client.encode(b"image 1")
    found = client.decode_file(tokens, "jpeg", quality=80)
    assert (found.media_type, found.data) == ("image/jpeg", b"picture of " + tokens.data[:8])
    assert service.seen[1].query == {"quality": "80"}
    found.save(tmp_path / "a.jpg")
    assert (tmp_path / "a.jpg").read_bytes() == found.data
    with pytest.raises(ValueError, match="png, webp, jpeg, mp4, mkv, ply, splat, spz, not 'gif'"):
        client.decode_file(tokens, "gif")  # type: ignore[arg-type]


def test_models_and_limits(client: Client) -> None:
    (model,) = client.models()
    assert (model.name, model.outputs, model.latent_channels, model.codebooks) == (
        "tiny",
        ("latents", "embedding"),
        4,
        0,
    )
    assert model.card["parameters"] == 123
    assert not model.text
    assert Model.of({**CARD, "text": True}).text
    assert client.limits()["media"]["item_tokens"] == 32768


# --- retries


@pytest.mark.parametrize(
    "failure",
    [
        problem(429, "queue_full", **{"Retry-After": "0"}),
        problem(503, "no_worker", **{"Retry-After": "3600"}),
        problem(503, "no_worker"),
        problem(429, "queue_full", **{"Retry-After": "soon"}),
        Response("<html>", 503),
        # Promises more than it sends: the server closes the connection in the middle of the body.
        Response("cut", headers={"Content-Length": "100"}),
    ],
    ids=["429", "503 capped", "no header", "no number", "proxy", "hang up"],
)
def test_the_same_request_is_sent_again(client: Client, service: TinyService, failure: Response) -> None:
    service.failures = [failure, failure]
    started = time.monotonic()
    assert len(client.encode([b"image 1", b"clip 2"]).items) == 2
    assert time.monotonic() - started < 10
    assert len(service.seen) == 3
    assert service.seen[0].files == service.seen[2].files


def test_the_wait_is_what_retry_after_says(service: TinyService) -> None:
    service.failures = [problem(429, "queue_full", **{"Retry-After": "1"})]
    with httpx.Client(trust_env=False) as http:
        client = Client(service.url, http=http)
        started = time.monotonic()
        client.limits()
        assert time.monotonic() - started >= 1.0


def test_retries_end(client: Client, service: TinyService) -> None:
    service.failures = [problem(429, "queue_full", **{"Retry-After": "7"})] * 9
    with pytest.raises(ProblemError, match="429 queue_full: because of queue_full") as caught:
        client.encode(b"image 1")
    assert (caught.value.retry_after, caught.value.request_id) == (7.0, "r-1")
    assert len(service.seen) == 5


def test_what_will_not_change_is_not_sent_again(client: Client, service: TinyService) -> None:
    body = {"code": "image_too_large", "detail": "too wide", "item": 1, "limit": 16384, "actual": 20000}
    for status in (400, 404, 413, 422, 500, 504):
        service.failures = [TinyService.json(body, status)]
        with pytest.raises(ProblemError, match=rf"{status} image_too_large \(item 1\): too wide") as caught:
            client.encode([b"image 1", b"image 2"])
        error = caught.value
        assert (error.status, error.code, error.item, error.limit, error.actual) == (
            status,
            "image_too_large",
            1,
            16384,
            20000,
        )
    assert len(service.seen) == 6


def test_errors_of_others_are_told_too(client: Client, service: TinyService) -> None:
    for failure in (
        Response("<html>Bad Gateway", 502),
        Response("[1]", 502),
        Response("", 302, headers={"Location": "/"}),
    ):
        service.failures = [failure]
        with pytest.raises(ProblemError, match=f"{failure.status_code} unknown: HTTP {failure.status_code}"):
            client.models()


def test_a_dead_address(unused_port: int) -> None:
    with httpx.Client(trust_env=False) as http:
        client = Client(f"http://127.0.0.1:{unused_port}", retries=1, http=http)
        with pytest.raises(UnreachableError, match=f"127.0.0.1:{unused_port} cannot be reached"):
            client.models()


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.client.client.GRACE_S", 0.1)
    with socket.socket() as deaf, httpx.Client(trust_env=False) as http:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        client = Client(f"http://127.0.0.1:{deaf.getsockname()[1]}", timeout_s=0.2, http=http)
        started = time.monotonic()
        with pytest.raises(UnreachableError, match=r"no answer within 0\.2 s"):
            client.models()
        assert time.monotonic() - started < 5


# --- answers that make no sense


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"not a file",
        (10**18).to_bytes(8, "little") + b"{}",
        b"\x02\0\0\0\0\0\0\0{}",
        pytest.param(None, id="offsets"),
    ],
)
def test_a_broken_token_file(client: Client, service: TinyService, answer: bytes | None) -> None:
    if answer is None:
        answer = safetensors.numpy.save({"coords": np.zeros((2, 4), np.int32), "offsets": np.array([0, 3])})
    service.failures = [Response(answer, media_type=SAFETENSORS)]
    with pytest.raises(AnswerError):
        client.encode(b"image 1")


@pytest.mark.parametrize(
    "body",
    [
        "",
        "[]",
        "{}",
        '{"items": [{}]}',
        '{"items": [{"kind": "image", "pixels": {"dtype": "uint8", "shape": [9], "data": ""}}]}',
    ],
)
def test_a_broken_json_answer(client: Client, service: TinyService, body: str) -> None:
    tokens = client.encode(b"image 1")
    service.failures = [Response(body, media_type="application/json")]
    with pytest.raises(AnswerError):
        client.decode(tokens)
    service.failures = [
        Response('{"data": [{}]}' if body == '{"items": [{}]}' else body, media_type="application/json")
    ]
    if not body.startswith('{"items": [{"kind'):
        with pytest.raises(AnswerError):
            client.models()


# --- the rest


def test_what_a_caller_may_not_do(client: Client, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="http:// or https://, not 'localhost:8000'"):
        Client("localhost:8000")
    with pytest.raises(ValueError, match="timeout_s must be above 0"):
        Client("http://localhost", timeout_s=0)
    with pytest.raises(ValueError, match="no file to send"):
        client.encode([])
    with pytest.raises(FileNotFoundError):
        client.encode(tmp_path / "none.png")


def test_retry_after_as_a_date() -> None:
    assert _seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    later = _seconds("Wed, 21 Oct 2099 07:28:00 GMT")
    assert later is not None
    assert later > 1e9
    assert [_seconds(text) for text in (None, "x", "nan", "inf", "-1", "2.5")] == [None, None, None, None, None, 2.5]


def test_own_connections_are_closed() -> None:
    with Client("http://127.0.0.1:1") as client:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        client.models()


def test_needs_three_packages_only() -> None:
    """After the import nothing of ours beyond the client, and none of the heavy packages, is loaded."""
    code = (
        "import sys, service.client; ours = {name for name in sys.modules if name.split('.')[0] in"
        " ('media', 'model', 'training', 'torch', 'fastapi', 'redis', 'pydantic', 'PIL', 'av')"
        " or name.startswith('service.') and not name.startswith('service.client')}; assert not ours, ours"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)


def test_answers_do_not_print_their_bytes(client: Client) -> None:
    tokens = client.encode(b"image 1")
    out = io.StringIO()
    print(dataclasses.replace(tokens, items=()), file=out)
    assert len(out.getvalue()) < 200
