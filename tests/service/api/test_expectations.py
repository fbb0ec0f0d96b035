"""Every odd and bad file of the shared data over HTTP: an allowed status, a problem where it is refused, and soon."""

from __future__ import annotations

import json
import mimetypes
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.paths import DATA, needs_data
from tests.service.api.conftest import array_of
from tests.service.api.rig import Api

pytestmark = needs_data

SECONDS = 20.0
"""Bound on any one file, on a machine that does other things too; nearly all take a few milliseconds."""

# Where the text of an expectation is looser or stricter than its numbers; each with the rule that we chose.
CHOSEN: dict[str, set[int]] = {
    "bad/not_zip.zip": {415},
    # The picture is the first frame, said so in the notes.
    "images/odd/anim.webp": {200},
    "images/odd/anim.apng.png": {200},
    # A type that is not offered is refused before anybody looks into it.
    "bad/text_nul.txt": {415},
    "bad/text_1MB.txt": {415},
}


# A comment alone may be anything, and an STL has no magic number: senders say what they send.
DECLARED = {".obj": "model/obj", ".stl": "model/stl"}
NAMED = {
    "bad/empty.obj": (422, "empty_object", "no faces"),
    "bad/stl_claims_4e9.stl": (413, "item_too_large", "4294967295 faces"),
}


def cases() -> list[Any]:
    if not DATA.is_dir():
        return []
    known = json.loads((DATA / "expectations.json").read_text("utf-8"))
    return [
        pytest.param(entry["path"], entry["expect"], id=entry["path"])
        for group in ("images_odd", "videos_odd", "bad")
        for entry in known[group]
    ]


def allowed(path: str, expect: str) -> set[int]:
    if path in CHOSEN:
        return CHOSEN[path]
    statuses = {int(number) for number in re.findall(r"\b(?:200|400|413|415|422)\b", expect)}
    return statuses | (set(range(400, 423)) if "4xx" in expect else set())


def send(client: httpx.Client, path: str) -> httpx.Response:
    data = (DATA / path).read_bytes()
    suffix = Path(path).suffix
    if suffix in (".safetensors", ".npy", ".npz"):
        return client.post("/v1/decode", content=data)
    if suffix == ".json":
        return client.post("/v1/decode", content=data, headers={"Content-Type": "application/json"})
    if path == "bad/base64_bad.txt":
        return client.post("/v1/encode", json={"file": data.decode("latin-1")})
    media_type = DECLARED.get(suffix) or mimetypes.guess_type(path)[0]
    return client.post("/v1/encode", content=data, headers={"Content-Type": media_type} if media_type else {})


@pytest.mark.parametrize(("path", "expect"), cases())
def test_file_gets_an_answer_that_is_allowed(api: Api, path: str, expect: str) -> None:
    begun = time.monotonic()
    response = send(api.client, path)
    seconds = time.monotonic() - begun
    assert response.status_code in allowed(path, expect), (expect, response.text)
    assert seconds < SECONDS
    if response.status_code == 200:
        item = response.json()["items"][0]
        size = re.search(r"\b(\d+)x(\d+)\b", expect)
        if size:
            assert {item["layout"]["width"], item["layout"]["height"]} == {int(size[1]), int(size[2])}
        frames = re.search(r"200; (\d+) frames?\b", expect)
        if frames:
            assert item["layout"]["frames"] == int(frames[1])
        assert array_of(item["latents"]).shape == (item["tokens"], 48)
    else:
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["code"]
        assert "Traceback" not in response.text
        status, code, words = NAMED.get(path, (response.status_code, response.json()["code"], ""))
        assert (response.status_code, response.json()["code"]) == (status, code)
        assert words in response.json()["detail"]
    assert api.healthy


def test_bad_file_does_not_harm_its_neighbours(client: httpx.Client) -> None:
    names = ["images/odd/progressive.jpg", "bad/truncated.jpg", "images/odd/gray.jpg", "bad/text.jpg"]
    response = client.post("/v1/encode", files=[("file", (name, (DATA / name).read_bytes())) for name in names])
    assert response.status_code == 200, response.text
    items = response.json()["items"]
    assert [item["status"] for item in items] == ["ok", "error", "ok", "error"]
    assert [item["id"] for item in items] == names
    assert items[1]["error"]["code"] == "corrupt_media"


def test_animation_says_that_it_is_the_first_frame(client: httpx.Client) -> None:
    data = (DATA / "images/odd/anim.gif").read_bytes()
    item = client.post("/v1/encode", content=data).json()["items"][0]
    assert item["kind"] == "image"
    assert "first of 12 frames" in item["notes"]
    clip = client.post("/v1/encode", content=data, headers={"Content-Type": "video/gif"}).json()["items"][0]
    assert (clip["kind"], clip["layout"]["frames"]) == ("video", 12)
