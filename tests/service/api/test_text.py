"""Texts through /embed: alone, beside pictures, with a bad one among them, and where they do not belong."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import httpx
import numpy as np
import pytest

from service.api.answers import BadItem, EmbeddedText, EncodeAnswer
from service.api.models import ModelDirectory
from service.api.schemas import EmbedBody
from service.errors import Problem
from tests.service.api.block_worker import CONTINUOUS, DISCRETE, BlockWorker, embed_text
from tests.service.api.conftest import array_of, blocks, png, problem
from tests.service.api.rig import Api

PICTURE = png(blocks(32, 32))
BASE64 = base64.b64encode(PICTURE).decode()


def form(*texts: str, files: int = 0, **options: str) -> dict[str, Any]:
    """What httpx takes for a multipart form of text fields, files and options."""
    parts = [("file", (f"{position}.png", PICTURE)) for position in range(files)]
    parts += [("text", (None, text)) for text in texts]  # type: ignore[misc]
    return {"files": [*parts, *((name, (None, value)) for name, value in options.items())]}


@pytest.mark.parametrize("text", ["a bird", ["a bird"], "  a bird\n"])
def test_a_text_is_embedded_by_a_model_that_takes_text(client: httpx.Client, text: str | list[str]) -> None:
    response = client.post("/v1/embed", json={"text": text})
    assert response.status_code == 200, response.text
    answer = EncodeAnswer.model_validate(response.json())
    assert answer.model == DISCRETE["name"], "the default model takes none"
    (item,) = answer.items
    assert isinstance(item, EmbeddedText)
    assert (item.id, item.revision, answer.usage.tokens) == ("0", DISCRETE["revision"], 1)
    assert set(response.json()["items"][0]) == {"id", "status", "kind", "notes", "revision", "embedding"}
    np.testing.assert_array_equal(array_of(response.json()["items"][0]["embedding"]), embed_text("a bird"))


def test_texts_and_pictures_answer_in_the_order_of_items(client: httpx.Client) -> None:
    items = [{"id": "q", "text": "a bird"}, {"data": BASE64}, {"text": "a castle"}]
    answer = client.post("/embed", json={"items": items, "floats": True}).json()
    EncodeAnswer.model_validate(answer)
    assert [(item["id"], item["kind"]) for item in answer["items"]] == [("q", "text"), ("1", "image"), ("2", "text")]
    assert answer["usage"]["tokens"] == 1 + 4 + 1
    np.testing.assert_allclose(answer["items"][2]["embedding"], embed_text("a castle"), rtol=1e-6)
    assert len(answer["items"][1]["embedding"]) == 48


def test_a_form_has_files_first_and_then_texts(client: httpx.Client) -> None:
    answer = client.post("/embed", **form("a bird", "a castle", files=2, floats="true")).json()
    assert [item["kind"] for item in answer["items"]] == ["image", "image", "text", "text"]
    assert [item["id"] for item in answer["items"]] == ["0.png", "1.png", "2", "3"]
    np.testing.assert_allclose(answer["items"][3]["embedding"], embed_text("a castle"), rtol=1e-6)
    alone = client.post("/embed", **form("a bird")).json()
    assert [(item["id"], item["kind"]) for item in alone["items"]] == [("0", "text")]
    beside_options = client.post("/embed", files={"request": (None, '{"floats": true}'), "text": (None, "a bird")})
    assert isinstance(beside_options.json()["items"][0]["embedding"], list)


def test_a_text_may_be_sent_as_a_file_or_urlencoded(client: httpx.Client) -> None:
    """As `curl -F text=@query.txt` and `curl -d text=... -d text=...` do."""
    for sent in (
        {"files": [("text", ("query.txt", b"a bird\n", "text/plain"))]},
        {"data": {"text": "a bird"}},
        {"data": {"text": ["a bird", "a castle"], "floats": "true"}},
    ):
        response = client.post("/embed", **sent)  # type: ignore[arg-type]
        assert response.status_code == 200, response.text
        items = response.json()["items"]
        found = items[0]["embedding"]
        array = np.array(found) if isinstance(found, list) else array_of(found)
        np.testing.assert_allclose(array, embed_text("a bird"), rtol=1e-6)
    assert [item["id"] for item in items] == ["0", "1"]
    behind = client.post("/embed", data={"floats": "true", "text": "a bird"})
    np.testing.assert_allclose(behind.json()["items"][0]["embedding"], embed_text("a bird"), rtol=1e-6)
    header = {"Content-Type": "application/x-www-form-urlencoded"}
    many = client.post("/embed", content=b"text=a" + b"&a" * 500_000, headers=header)
    assert problem(many, 413, "too_many_items")["actual"] == 500_001
    found = problem(client.post("/embed", data={"text": "a bird", "wide": "1"}), 422, "invalid_parameter")
    assert "wide" in found["detail"]
    problem(client.post("/encode", data={"text": "a bird"}), 415, "unsupported_media_type")


def test_arrays_of_texts_but_no_token_file(client: httpx.Client) -> None:
    both = {"items": [{"text": "a bird"}, {"data": BASE64}]}
    for body, shape in (({"text": "a bird"}, (48,)), ({"text": ["a bird", "a cat"]}, (2, 48)), (both, (2, 48))):
        npy = client.post("/embed", json=body, headers={"Accept": "application/x-npy"})
        first = np.load(io.BytesIO(npy.content))
        assert first.shape == shape
        npz = np.load(io.BytesIO(client.post("/embed", json=body, headers={"Accept": "application/x-npz"}).content))
        assert list(npz) == ["embedding"]
        np.testing.assert_array_equal(npz["embedding"], first)
        for accept in ("application/vnd.safetensors", "application/octet-stream"):
            found = problem(client.post("/embed", json=body, headers={"Accept": accept}), 406, "not_acceptable")
            assert found["available"] == ["application/json", "application/x-npy", "application/x-npz"]
            assert "a text has no tokens for a token file" in found["detail"]


BAD = [
    ("", "'' has 0 characters"),
    (" \n\t ", "has 0 characters"),
    ("bird" * 251, "'birdbirdbirdbirdbirdbirdbirdbirdbirdbirdbirdbirdbi'... has 1004 characters"),
    (7, "given is a number"),
    (True, "given is true or false"),
    ({"a": "bird"}, "given is an object"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_a_bad_text_is_refused_alone_and_spares_its_neighbours(
    client: httpx.Client, text: object, message: str
) -> None:
    found = problem(client.post("/embed", json={"text": text}), 422, "invalid_parameter")
    assert message in found["detail"]
    assert "1 to 1000 characters" in found["detail"]
    assert found["limit"] == 1000
    for body in ({"text": ["a bird", text]}, {"items": [{"data": BASE64}, {"text": text}]}):
        answer = client.post("/embed", json=body).json()
        assert [item["status"] for item in answer["items"]] == ["ok", "error"]
        assert message in answer["items"][1]["error"]["detail"]
    refused = client.post("/embed", json={"text": ["a bird", text], "on_error": "fail"})
    assert problem(refused, 422, "invalid_parameter")["item"] == 1
    if isinstance(text, str):
        answer = client.post("/embed", **form(text, "a bird")).json()
        assert [item["status"] for item in answer["items"]] == ["error", "ok"]


def test_longest_text_counts_characters_without_the_space_around_them(client: httpx.Client) -> None:
    longest = " " + "\u00e9" * 1000 + " "
    assert client.post("/embed", json={"text": longest}).status_code == 200
    assert client.post("/embed", **form(longest)).status_code == 200


def test_a_text_field_that_is_no_utf8_fails_alone(client: httpx.Client) -> None:
    parts = {"text": (None, b"\xff\xfe"), "file": ("a.png", PICTURE)}
    answer = client.post("/embed", files=parts).json()
    assert [item["status"] for item in answer["items"]] == ["ok", "error"]
    assert "not UTF-8" in answer["items"][1]["error"]["detail"]


def test_words_that_the_worker_does_not_know(client: httpx.Client) -> None:
    found = problem(client.post("/embed", json={"text": "xyzzy"}), 422, "invalid_parameter")
    assert "'xyzzy': no word of it is known" in found["detail"]
    answer = EncodeAnswer.model_validate(client.post("/embed", json={"text": ["a bird", "xyzzy", "a cat"]}).json())
    assert [item.status for item in answer.items] == ["ok", "error", "ok"]
    bad = answer.items[1]
    assert isinstance(bad, BadItem)
    assert bad.error.code == "invalid_parameter"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"text": "a bird", "file": BASE64}, "exactly one of `items`, `file`, `data` and `text`"),
        ({"text": "a bird", "items": [{"text": "a bird"}]}, "exactly one of"),
        ({"text": None}, "exactly one of"),
        ({"items": [{"text": "a bird", "data": BASE64}]}, "exactly one of `data` and `text`"),
        ({"items": [{"id": "neither"}]}, "exactly one of `data` and `text`"),
        ({"items": [{"text": "a bird", "words": 1}]}, "known are data, id, text"),
        ({"text": []}, "at least one"),
    ],
)
def test_bodies_that_do_not_say_what_is_meant(client: httpx.Client, body: dict[str, Any], message: str) -> None:
    assert message in problem(client.post("/embed", json=body), 422, "invalid_parameter")["detail"]


def test_texts_count_as_items(api: Api, client: httpx.Client) -> None:
    most = api.settings.request_items
    for request in (form(*["a bird"] * most, files=1), {"json": {"text": ["a bird"] * (most + 1)}}):
        found = problem(client.post("/embed", **request), 413, "too_many_items")
        assert (found["limit"], found["actual"]) == (most, most + 1)
    assert len(client.post("/embed", json={"text": ["a bird"] * most}).json()["items"]) == most
    assert client.get("/v1/limits").json()["media"]["text_characters"] == 1000


def test_features_of_a_text_are_refused(client: httpx.Client) -> None:
    for outputs in ("features", "embedding,features"):
        for body in ({"text": "a bird"}, {"items": [{"text": "a bird"}, {"data": BASE64}]}):
            response = client.post("/embed", json={**body, "outputs": outputs})
            assert "no features" in problem(response, 422, "unsupported_output")["detail"]


def test_a_model_without_a_text_side_is_named_before_anything_is_queued(
    client: httpx.Client, worker: BlockWorker
) -> None:
    headers = {"X-Request-Id": "text-nowhere"}
    request = {"items": [{"data": BASE64}, {"text": "a bird"}], "model": CONTINUOUS["name"]}
    found = problem(client.post("/embed", json=request, headers=headers), 422, "unsupported_output")
    assert found["detail"] == f"`{CONTINUOUS['name']}` takes no text; text goes to `{DISCRETE['name']}`"
    assert "text-nowhere" not in worker.seen
    assert client.post("/embed", json={"text": "a bird", "model": DISCRETE["name"]}).status_code == 200
    cards = client.get("/v1/models").json()["data"]
    assert [card["text"] for card in cards] == [False, True]


@pytest.mark.parametrize("path", ["/encode", "/decode"])
def test_only_embed_takes_text(client: httpx.Client, path: str) -> None:
    requests: list[dict[str, Any]] = [
        {"json": {"text": "a bird"}},
        {"json": {"items": [{"text": "a bird"}]}},
        form("a bird"),
        form("a bird", files=1),
        {"params": {"text": "a bird"}, "content": PICTURE},
    ]
    for request in requests if path == "/encode" else requests[:4]:
        found = problem(client.post(path, **request), 422, "invalid_parameter")
        assert "only /embed takes text" in found["detail"], request


def test_text_is_no_option(client: httpx.Client) -> None:
    query = client.post("/embed", params={"text": "a bird"}, content=PICTURE)
    part = client.post("/embed", files={"file": PICTURE, "request": (None, '{"text": "a bird"}')})
    for response in (query, part):
        assert "form fields `text`" in problem(response, 422, "invalid_parameter")["detail"]


def test_metrics_count_texts(client: httpx.Client) -> None:
    def count() -> float:
        lines = client.get("/metrics").text.splitlines()
        found = [line for line in lines if line.startswith("atoken_items_total{") and 'kind="text"' in line]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    before = count()
    client.post("/embed", json={"text": ["a bird", "a cat"]})
    assert count() == before + 2


def test_without_any_text_side_the_bundled_models_are_named(api: Api) -> None:
    class Source:
        async def models(self) -> list[dict[str, Any]]:
            return [CONTINUOUS]

    directory = ModelDirectory(Source(), api.settings)
    with pytest.raises(Problem, match="unsupported_output: no model here takes text; the bundled models do"):
        asyncio.run(directory.for_outputs(None, ["embedding"], text=True))


def test_the_documents_say_how_texts_are_sent(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    content = paths["/v1/embed"]["post"]["requestBody"]["content"]
    form_schema = content["multipart/form-data"]["schema"]
    assert form_schema["properties"]["text"]["items"] == {"type": "string"}
    assert "required" not in form_schema
    for example in content["application/json"]["examples"].values():
        EmbedBody.model_validate(example["value"])
    encode = paths["/v1/encode"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert "text" not in encode["properties"]
    assert encode["required"] == ["file"]
    assert "-F text=&#x27;a bird&#x27;" in client.get("/docs").text
