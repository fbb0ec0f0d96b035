"""Requests with several items: one bad file does not fail its neighbours, unless asked to."""

from __future__ import annotations

import base64

import httpx
import numpy as np
import pytest

from service.api.answers import BadItem, DecodeAnswer, EncodeAnswer
from tests.service.api.block_worker import BlockWorker
from tests.service.api.conftest import array_of, blocks, png, problem

GOOD = [png(blocks(16, 16 * (1 + seed), seed)) for seed in range(3)]
BAD = b"this is no picture"
TOKENS = {"Accept": "application/vnd.safetensors"}


def files(*contents: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("file", (f"{position}.bin", data)) for position, data in enumerate(contents)]


def test_answers_are_in_request_order_with_errors_in_their_places(client: httpx.Client) -> None:
    response = client.post("/encode", files=files(BAD, GOOD[0], b"", GOOD[1], GOOD[2][:60]))
    assert response.status_code == 200
    answer = EncodeAnswer.model_validate(response.json())
    assert [item.status for item in answer.items] == ["error", "ok", "error", "ok", "error"]
    assert [item.error.code for item in answer.items if isinstance(item, BadItem)] == [
        "unsupported_media_type",
        "truncated_body",
        "corrupt_media",
    ]
    assert answer.usage.tokens == 1 + 2
    assert response.headers["atoken-tokens"] == "3"


def test_bad_base64_fails_its_item_only(client: httpx.Client) -> None:
    items = [{"id": "good", "data": base64.b64encode(GOOD[0]).decode()}, {"id": "bad", "data": "***"}]
    answer = client.post("/embed", json={"items": items}).json()
    assert [(item["id"], item["status"]) for item in answer["items"]] == [("good", "ok"), ("bad", "error")]


def test_when_none_is_good_the_first_problem_answers(client: httpx.Client) -> None:
    found = problem(client.post("/encode", files=files(BAD, GOOD[0][:40])), 415, "unsupported_media_type")
    assert found["item"] == 0
    assert [entry["error"]["code"] for entry in found["items"]] == ["unsupported_media_type", "corrupt_media"]


def test_a_single_bad_item_answers_with_its_problem(client: httpx.Client) -> None:
    assert "item" not in problem(client.post("/encode", files=files(BAD)), 415, "unsupported_media_type")


def test_fail_refuses_all_and_queues_nothing(client: httpx.Client, worker: BlockWorker) -> None:
    headers = {"X-Request-Id": "all-or-nothing"}
    response = client.post("/encode", files=files(*GOOD, BAD), params={"on_error": "fail"}, headers=headers)
    assert problem(response, 415, "unsupported_media_type")["item"] == 3
    assert "all-or-nothing" not in worker.seen
    broken = png(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    middle = bytearray(broken)
    middle[len(broken) // 2] ^= 0xFF  # its header is fine, so only the decoder finds out
    response = client.post("/encode", files=files(*GOOD, bytes(middle)), params={"on_error": "fail"}, headers=headers)
    assert problem(response, 422, "corrupt_media")["item"] == 3
    assert "all-or-nothing" not in worker.seen
    assert client.post("/encode", files=files(*GOOD), params={"on_error": "fail"}, headers=headers).status_code == 200
    assert worker.seen.count("all-or-nothing") == 3


def test_formats_without_room_for_errors_fail_whole(client: httpx.Client) -> None:
    response = client.post("/encode", files=files(GOOD[0], BAD), headers=TOKENS)
    assert problem(response, 415, "unsupported_media_type")["item"] == 1
    asked = client.post("/encode", files=files(GOOD[0], BAD), headers=TOKENS, params={"on_error": "partial"})
    assert "application/json" in problem(asked, 422, "invalid_parameter")["detail"]


@pytest.mark.parametrize("count", [2, 64])
def test_many_items(client: httpx.Client, count: int) -> None:
    response = client.post("/embed", files=files(*[GOOD[position % 3] for position in range(count)]))
    items = response.json()["items"]
    assert len(items) == count
    vectors = [array_of(item["embedding"]) for item in items]
    for position, vector in enumerate(vectors):
        np.testing.assert_array_equal(vector, vectors[position % 3] if position % 3 < len(vectors) else vector)


def test_decode_of_several_with_a_bad_one(client: httpx.Client) -> None:
    tokens = [client.post("/encode", content=data, headers=TOKENS).content for data in GOOD[:2]]
    response = client.post("/decode", files=files(tokens[0], b"nonsense", tokens[1]))
    answer = DecodeAnswer.model_validate(response.json())
    assert [item.status for item in answer.items] == ["ok", "error", "ok"]
    strict = client.post("/decode", files=files(tokens[0], b"nonsense"), params={"on_error": "fail"})
    assert problem(strict, 422, "invalid_token_file")["item"] == 1
    mixed = client.post("/decode", files=files(tokens[0], b"nonsense"), headers={"Accept": "multipart/mixed"})
    assert mixed.status_code == 200
    assert b"Content-Type: application/problem+json" in mixed.content
    both = client.post("/encode", files=files(*GOOD[:2]), headers=TOKENS).content
    nested = client.post("/decode", files=files(both, tokens[0])).json()["items"]
    assert [item["id"] for item in nested] == ["0.bin/0", "0.bin/1", "1.bin"]
