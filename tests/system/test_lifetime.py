"""How `atoken serve` ends, and what it does when one of its parts dies."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from media.image import encode_image
from tests.system.deployment import Atoken, metric, wait_for

PICTURE = encode_image(np.full((48, 48, 3), 90, np.uint8))


def post(url: str) -> int:
    return httpx.post(f"{url}/encode", files={"file": ("a.png", PICTURE)}, timeout=60, trust_env=False).status_code


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGHUP", "SIGKILL"])
def test_nothing_is_left_behind(folder: Path, how: str) -> None:
    with Atoken(folder, "serve", "serve", "--port", "0", shutdown_s=5) as atoken:
        atoken.wait_ready()
        assert post(atoken.url()) == 200
        family = atoken.family()
        assert len(family) >= 4  # itself, the worker, Redis, decoder children
        sockets = [part.split(":", 1)[1] for part in atoken.child("valkey-server").cmdline() if "unixsocket:" in part]
        if how == "Ctrl-C":
            atoken.interrupt()
        else:
            atoken.popen.send_signal(getattr(signal, how))
        status = atoken.popen.wait(30)
        _, alive = psutil.wait_procs(family, 20)
        assert alive == []
        if how != "SIGKILL":
            assert status == 0, atoken.written()
            assert "AToken Serve stopped." in atoken.out.read_text()
            assert not any(Path(socket).exists() for socket in sockets)
        assert "Traceback" not in atoken.err.read_text()


def test_ctrl_c_during_the_start(folder: Path) -> None:
    with Atoken(folder, "serve", "serve", "--port", "0") as atoken:
        atoken.url()
        family = atoken.family()
        atoken.interrupt()
        atoken.popen.wait(30)
        _, alive = psutil.wait_procs(family, 20)
        assert alive == []
        assert "Traceback" not in atoken.err.read_text()


def test_requests_in_flight_are_answered_before_the_end(folder: Path) -> None:
    with Atoken(folder, "serve", "serve", "--port", "0") as atoken:
        url = atoken.wait_ready().url()
        family = atoken.family()
        worker = atoken.child("service.worker.main")
        worker.suspend()
        statuses: list[int] = []
        threads = [threading.Thread(target=lambda: statuses.append(post(url))) for _ in range(5)]
        for thread in threads:
            thread.start()
        with httpx.Client(base_url=url, trust_env=False) as client:
            wait_for(lambda: metric(client, "atoken_queue_items") == 5, "five jobs in the queue")
        atoken.popen.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        worker.resume()
        for thread in threads:
            thread.join(30)
        assert statuses == [200] * 5
        assert atoken.popen.wait(30) == 0
        _, alive = psutil.wait_procs(family, 20)
        assert alive == []


def test_a_dead_worker_is_replaced_a_few_times(folder: Path) -> None:
    with Atoken(folder, "serve", "serve", "--port", "0", lease_s=2) as atoken:
        url = atoken.wait_ready().url()
        first = atoken.child("service.worker.main")
        first.kill()
        wait_for(lambda: len(atoken.events("worker_ready")) == 2, "a second worker", 90)
        assert post(url) == 200
        assert atoken.events("worker_died")[0]["how"] == "signal SIGKILL"
        killed = {first.pid}
        for _ in range(3):
            worker = wait_for(lambda: living_worker(atoken, killed), "another worker")
            killed.add(worker.pid)
            worker.kill()
        assert atoken.popen.wait(30) == 1
        assert "the worker ended with signal SIGKILL" in atoken.err.read_text().splitlines()[-1]


def living_worker(atoken: Atoken, killed: set[int]) -> psutil.Process | None:
    worker = atoken.child("service.worker.main")
    return None if worker.pid in killed else worker


def test_a_dead_redis_ends_everything_with_its_reason(folder: Path) -> None:
    with Atoken(folder, "serve", "serve", "--port", "0", shutdown_s=5) as atoken:
        atoken.wait_ready()
        family = atoken.family()
        atoken.child("valkey-server").kill()
        assert atoken.popen.wait(30) == 1
        assert "the private Redis ended" in atoken.err.read_text()
        _, alive = psutil.wait_procs(family, 20)
        assert alive == []


def test_a_model_that_cannot_be_loaded_ends_everything_with_its_reason(folder: Path) -> None:
    weights = folder / "broken.safetensors"
    weights.write_bytes(b"no weights at all")
    with Atoken(folder, "serve", "serve", "--port", "0", "--model", str(weights)) as atoken:
        assert atoken.popen.wait(90) == 1
        assert "broken.safetensors" in atoken.events("worker_cannot_start")[0]["detail"]
        assert "the worker cannot start" in atoken.err.read_text().splitlines()[-1]


def test_a_model_that_is_not_there_is_refused_before_anything_starts(folder: Path) -> None:
    with Atoken(folder, "serve", "serve", "--port", "0", "--model", "no-such-model") as atoken:
        assert atoken.popen.wait(60) == 2
        assert "'no-such-model' is not there" in atoken.err.read_text()
        assert atoken.out.read_text() == ""
