"""The worker as a process: what it says at start, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from media import wire
from service.queue.client import QueueClient
from service.queue.jobs import Answer, Job
from service.queue.server import PrivateRedis
from service.settings import Settings
from service.worker import main
from service.worker.loop import EXIT_STALLED
from service.worker.selftest import SelfTestError, pattern, run_selftest
from tests.paths import ROOT
from tests.service.worker.conftest import WeightFiles
from tests.system.deployment import wait_for

WORKER = ("-m", "service.worker.main")
PAYLOAD = wire.dumps({"pixels": pattern(32, 32)[None]}, {"kind": "image", "fps": None, "notes": []})


@dataclass
class Hung:
    worker: subprocess.Popen[bytes]
    answers: Future[list[Answer]]
    settings: dict[str, str]


@contextmanager
def process(*command: str, log: Path, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | {f"ATOKEN_{name.upper()}": value for name, value in settings.items()}
    with log.open("wb") as sink:
        child = subprocess.Popen([sys.executable, *command], env=environment, stderr=sink, stdout=sink, cwd=ROOT)
        try:
            yield child
        finally:
            child.kill()
            child.wait()


def events(log: Path) -> list[dict[str, Any]]:
    lines = log.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}\n")]


def event(log: Path, name: str, timeout_s: float = 60) -> Mapping[str, Any]:
    give_up = time.monotonic() + timeout_s
    while time.monotonic() < give_up:
        for found in events(log):
            if found["event"] == name:
                return found
        time.sleep(0.05)
    raise AssertionError(f"no {name!r} in the log: {log.read_text()[-2000:]}")


def test_a_worker_says_what_it_is_and_leaves_in_order(
    redis: PrivateRedis, weight_files: WeightFiles, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    models = f"{weight_files.continuous},{weight_files.discrete}"
    with process(*WORKER, log=log, redis_url=redis.url, models=models, threads="1", device="cpu") as worker:
        event(log, "worker_ready")
        started = event(log, "worker_started")
        assert [model["name"] for model in started["models"]] == ["random-tiny-continuous", "random-tiny-discrete"]
        assert all(len(model["revision"]) == 64 and model["device"] == "cpu" for model in started["models"])
        assert started["models"][0]["dtype"] == "float32"
        assert (started["batch_tokens"], started["threads"]) == (4096, 1)
        assert [name.partition("@")[0] for name in started["tokens_per_s"]] == [
            "random-tiny-continuous",
            "random-tiny-discrete",
        ]
        assert all(min(speed["encode"], speed["decode"]) > 0 for speed in started["tokens_per_s"].values())
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(20) == 0
    assert event(log, "worker_stopped")["status"] == 0
    assert redis.url.split("@")[0].split(":")[-1] not in log.read_text(), "the password is no text for a log"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": "no-such-model"}, "no-such-model"),
        ({"device": "cuda:99"}, "CUDA"),
        ({"redis_url": ""}, "redis"),
    ],
)
def test_a_worker_that_cannot_start_says_why(
    redis: PrivateRedis, weight_files: WeightFiles, tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    log = tmp_path / "log"
    settings = {"redis_url": redis.url, "models": str(weight_files.continuous)} | settings
    if not settings["redis_url"]:
        del settings["redis_url"]
    with process(*WORKER, log=log, **settings) as worker:
        assert worker.wait(60) == main.EXIT_START
    assert message in event(log, "worker_cannot_start", 1)["detail"]
    assert "Traceback" not in log.read_text()


async def submit(url: str, *names: str) -> list[Answer]:
    client = QueueClient(url)
    await client.start()
    try:
        [card] = await client.models()
        pool = f"{card['name']}@{card['revision'][:12]}"
        for name in names:
            await client.submit(Job(id=name, op="encode", pool=pool, cost=4, deadline=time.time() + 60), PAYLOAD)
        return list(await asyncio.gather(*(client.wait(name) for name in names)))
    finally:
        await client.close()


def test_a_hung_model_ends_the_worker_and_the_next_one_does_its_job(
    redis: PrivateRedis, weight_files: WeightFiles, tmp_path: Path
) -> None:
    settings = {"redis_url": redis.url, "models": str(weight_files.continuous), "watchdog_s": "1", "lease_s": "2"}
    with process("-m", "tests.service.worker.hanging_worker", log=tmp_path / "hung", **settings) as hung:
        event(tmp_path / "hung", "worker_ready")
        with process(*WORKER, log=tmp_path / "next", **settings | {"watchdog_s": "60"}):
            # The only worker so far takes the first.
            answers = asyncio.run(submit(redis.url, *(f"j{i}" for i in range(4))))
            assert {answer.status for answer in answers} == {"done"}
            assert max(answer.tries for answer in answers) == 2
        assert hung.wait(10) == EXIT_STALLED
    assert event(tmp_path / "hung", "model_stalled", 1)["seconds"] >= 1


@contextmanager
def hung_batch(redis: PrivateRedis, weight_files: WeightFiles, log: Path, **settings: str) -> Iterator[Hung]:
    """A worker in a batch that does not end."""
    settings = {"redis_url": redis.url, "models": str(weight_files.continuous)} | settings
    with process("-m", "tests.service.worker.hanging_worker", log=log, **settings) as worker:
        event(log, "worker_ready")
        answers = ThreadPoolExecutor(1).submit(asyncio.run, submit(redis.url, "j"))
        wait_for(lambda: "hanging" in log.read_text(), "a batch")
        yield Hung(worker, answers, settings)


def test_ctrl_c_waits_for_the_batch_a_while_and_gives_it_back(
    redis: PrivateRedis, weight_files: WeightFiles, tmp_path: Path
) -> None:
    log = tmp_path / "hung"
    with hung_batch(redis, weight_files, log, shutdown_s="1", lease_s="600") as hung:
        hung.worker.send_signal(signal.SIGINT)
        assert hung.worker.wait(10) == 0
        assert "\nStopping: waiting at most 1 s for the batch in hand" in log.read_text()
        assert event(log, "gave_back", 1)["items"] == 1
        with process(*WORKER, log=tmp_path / "next", **hung.settings):
            [answer] = hung.answers.result(60)
            assert (answer.status, answer.tries) == ("done", 2)


def test_a_second_ctrl_c_ends_at_once(redis: PrivateRedis, weight_files: WeightFiles, tmp_path: Path) -> None:
    log = tmp_path / "hung"
    with hung_batch(redis, weight_files, log, shutdown_s="60", lease_s="2") as hung:
        hung.worker.send_signal(signal.SIGINT)
        wait_for(lambda: "Ctrl-C again ends at once" in log.read_text(), "the line that says so")
        hung.worker.send_signal(signal.SIGINT)
        assert hung.worker.wait(3) == 130
        assert "Traceback" not in log.read_text()
        with process(*WORKER, log=tmp_path / "next", **hung.settings):
            assert hung.answers.result(60)[0].status == "done"


def test_a_worker_ends_with_its_parent(redis: PrivateRedis, weight_files: WeightFiles, tmp_path: Path) -> None:
    log = tmp_path / "log"
    start = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'service.worker.main', '--parent', str(os.getpid())])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with process("-c", start, log=log, redis_url=redis.url, models=str(weight_files.continuous)) as parent:
        event(log, "worker_ready")
        worker = psutil.Process(int(log.read_text().splitlines()[0]))
        parent.kill()
        parent.wait()
        worker.wait(10)


def test_the_batch_invariant_mode_is_a_setting(weight_files: WeightFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOKEN_BATCH_INVARIANT", "true")
    tokenizers, [card] = main.load_models(Settings(models=[str(weight_files.continuous)], device="cpu"))
    [tokenizer] = tokenizers.values()
    assert card["batch_invariant"]
    assert tokenizer.batch_invariant
    assert run_selftest(tokenizer, timed_tokens=64).tokens == 64


def test_the_self_test_refuses_a_model_that_gives_nonsense(weight_files: WeightFiles) -> None:
    settings = Settings(models=[str(weight_files.continuous)], device="cpu")
    tokenizers, [card] = main.load_models(settings)
    [tokenizer] = tokenizers.values()
    assert card["max_item_tokens"] == settings.media.item_tokens
    measured = run_selftest(tokenizer, timed_tokens=64)
    assert (measured.tokens, measured.encode_s > 0, measured.decode_s > 0) == (64, True, True)
    assert run_selftest(tokenizer, timed_tokens=65).tokens == 81  # never fewer than a pass that counts
    tokenizer.net.proj.weight.data[0, 0] = float("nan")
    with pytest.raises(SelfTestError, match="not finite"):
        run_selftest(tokenizer, timed_tokens=64)
