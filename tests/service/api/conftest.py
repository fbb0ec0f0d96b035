"""One Redis, one worker and one API for the tests of this folder; tests of other settings start their own API."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import structlog
from PIL import Image

from media.video import encode_video
from service.queue.server import PrivateRedis
from tests.service.api.block_worker import BlockWorker
from tests.service.api.rig import Api


@pytest.fixture(scope="package", autouse=True)
def quiet() -> Iterator[None]:
    """Keep structlog's default from printing a page for every exception; test_server.py reads the real log."""
    structlog.configure(
        logger_factory=structlog.ReturnLoggerFactory(), processors=[structlog.processors.JSONRenderer()]
    )
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="package")
def redis_url() -> Iterator[str]:
    with PrivateRedis(maxmemory_bytes=512 << 20) as server:
        yield server.url


@pytest.fixture(scope="package")
def worker(redis_url: str) -> Iterator[BlockWorker]:
    with BlockWorker(redis_url) as running:
        yield running


@pytest.fixture(scope="package")
def api(redis_url: str, worker: BlockWorker) -> Iterator[Api]:
    with Api(redis_url) as running:
        yield running


@pytest.fixture
def client(api: Api) -> httpx.Client:
    return api.client


def blocks(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """A picture uint8 [height, width, 3] that is constant on 4 x 4 pixels: it comes back exactly."""
    small = np.random.default_rng(seed).integers(0, 256, (-(-height // 4), -(-width // 4), 3), dtype=np.uint8)
    return small.repeat(4, axis=0).repeat(4, axis=1)[:height, :width]


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """A PNG file of uint8 [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pixels_of(data: bytes) -> npt.NDArray[np.uint8]:
    """The pixels of a picture file."""
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"))


def mp4(frames: npt.NDArray[np.uint8], fps: float = 10.0) -> bytes:
    """A lossy clip of uint8 [T, H, W, 3]."""
    return encode_video(frames, fps, "mp4")


def problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The problem document of a response, after checking what every problem must have."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["code"] == code, body
    assert body["status"] == status
    assert body["type"] == f"/errors/{code}"
    assert body["instance"] == response.headers["x-request-id"]
    assert body["title"]
    assert body["detail"]
    assert "Traceback" not in response.text
    return body


def array_of(tensor: dict[str, Any]) -> npt.NDArray[Any]:
    """The array that a JSON answer holds."""
    data = base64.b64decode(tensor["data"], validate=True)
    return np.frombuffer(data, np.dtype(tensor["dtype"]).newbyteorder("<")).reshape(tensor["shape"])
