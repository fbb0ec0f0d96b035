"""A worker process: load, self-test, register, work, leave. `atoken worker` and the embedded deployment start it."""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import structlog
import torch

from model import Tokenizer
from model.errors import ModelError
from model.splat_decoder import SplatDecoder
from service import event_loop
from service.queue.consumer import QueueConsumer
from service.queue.estimate import effort_of
from service.queue.jobs import QueueUnavailable
from service.queue.keys import pool_of
from service.settings import Settings
from service.telemetry import configure_logging
from service.worker.budget import Budget
from service.worker.loop import EXIT_OK, LoopSettings, WorkerLoop
from service.worker.model_thread import ModelThread
from service.worker.runner import Runner
from service.worker.selftest import SelfTestError, run_selftest
from service.worker.speed import Speed
from service.worker.splatter import Splatter

EXIT_START = 78
"""The worker cannot start (no such model or device, self-test failed): starting it again will not help."""
EXIT_INTERRUPTED = 128 + signal.SIGINT

# A batch keeps its first job waiting until its last is done: as small as keeps the device busy.
# Small models on a CPU reach their full speed at 2,000 tokens; large ones take seconds for 1,000.
CPU_TOKENS, CPU_TOKENS_LARGE, LARGE_PARAMETERS = 4096, 1024, 50_000_000
GPU_TOKENS = 32_768

log = structlog.get_logger(__name__)


def run(settings: Settings, *, parent: int | None = None) -> int:
    """Work until SIGTERM or SIGINT, then end this process; returns only the exit status of a worker that cannot start.

    A stopping worker finishes the batch in hand if that takes at most settings.shutdown_s, else its jobs go back to
    the queue. A second SIGINT ends it at once with status 130; its jobs are another worker's when their lease is over.
    Call it from the main thread of a process of its own.
    settings.redis_url names the queue. parent: id of the process whose end ends this one at once.
    """
    configure_logging(settings.log_level)
    if settings.redis_url is None:
        log.error("worker_cannot_start", detail="no queue; give --redis URL or set ATOKEN_REDIS_URL")
        return EXIT_START
    for number in (signal.SIGTERM, signal.SIGINT):  # nothing is in hand before the loop runs
        signal.signal(number, _leave_at_once)
    threads = settings.threads or available_cores()
    torch.set_num_threads(threads)
    begin = time.monotonic()
    try:
        tokenizers, cards = load_models(settings)
        splatter = load_splatter(settings, tokenizers, cards)
        budget = Budget(settings.batch_tokens or default_batch_tokens(tokenizers))
        speed = Speed(large_tokens=budget.full // 4)
        for pool, tokenizer in tokenizers.items():
            measured = run_selftest(tokenizer, timed_tokens=speed.large_tokens)
            effort = effort_of(measured.tokens, tokenizer.config.encoder.attention_tokens)
            speed.add(pool, "encode", effort, measured.encode_s)
            speed.add(pool, "decode", effort, measured.decode_s)
    except (ModelError, SelfTestError) as error:
        log.error("worker_cannot_start", detail=str(error))
        return EXIT_START
    # Its parent starts a worker when the one before is dead, and never two: under the same name, so that what that one
    # held need not wait for the end of its lease.
    whose = f"{os.getpid()}-{secrets.token_hex(3)}" if parent is None else f"of-{parent}"
    worker_id = f"{socket.gethostname()[:40]}-{whose}"
    log.info(
        "worker_started",
        worker=worker_id,
        models=[{name: card[name] for name in ("name", "revision", "device", "dtype", "parameters")} for card in cards],
        batch_tokens=budget.full,
        batch_items=settings.batch_items,
        threads=threads,
        tokens_per_s={pool: speed.rates(pool).rounded() for pool in tokenizers},
        load_s=round(time.monotonic() - begin, 2),
    )
    consumer = QueueConsumer(
        settings.redis_url, worker_id, list(tokenizers), inherits=parent is not None, lease_s=settings.lease_s
    )
    loop = WorkerLoop(
        consumer,
        Runner(tokenizers, budget, speed, splatter),
        budget,
        speed,
        ModelThread(),
        LoopSettings(
            lease_s=settings.lease_s,
            watchdog_s=settings.watchdog_s,
            batch_items=settings.batch_items,
            stop_s=float(settings.shutdown_s),
            parent=parent,
        ),
    )
    status = event_loop.run(_serve(loop, consumer, cards, settings))
    log.info("worker_stopped", worker=worker_id, status=status)
    if status == EXIT_START:
        return status
    os._exit(status)  # a batch that was given back may still compute, and a thread is waited for


def load_models(settings: Settings) -> tuple[dict[str, Tokenizer], list[dict[str, Any]]]:
    """Load every model of the settings; return the tokenizers by pool, and their cards. Raises ModelError."""
    tokenizers: dict[str, Tokenizer] = {}
    cards: list[dict[str, Any]] = []
    for name in settings.models:
        tokenizer = Tokenizer.load(
            name,
            device=None if settings.device == "auto" else settings.device,
            dtype=None if settings.dtype == "auto" else settings.dtype,
            batch_invariant=settings.batch_invariant,
        )
        card = tokenizer.card() | {"max_item_tokens": settings.media.item_tokens}
        tokenizers[pool_of(card)] = tokenizer
        cards.append(card)
    return tokenizers, cards


def load_splatter(
    settings: Settings, tokenizers: Mapping[str, Tokenizer], cards: Sequence[dict[str, Any]]
) -> Splatter | None:
    """Load the Gaussian decoder of the settings beside the models and say so on their cards. Raises ModelError."""
    if not settings.gaussian_decoder:
        return None
    beside = next(iter(tokenizers.values()))
    decoder = SplatDecoder.load(settings.gaussian_decoder, device=beside.device)
    for card in cards:
        card["gaussian_decoder"] = decoder.card()
    return Splatter(decoder)


def default_batch_tokens(tokenizers: Mapping[str, Tokenizer]) -> int:
    """Return the budget B for what these models run on."""
    if any(tokenizer.device.type != "cpu" for tokenizer in tokenizers.values()):
        return GPU_TOKENS
    largest = max(sum(each.numel() for each in tokenizer.net.parameters()) for tokenizer in tokenizers.values())
    return CPU_TOKENS if largest < LARGE_PARAMETERS else CPU_TOKENS_LARGE


def available_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


async def _serve(loop: WorkerLoop, consumer: QueueConsumer, cards: list[dict[str, Any]], settings: Settings) -> int:
    is_interrupted = False

    def interrupt() -> None:
        nonlocal is_interrupted
        if is_interrupted:
            os._exit(EXIT_INTERRUPTED)
        is_interrupted = True
        print(
            f"Stopping: waiting at most {settings.shutdown_s} s for the batch in hand (then its jobs go back to the "
            f"queue). Ctrl-C again ends at once.",
            flush=True,
        )
        loop.stop()

    events = asyncio.get_running_loop()
    events.add_signal_handler(signal.SIGTERM, loop.stop)
    events.add_signal_handler(signal.SIGINT, interrupt)
    try:
        return await loop.run(cards)
    except QueueUnavailable as error:
        log.error("worker_cannot_start", detail=str(error))
        return EXIT_START
    finally:
        await consumer.close()


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    os._exit(EXIT_OK)


def main() -> int:
    """Entry of `python -m service.worker.main`: settings from the environment."""
    parser = argparse.ArgumentParser(description="A worker of AToken Serve; its settings are ATOKEN_* variables.")
    parser.add_argument("--parent", type=int, help="id of the process whose end ends this worker")
    return run(Settings(), parent=parser.parse_args().parent)


if __name__ == "__main__":
    sys.exit(main())
