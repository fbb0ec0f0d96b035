import asyncio
import collections
import ctypes
import io
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
import pytest_asyncio
from PIL import Image as PILImage

from media.decode import decode_media
from media.errors import MediaError
from media.image import encode_image
from media.limits import Limits
from media.pool import MediaPool
from media.types import Image, Video
from media.video import encode_video
from tests.paths import ROOT

# Small numbers, so that a test that hits a limit is quick.
LIMITS = Limits(child_memory_bytes=256 * 2**20, child_wall_s=20.0, child_cpu_s=10.0)
PIXELS = np.random.default_rng(3).integers(0, 256, (40, 60, 3), np.uint8)


@pytest_asyncio.fixture
async def pool() -> AsyncIterator[MediaPool]:
    async with MediaPool(LIMITS, 2) as running:
        await running.start()
        yield running


def children() -> list[psutil.Process]:
    """Living children of this process; the standard library's resource tracker is nobody's decoder."""
    return [c for c in psutil.Process().children() if "resource_tracker" not in " ".join(c.cmdline())]


async def refused(pool: MediaPool, fn: object, *args: object, timeout_s: float | None = None) -> MediaError:
    with pytest.raises(MediaError) as caught:
        await pool.run(fn, *args, timeout_s=timeout_s)  # type: ignore[arg-type]
    return caught.value


async def outcome(pool: MediaPool, data: bytes) -> Image | Video | MediaError:
    try:
        return await pool.run(decode_media, data, Limits(), None)
    except MediaError as error:
        return error


async def test_decodes_and_encodes(pool: MediaPool) -> None:
    data = await pool.run(encode_image, PIXELS, "png", 90)
    image = await pool.run(decode_media, data, Limits(), None)
    assert isinstance(image, Image)
    assert (image.pixels == PIXELS).all()
    clip = np.stack([PIXELS] * 5)
    for format_name in ("mp4", "mkv"):
        data = await pool.run(encode_video, clip, 25.0, format_name)
        assert (await pool.run(decode_media, data, Limits(), None)).frames.shape == clip.shape  # type: ignore[union-attr]


async def test_media_errors_cross_unchanged(pool: MediaPool) -> None:
    error = await refused(pool, decode_media, encode_image(PIXELS), replace(Limits(), item_tokens=11), None)
    assert (error.code, error.limit, error.actual) == ("too_many_tokens", 11, 12)


async def test_children_know_nothing_of_the_parent(pool: MediaPool, monkeypatch: pytest.MonkeyPatch) -> None:
    names = await pool.run(eval, "sorted(__import__('sys').modules)")
    assert "media.decode" in names
    assert not {"torch", "service", "model", "training", "pytest", "redis"} & {name.split(".")[0] for name in names}
    variables = await pool.run(eval, "open('/proc/self/environ').read() + str(dict(__import__('os').environ))")
    assert "PATH" not in variables.replace("LD_LIBRARY_PATH", "")
    assert await pool.run(os.listdir, ".") == []
    assert await pool.run(os.getcwd) != os.getcwd()
    assert await pool.run(os.nice, 0) >= 5


async def test_children_live_under_limits(pool: MediaPool) -> None:
    names = ("AS", "NOFILE", "FSIZE", "CORE", "NPROC")
    found = await pool.run(
        eval, f"[(r := __import__('resource')).getrlimit(getattr(r, 'RLIMIT_' + n)) for n in {names}]"
    )
    taken = found[0][0] - LIMITS.child_memory_bytes
    # The libraries' own address space, measured in the child.
    assert 0 < taken < 2**30
    assert found[1:] == [(64, 64), (0, 0), (0, 0), (0, 0)]
    assert await pool.run(eval, "'NoNewPrivs:\\t1' in open('/proc/self/status').read()")


async def test_children_cannot_write_files(pool: MediaPool, tmp_path: Path) -> None:
    path = tmp_path / "out"
    error = await refused(pool, exec, f"open({str(path)!r}, 'wb', buffering=0).write(b'x')")
    assert error.code == "internal"
    assert not path.exists() or path.stat().st_size == 0


async def test_a_crash_costs_one_task(pool: MediaPool) -> None:
    crash, fine = await asyncio.gather(
        refused(pool, ctypes.string_at, 0), *[pool.run(encode_image, PIXELS, "png", 90)], return_exceptions=True
    )
    assert isinstance(crash, MediaError)
    assert (crash.code, crash.status) == ("corrupt_media", 422)
    assert isinstance(fine, bytes)
    assert await pool.run(abs, -1) == 1


async def test_exit_and_kill_are_crashes(pool: MediaPool) -> None:
    assert (await refused(pool, os._exit, 3)).code == "corrupt_media"
    assert (await refused(pool, signal.raise_signal, signal.SIGKILL)).code == "corrupt_media"
    assert await pool.run(abs, -2) == 2


@pytest.mark.parametrize("kind", ["loop in C", "sleep", "stopped"])
async def test_a_hang_is_killed_in_time(pool: MediaPool, kind: str) -> None:
    start = time.monotonic()
    if kind == "loop in C":
        error = await refused(pool, collections.deque, itertools.count(), 0, timeout_s=0.5)
    elif kind == "sleep":
        error = await refused(pool, time.sleep, 1000, timeout_s=0.5)
    else:
        error = await refused(pool, signal.raise_signal, signal.SIGSTOP, timeout_s=0.5)
    assert (error.code, error.limit) == ("decode_limit", 0.5)
    # A stopped process is killed only after a grace of three seconds.
    assert time.monotonic() - start < 15
    assert await asyncio.gather(*(pool.run(abs, -n) for n in range(4))) == [0, 1, 2, 3]


async def test_too_much_memory_is_an_error_not_a_death(pool: MediaPool) -> None:
    before = {c.pid for c in children()}
    error = await refused(pool, bytearray, 400 * 2**20)
    assert (error.code, error.status) == ("decode_limit", 422)
    assert {c.pid for c in children()} == before


async def test_processor_time_is_limited_for_each_task() -> None:
    limits = replace(LIMITS, child_cpu_s=1.0)
    async with MediaPool(limits, 1) as pool:
        # Together above the limit, each below it: no death.
        pid = await pool.run(os.getpid)
        for _ in range(5):
            await pool.run(exec, "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass")
        assert await pool.run(os.getpid) == pid
        error = await refused(pool, collections.deque, itertools.count(), 0)
        assert (error.code, error.limit) == ("decode_limit", 1.0)


async def test_children_are_replaced_after_their_share_of_tasks() -> None:
    async with MediaPool(replace(LIMITS, child_max_tasks=3), 1) as pool:
        pids = [await pool.run(os.getpid) for _ in range(8)]
    assert len(set(pids)) >= 3


async def test_the_queue_is_bounded(pool: MediaPool) -> None:
    tasks = [asyncio.create_task(pool.run(time.sleep, 0.3)) for _ in range(pool.queue_limit + 3)]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    busy = [r for r in results if isinstance(r, MediaError)]
    assert [(error.code, error.status, error.limit) for error in busy] == [("media_busy", 429, 6)] * 3
    assert results.count(None) == 6
    assert pool.pending == 0
    assert await pool.run(abs, -1) == 1


async def test_the_event_loop_is_never_blocked(pool: MediaPool) -> None:
    gaps: list[float] = []

    async def tick() -> None:
        while True:
            start = time.monotonic()
            await asyncio.sleep(0.01)
            gaps.append(time.monotonic() - start)

    ticker = asyncio.create_task(tick())
    await asyncio.gather(
        refused(pool, os._exit, 1), refused(pool, time.sleep, 100, timeout_s=0.3), pool.run(time.sleep, 2.0)
    )
    ticker.cancel()
    # Above what a busy machine adds, below the task that would block.
    assert max(gaps) < 1.5
    assert len(gaps) > 20


async def test_cancelling_kills_the_work_and_frees_the_place(pool: MediaPool) -> None:
    task: asyncio.Task[object] = asyncio.create_task(pool.run(collections.deque, itertools.count(), 0))
    await asyncio.sleep(0.3)
    busy = set(children())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert pool.pending == 0
    assert await asyncio.gather(*(pool.run(abs, -n) for n in range(6))) == [0, 1, 2, 3, 4, 5]
    # One child of the two was killed.
    for _ in range(200):
        if sum(not child.is_running() for child in busy) == 1:
            return
        await asyncio.sleep(0.05)
    pytest.fail("the cancelled work goes on")


async def test_an_idle_child_that_dies_is_replaced(pool: MediaPool) -> None:
    for child in children():
        child.kill()
    assert await asyncio.gather(*(pool.run(abs, -n) for n in range(4))) == [0, 1, 2, 3]


async def test_close_ends_what_runs_and_leaves_nobody() -> None:
    pool = MediaPool(LIMITS, 2)
    await pool.start()
    folder = await pool.run(os.getcwd)
    assert len(children()) == 2
    tasks = [asyncio.create_task(pool.run(time.sleep, 100)) for _ in range(4)]
    await asyncio.sleep(0.2)
    start = time.monotonic()
    await pool.aclose()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert time.monotonic() - start < 5
    assert [getattr(r, "code", r) for r in results] == ["shutting_down"] * 4
    assert children() == []
    assert not Path(folder).exists()
    assert (await refused(pool, abs, -1)).code == "shutting_down"
    pool.close()


async def test_close_before_anything_started() -> None:
    pool = MediaPool(LIMITS, 2)
    pool.close()
    assert children() == []


def test_needs_a_worker() -> None:
    with pytest.raises(ValueError, match="at least one"):
        MediaPool(LIMITS, 0)


HOST = """
import asyncio, os, sys
raise_in_children = None if __name__ == "__main__" else 1 / 0
from media.limits import Limits
from media.pool import MediaPool

async def main():
    pool = MediaPool(Limits(), 1)
    print(await pool.run(os.getpid), flush=True)
    if sys.argv[1] == "wait":
        await asyncio.sleep(100)

asyncio.run(main())
"""


@pytest.mark.parametrize("end", ["killed", "forgot to close"])
def test_children_die_with_their_parent(tmp_path: Path, end: str) -> None:
    # The script also fails if a child imports it.
    script = tmp_path / "host.py"
    script.write_text(HOST)
    # A killed parent leaves its empty folder behind: here rather than in the common place.
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(script), "wait" if end == "killed" else "go"]
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None
        child = psutil.Process(int(host.stdout.readline()))
        if end == "killed":
            host.kill()
        assert host.wait(20) == (-signal.SIGKILL if end == "killed" else 0)
        # It may be a zombie until somebody in this container reaps it.
        for _ in range(100):
            if not child.is_running() or child.status() == psutil.STATUS_ZOMBIE:
                return
            time.sleep(0.05)
    pytest.fail("the child outlived its parent")


def bomb_png() -> bytes:
    """A picture of 20,000 x 20,000 in a small file."""
    out = io.BytesIO()
    PILImage.new("1", (20_000, 20_000)).save(out, "PNG")
    return out.getvalue()


async def test_bombs_are_refused_within_the_limits(pool: MediaPool) -> None:
    error = await refused(pool, decode_media, bomb_png(), Limits(), None)
    assert error.code == "image_too_large"
    # With the checks of the header off, the child's memory still holds.
    wide_open = replace(Limits.local(), child_memory_bytes=LIMITS.child_memory_bytes)
    error = await refused(pool, decode_media, bomb_png(), wide_open, None)
    assert error.code == "decode_limit"


async def test_an_avif_that_lies_about_its_size_stays_within_the_limits(pool: MediaPool) -> None:
    out = io.BytesIO()
    PILImage.new("RGB", (6000, 6000)).save(out, "AVIF", speed=10)
    data = bytearray(out.getvalue())
    at = data.index(b"ispe") + 8
    data[at : at + 8] = (32).to_bytes(4, "big") * 2
    image = await outcome(pool, bytes(data))
    if isinstance(image, MediaError):
        assert image.code in ("corrupt_media", "decode_limit")
    else:
        assert isinstance(image, Image)
        assert image.pixels.shape == (32, 32, 3)


@pytest.mark.parametrize("format_name", ["png", "jpeg", "webp", "mp4", "mkv"])
async def test_damaged_files_never_harm(pool: MediaPool, format_name: str) -> None:
    random = np.random.default_rng(4)
    if format_name in ("mp4", "mkv"):
        data = encode_video(np.stack([PIXELS] * 12), 25.0, format_name)  # type: ignore[arg-type]
    else:
        data = encode_image(PIXELS, format_name)  # type: ignore[arg-type]
    for _ in range(40):
        damaged = bytearray(data)
        for at in random.integers(0, len(data), 4):
            damaged[at] = random.integers(0, 256)
        if random.random() < 0.3:
            del damaged[random.integers(1, len(data)) :]
        item = await outcome(pool, bytes(damaged))
        if isinstance(item, MediaError):
            assert item.status in (413, 415, 422), item
        else:
            assert item.kind in ("image", "video")
