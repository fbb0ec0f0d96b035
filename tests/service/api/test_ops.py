"""What the service says about itself."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.errors import CODES
from tests.service.api.block_worker import CONTINUOUS, DISCRETE
from tests.service.api.conftest import blocks, png
from tests.service.api.rig import Api


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_models_are_the_cards_of_the_live_workers(client: httpx.Client, prefix: str) -> None:
    data = client.get(f"{prefix}/models").json()["data"]
    assert [card["name"] for card in data] == [CONTINUOUS["name"], DISCRETE["name"]]
    assert [card["default"] for card in data] == [True, False]
    assert data[1]["outputs"] == DISCRETE["outputs"]
    assert data[1]["description"] == DISCRETE["description"]


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_limits_are_those_in_force(api: Api, prefix: str) -> None:
    limits = api.client.get(f"{prefix}/limits").json()
    assert limits["body_bytes"] == api.settings.body_bytes
    assert limits["media"]["item_tokens"] == api.settings.media.item_tokens
    assert limits["media"]["window_tokens"] == api.settings.media.window_tokens
    assert "png" in limits["formats"]["image"]
    assert "redis" not in str(limits)
    assert limits["queue_tokens"] is None  # it follows the workers' speed
    with Api(api.settings.redis_url or "", queue_tokens=5000) as fixed:
        assert fixed.client.get(f"{prefix}/limits").json()["queue_tokens"] == 5000


def test_health(client: httpx.Client) -> None:
    assert client.get("/health/live").json() == {"status": "live"}
    assert client.get("/health/ready").json() == {"status": "ready"}
    for path in ("/health/live", "/health/ready"):
        head = client.head(path)
        assert (head.status_code, head.content) == (200, b"")
    body = client.get("/health").json()
    assert body["status"] == "ready"
    speeds = [worker["tokens_per_s"] for worker in body["checks"]["workers"]["workers"]]
    assert speeds == [{"encode": 50_000, "decode": 1000}] * 2


def test_metrics_count_and_have_no_ids_in_labels(client: httpx.Client) -> None:
    def read() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        text = client.get("/metrics").text
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    before = read()
    client.post("/encode", content=png(blocks(32, 32)), headers={"X-Request-Id": "look-for-me"})
    client.post("/encode", content=b"nonsense")
    after = read()

    def grew(name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return after[key] - before.get(key, 0.0)

    assert grew("atoken_tokens_total", op="encode", kind="image") == 4
    assert grew("atoken_items_total", op="encode", kind="image", result="ok") == 1
    assert grew("atoken_http_requests_total", op="encode", status="2xx", code="") == 1
    assert grew("atoken_http_requests_total", op="encode", status="4xx", code="unsupported_media_type") == 1
    assert grew("atoken_stage_duration_seconds_count", stage="decode") == 1
    assert grew("atoken_decode_child_exits_total", reason="ok") == 1
    pool = f"{CONTINUOUS['name']}@{CONTINUOUS['revision'][:12]}"
    assert after["atoken_workers_ready", (("pool", pool),)] == 1
    assert after["atoken_queue_tokens", (("pool", pool),)] == 0
    assert after["atoken_queue_wait_seconds", (("pool", pool),)] == 0
    assert after["atoken_workers_tokens_per_second", (("op", "encode"), ("pool", pool))] == 50_000
    assert after["atoken_workers_tokens_per_second", (("op", "decode"), ("pool", pool))] == 1000
    assert "look-for-me" not in client.get("/metrics").text


def test_bare_address_leads_to_the_documentation(client: httpx.Client) -> None:
    answer = client.get("/")
    assert (answer.status_code, answer.headers["location"]) == (307, "/docs")


def test_documented_types_are_those_of_each_operation(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]

    def given(path: str, method: str = "post") -> set[str]:
        return set(paths[path][method]["responses"]["200"]["content"])

    tensors = {"application/json", "application/vnd.safetensors", "application/x-npy", "application/x-npz"}
    files = {"image/png", "image/webp", "image/jpeg", "video/mp4", "video/x-matroska"}
    assert given("/v1/embed") == tensors
    assert given("/v1/encode") == tensors | files | {"model/ply"}
    splats = {"model/ply", "application/octet-stream"}
    assert given("/v1/decode") == files | splats | tensors - {"application/vnd.safetensors"} | {"multipart/mixed"}
    assert given("/metrics", "get") == {"text/plain"}
    for path in ("/v1/encode", "/v1/embed"):
        assert {"video/x-msvideo", "video/quicktime"} <= set(paths[path]["post"]["requestBody"]["content"])


def test_documentation(client: httpx.Client) -> None:
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "/v1/encode" in page.text
    assert "<script" not in page.text
    document = client.get("/openapi.json").json()
    assert {"/v1/encode", "/v1/decode", "/v1/embed", "/v1/models", "/v1/limits", "/health/ready"} <= set(
        document["paths"]
    )
    operation = document["paths"]["/v1/encode"]["post"]
    assert {"multipart/form-data", "application/json", "image/png"} <= set(operation["requestBody"]["content"])
    assert {"outputs", "fit", "seed"} <= {entry["name"] for entry in operation["parameters"]}
    assert "application/problem+json" in operation["responses"]["422"]["content"]
    references = {text.split('"')[0] for text in client.get("/openapi.json").text.split("#/components/schemas/")[1:]}
    assert references <= set(document["components"]["schemas"])


def test_every_error_code_has_its_page(client: httpx.Client) -> None:
    for code, info in CODES.items():
        page = client.get(f"/errors/{code}")
        assert page.status_code == 200
        assert info.title in page.text.replace("&#x27;", "'")
