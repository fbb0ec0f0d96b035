"""The server as a process of its own: its start, its log, its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn

from service.api.app import create_app
from service.api.server import Server
from service.settings import Settings
from tests.paths import ROOT
from tests.service.api.block_worker import BlockWorker
from tests.service.api.conftest import blocks, png

PICTURE = png(blocks(64, 64))
RUN = "from service.api.server import run; from service.settings import Settings; run(Settings())"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(redis_url: str, log: Path, **settings: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    port = free_port()
    names = {"port": str(port), "redis_url": redis_url, "media_workers": "1", "default_model": "blocks-continuous"}
    environment = {f"ATOKEN_{name.upper()}": value for name, value in (names | settings).items()}
    with log.open("wb") as stderr:
        process = subprocess.Popen([sys.executable, "-c", RUN], cwd=ROOT, env=os.environ | environment, stderr=stderr)
    try:
        base, give_up = f"http://127.0.0.1:{port}", time.monotonic() + 30.0
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < give_up, log.read_text()
            try:
                if httpx.get(f"{base}/health/ready").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        yield process, base
    finally:
        process.kill()
        process.wait()


def test_api_process_has_no_torch_and_no_model() -> None:
    code = (
        "import sys, service.api.app, service.api.server; "
        "print([name for name in ('torch', 'model', 'triton') if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.strip() == "[]"


def test_log_is_one_json_line_a_request_without_secrets(redis_url: str, worker: BlockWorker, tmp_path: Path) -> None:
    with server(redis_url, tmp_path / "log") as (process, base):
        headers = {"X-Request-Id": "the-request", "Content-Type": "image/png"}
        assert httpx.post(f"{base}/encode?model=blocks-continuous", content=PICTURE, headers=headers).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20.0) == 0
    text = (tmp_path / "log").read_text()
    entries = [json.loads(line) for line in text.splitlines()]
    (settings,) = [entry for entry in entries if entry["event"] == "settings"]
    assert settings["redis_url"].startswith("unix://***@")
    password = redis_url.partition("://:")[2].partition("@")[0]
    assert password
    assert password not in text
    (entry,) = [entry for entry in entries if entry.get("request_id") == "the-request"]
    assert (entry["status"], entry["tokens"], entry["items"], entry["route"]) == (200, 16, 1, "encode")
    assert entry["model_ms"] >= 0
    assert "?" not in entry["route"]


@contextmanager
def request_in_flight(base: str, worker: BlockWorker) -> Iterator[socket.socket]:
    """A request that the worker does not answer until worker.running is set; at the end it is."""
    worker.running.clear()
    try:
        time.sleep(0.1)
        host, port = base.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20.0) as connection:
            head = f"POST /encode HTTP/1.1\r\nHost: a\r\nContent-Length: {len(PICTURE)}\r\nConnection: close\r\n\r\n"
            connection.sendall(head.encode() + PICTURE)
            time.sleep(0.3)
            yield connection
    finally:
        worker.running.set()


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65_536), b""))


def test_sigterm_finishes_what_is_in_flight(redis_url: str, worker: BlockWorker, tmp_path: Path) -> None:
    with server(redis_url, tmp_path / "log", drain_s="0.5") as (process, base):
        with request_in_flight(base, worker) as connection:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            ready = httpx.get(f"{base}/health/ready")
            assert (ready.status_code, ready.json()["code"]) == (503, "shutting_down")
            worker.running.set()
            assert b" 200 OK" in read_all(connection).split(b"\r\n")[0]
        assert process.wait(20.0) == 0


def test_sigterm_with_a_request_that_does_not_end(redis_url: str, worker: BlockWorker, tmp_path: Path) -> None:
    with server(redis_url, tmp_path / "log", shutdown_s="2") as (process, base):
        with request_in_flight(base, worker) as connection:
            process.send_signal(signal.SIGTERM)
            answer = read_all(connection)
        assert b" 503 " in answer.split(b"\r\n")[0]
        assert b"shutting_down" in answer
        assert process.wait(20.0) == 0


def test_headers_over_the_limit_are_refused(redis_url: str, worker: BlockWorker, tmp_path: Path) -> None:
    with server(redis_url, tmp_path / "log") as (_, base):
        host, port = base.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20.0) as connection:
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: a\r\nX-Long: " + b"a" * 40_000)
            assert b" 400 " in connection.recv(65_536).split(b"\r\n")[0]
        assert httpx.get(f"{base}/health/live").status_code == 200


async def test_given_sockets_do_not_wait_for_delayed_acks(
    redis_url: str, worker: BlockWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[socket.socket] = []

    async def serve(self: uvicorn.Server, sockets: list[socket.socket] | None = None) -> None:
        served.extend(sockets or [])

    monkeypatch.setattr(uvicorn.Server, "serve", serve)
    settings = Settings(redis_url=redis_url)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        await Server(create_app(settings), settings).serve([listener])
        assert served == [listener]
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
