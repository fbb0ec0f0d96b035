"""How `atoken serve` ends, and what it does when one of its parts dies."""

from __future__ import annotations

import re
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import yaml

from media.image import encode_image
from service.settings import Settings
from service.worker_process import RESTARTS, STOP_S, find_cause
from tests.paths import ROOT
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


@contextmanager
def stuck(atoken: Atoken, requests: int = 2) -> Iterator[list[object]]:
    """Freeze the worker, bring requests into flight; give the list in which their statuses (or errors) will be."""
    url = atoken.wait_ready().url()
    atoken.child("service.worker.main").suspend()
    found: list[object] = []

    def send() -> None:
        try:
            found.append(post(url))
        except httpx.TransportError as error:
            found.append(error)

    threads = [threading.Thread(target=send) for _ in range(requests)]
    for thread in threads:
        thread.start()
    with httpx.Client(base_url=url, trust_env=False) as client:
        wait_for(lambda: metric(client, "atoken_queue_items") == requests, f"{requests} jobs in the queue")
    yield found
    for thread in threads:
        thread.join(30)


def test_a_second_ctrl_c_ends_at_once_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="atoken-test-") as place:  # short: the path of a socket has little room
        monkeypatch.setenv("TMPDIR", place)
        with Atoken(folder, "serve", "serve", "--port", "0") as atoken:
            with stuck(atoken) as found:
                assert list(Path(place).glob("atoken-*"))
                family = atoken.family()
                atoken.interrupt()
                said = atoken.wait_until(lambda: re.search("^Stopping: .*$", atoken.out.read_text(), re.M), "a line")
                assert "2 requests in flight, waiting at most 30 s" in said[0]
                assert "Ctrl-C again ends at once" in said[0]
                log = atoken.err.read_text()
                atoken.interrupt()
                begin = time.monotonic()
                assert atoken.popen.wait(20) == 130, atoken.written()
                assert time.monotonic() - begin < 3
                _, alive = psutil.wait_procs(family, 5)
                assert alive == []
                assert list(Path(place).glob("atoken-*")) == []
            assert all(isinstance(each, httpx.TransportError) for each in found)
            assert [line for line in atoken.err.read_text().removeprefix(log).splitlines() if "info" not in line] == []


def test_requests_that_do_not_end_are_told_so_when_the_time_is_over(folder: Path) -> None:
    with Atoken(folder, "serve", "serve", "--port", "0", shutdown_s=3) as atoken, stuck(atoken) as found:
        family = atoken.family()
        atoken.interrupt()
        begin = time.monotonic()
        assert atoken.popen.wait(30) == 0
        assert time.monotonic() - begin < 3 + STOP_S + 4
        assert wait_for(lambda: len(found) == 2, "both answers")
        assert found == [503, 503]
        _, alive = psutil.wait_procs(family, 5)
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


def test_what_a_dead_worker_held_need_not_wait_for_its_lease(folder: Path) -> None:
    with Atoken(folder, "serve", "serve", "--port", "0", lease_s=3600) as atoken:
        url = atoken.wait_ready().url()
        worker = atoken.child("service.worker.main")
        statuses: list[int] = []
        threads = [threading.Thread(target=lambda: statuses.append(post(url))) for _ in range(4)]
        # Stopped while it waits for jobs, almost always within a read: Redis hands it the first all the same.
        worker.suspend()
        for thread in threads:
            thread.start()
        with httpx.Client(base_url=url, trust_env=False) as client:
            wait_for(lambda: metric(client, "atoken_queue_items") == 4, "four jobs in the queue")
        worker.kill()
        for thread in threads:
            thread.join(90)
        assert statuses == [200] * 4


def test_a_worker_that_dies_at_its_start_is_explained_in_a_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = folder / "path"
    broken.mkdir()
    (broken / "torch.py").write_text('raise RuntimeError("no such instruction")')
    monkeypatch.setenv("PYTHONPATH", str(broken))
    with Atoken(folder, "serve", "serve", "--port", "0") as atoken:
        assert atoken.popen.wait(90) == 1
        said = [line for line in atoken.err.read_text().splitlines() if line.startswith(("The worker", "AToken"))]
        cause = "the worker ended with status 1 (RuntimeError: no such instruction)"
        assert said == [f"T{cause[1:]}; starting it again."] * RESTARTS + [
            f"AToken Serve stopped: {cause}, for the 4th time in 600 s."
        ]


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
        last = atoken.err.read_text().splitlines()[-1]
        assert last.startswith("AToken Serve stopped: the worker cannot start: ")
        assert "broken.safetensors" in last


def test_a_model_that_is_not_there_is_refused_before_anything_starts(folder: Path) -> None:
    with Atoken(folder, "serve", "serve", "--port", "0", "--model", "no-such-model") as atoken:
        assert atoken.popen.wait(60) == 2
        assert "'no-such-model' is not there" in atoken.err.read_text()
        assert atoken.out.read_text() == ""


def test_no_code_is_taken_from_the_folder_it_is_started_in(folder: Path) -> None:
    for name in ("random", "redis", "torch", "numpy", "PIL", "av"):
        (folder / f"{name}.py").write_text(f"open({str(folder / 'executed')!r}, 'a').write('{name} ')\n")
    with Atoken(folder, "serve", "serve", "--port", "0", cwd=folder) as atoken:
        atoken.wait_ready()
        assert post(atoken.url()) == 200
    assert not (folder / "executed").exists(), (folder / "executed").read_text()


def test_the_container_engine_waits_longer_than_a_stop_takes() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    settings = Settings()
    for name in ("api", "worker"):
        patience = int(services[name]["stop_grace_period"].removesuffix("s"))
        assert patience > settings.drain_s + settings.shutdown_s + 5, name


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("", ""),
        ('{"event": "worker_ready", "level": "info"}\n', ""),
        ('{"event": "device_lost", "level": "critical", "detail": "no GPU"}\n{"level": "info"}\n', "no GPU"),
        ('{"event": "fault", "level": "error", "exception": "Traceback\\n  x\\nValueError: 3"}', "ValueError: 3"),
        ('{"event": "fault", "level": "error"}', "fault"),
        ('{"level": "error", "detail": "long ago"}\n' + '{"level": "info"}\n' * 5, ""),
        ("Traceback (most recent call last):\n  File\nMemoryError\n", "MemoryError"),
        ('lf": 1}\n{"level": 3}\n{broken', ""),
    ],
)
def test_the_cause_is_the_last_error(log: str, cause: str) -> None:
    assert find_cause(log) == cause
