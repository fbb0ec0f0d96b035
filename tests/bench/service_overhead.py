"""What HTTP, queue and batching cost against calling the model: real processes, real files, one run.

    python -m tests.bench.service_overhead [--seconds 20] [--repeats 3]

Starts `atoken serve` (bundled tiny-continuous, CPU, one arithmetic thread) and posts 256x256 JPEG pictures to /encode
for a token file. Latency: one client, request by request in turns with the direct call on the decoded pixels in this
process (also one thread). Throughput: 32 clients against the bare loop that encodes packs of 16 such pictures, in
turns. The load generator is a few lines on raw sockets, because it shares the cores with what it measures.
"""

import argparse
import asyncio
import contextlib
import io
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image as Pillow

from media.types import Image
from model import Tokenizer
from tests.paths import ROOT

CLIENTS = 32
PACK = 16


def main() -> None:
    """Start the service, measure both ways in turns, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer.load("tiny-continuous", device=args.device)
    photo = Pillow.open(ROOT / "examples/photo.jpg").convert("RGB")
    pictures = [
        Image(pixels=np.asarray(photo.crop((x, y, x + 256, y + 256)))) for x in range(0, 320, 20) for y in (0, 70, 140)
    ]
    bodies = [_jpeg(picture) for picture in pictures]
    with _server(args.device) as port:
        requests = [_request(port, body) for body in bodies]
        _latency(port, requests, tokenizer, pictures, args.seconds)
        _throughput(port, requests, tokenizer, pictures, args.seconds, args.repeats)


def _latency(port: int, requests: list[bytes], tokenizer: Tokenizer, pictures: list[Image], seconds: float) -> None:
    direct: list[float] = []
    served: list[float] = []
    stages: dict[str, list[float]] = {}

    async def run() -> None:
        client = _Client()
        await client.connect(port)
        end, turn = time.perf_counter() + 2 * seconds, 0
        while time.perf_counter() < end:
            index = turn % len(pictures)
            start = time.perf_counter()
            tokenizer.encode([pictures[index]])
            middle = time.perf_counter()
            head = await client.send(requests[index])
            stop = time.perf_counter()
            turn += 1
            if turn > 10:  # warm
                direct.append(middle - start)
                served.append(stop - middle)
                for name, value in re.findall(r"(\w+);dur=([\d.]+)", head):
                    stages.setdefault(name, []).append(float(value))

    asyncio.run(run())
    added = [s - d for s, d in zip(served, direct, strict=True)]
    print(f"one client, {len(direct)} requests: direct p50 {_ms(direct, 50)}, p99 {_ms(direct, 99)}")
    print(f"served p50 {_ms(served, 50)}, p99 {_ms(served, 99)}")
    print(f"added latency p50 {_ms(added, 50)}, p99 {_ms(added, 99)}")
    print("stages p50 (ms): " + ", ".join(f"{name} {statistics.median(values):.1f}" for name, values in stages.items()))


def _throughput(
    port: int, requests: list[bytes], tokenizer: Tokenizer, pictures: list[Image], seconds: float, repeats: int
) -> None:
    shares = []
    for _ in range(repeats):
        bare = _bare_rate(tokenizer, pictures, seconds / 2)
        served = asyncio.run(_served_rate(port, requests, seconds))
        shares.append(served / bare)
        print(f"bare loop {bare:.1f} pictures/s, {CLIENTS} clients {served:.1f} pictures/s, share {served / bare:.2f}")
    print(f"share of the bare packed loop, median of {repeats}: {statistics.median(shares):.2f}")


def _bare_rate(tokenizer: Tokenizer, pictures: list[Image], seconds: float) -> float:
    tokenizer.encode(pictures[:PACK])
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        tokenizer.encode([pictures[(count + i) % len(pictures)] for i in range(PACK)])
        count += PACK
    return count / (time.perf_counter() - start)


async def _served_rate(port: int, requests: list[bytes], seconds: float) -> float:
    done = 0
    begin = time.perf_counter() + 2  # the first two seconds fill the pipe
    end = begin + seconds

    async def client(number: int) -> None:
        nonlocal done
        connection = _Client()
        await connection.connect(port)
        turn = number
        while time.perf_counter() < end:
            await connection.send(requests[turn % len(requests)])
            turn += 1
            done += begin < time.perf_counter() < end
        connection.close()

    await asyncio.gather(*(client(number) for number in range(CLIENTS)))
    return done / seconds


class _Client:
    """One kept connection; every answer must be a 200."""

    async def connect(self, port: int) -> None:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)

    async def send(self, request: bytes) -> str:
        self.writer.write(request)
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        body = await self.reader.readexactly(int(re.search(r"(?i)content-length: (\d+)", head)[1]))  # type: ignore[index]
        assert head.startswith("HTTP/1.1 200"), head + body[:500].decode(errors="replace")
        return head

    def close(self) -> None:
        self.writer.close()


def _request(port: int, body: bytes) -> bytes:
    head = (
        f"POST /encode HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: image/jpeg\r\n"
        f"Accept: application/vnd.safetensors\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _jpeg(picture: Image) -> bytes:
    buffer = io.BytesIO()
    Pillow.fromarray(picture.pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _ms(values: list[float], percentile: float) -> str:
    return f"{np.percentile(values, percentile) * 1000:.1f} ms"


@contextlib.contextmanager
def _server(device: str) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "service.cli.main",
        "serve",
        "--port",
        str(port),
        "--threads",
        "1",
        "--device",
        device,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ATOKEN_LOG_LEVEL": "warning"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 2) as probe:
                probe.sendall(b"GET /health/ready HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
                if probe.recv(20).startswith(b"HTTP/1.1 200"):
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the server did not start")
            time.sleep(0.2)
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


if __name__ == "__main__":
    main()
