"""The worker container's health check against a real Redis."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from service.queue.consumer import QueueConsumer
from service.queue.server import PrivateRedis
from tests.paths import ROOT

CARD = {"name": "tiny-continuous", "revision": "0" * 64, "max_item_tokens": 32_768}


@pytest.fixture(scope="module")
def server() -> Iterator[PrivateRedis]:
    with PrivateRedis() as server:
        yield server


def _run(redis_url: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ATOKEN_")}
    environment["PYTHONPATH"] = str(ROOT)
    if redis_url:
        environment["ATOKEN_REDIS_URL"] = redis_url
    command = [sys.executable, str(ROOT / "deploy" / "worker_health.py")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


async def _register(url: str, host: str, *, ready: bool) -> QueueConsumer:
    consumer = QueueConsumer(url, f"{host[:40]}-1-abcdef", ["tiny-continuous@000000000000"])
    await consumer.start([CARD])
    await consumer.set_ready(ready)
    return consumer


async def test_healthy_only_while_the_worker_of_this_host_is_ready(server: PrivateRedis) -> None:
    other = await _register(server.url, "another-host", ready=True)
    assert "no worker of host" in _run(server.url).stderr

    mine = await _register(server.url, socket.gethostname(), ready=False)
    done = _run(server.url)
    assert (done.returncode, done.stderr.strip()) == (1, "not ready: tiny-continuous@000000000000")

    await mine.set_ready(True)
    done = _run(server.url)
    assert (done.returncode, done.stderr) == (0, "")
    await mine.close()
    await other.close()


def test_unhealthy_without_redis(tmp_path: object) -> None:
    done = _run(f"unix://{tmp_path}/nobody")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert _run(None).stderr.strip() == "ATOKEN_REDIS_URL is not set"
