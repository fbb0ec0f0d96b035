"""Round trip of the queue alone: submit -> begin -> start -> load -> commit -> answer, in one process, no model.

    python -m tests.bench.queue_latency --payload 200000 --answer 64000 --clients 1 --jobs 500

Prints p50, p90, p99 in milliseconds, the rate, and the processor time of both ends (steady on a busy machine).
Client and worker share one event loop (that is the slower case: in service they are processes of their own), the server
is the private one on a unix socket.
"""

import argparse
import asyncio
import os
import statistics
import time
import uuid
from typing import Any

from service.queue.client import QueueClient
from service.queue.consumer import QueueConsumer
from service.queue.jobs import Answer, Job
from service.queue.keys import pool_of
from service.queue.server import PrivateRedis

CARD: dict[str, Any] = {"name": "bench", "revision": "0" * 12}


async def work(consumer: QueueConsumer, answer: bytes) -> None:
    """A worker whose model takes no time."""
    while True:
        leases = await consumer.fetch(100_000, 32)
        await consumer.beat(leases)
        for lease in await consumer.start_jobs(leases):
            await consumer.load(lease)
            await consumer.commit(lease, Answer(id=lease.job.id, status="done", payload=answer))


async def measure(
    url: str, payload_bytes: int, answer_bytes: int, clients: int, jobs: int
) -> tuple[list[float], float, float]:
    """Times of all round trips in milliseconds, and the wall and processor seconds that all took."""
    client, consumer = QueueClient(url), QueueConsumer(url, uuid.uuid4().hex, [pool_of(CARD)])
    await consumer.start([CARD])
    await consumer.set_ready(True)
    await client.start()
    worker = asyncio.create_task(work(consumer, os.urandom(answer_bytes)))
    payload = os.urandom(payload_bytes)

    async def ask(count: int) -> list[float]:
        times = []
        for _ in range(count):
            began = time.perf_counter()
            job = Job(
                id=uuid.uuid4().hex, op="encode", pool=pool_of(CARD), cost=100, deadline=time.time() + 60, options={}
            )
            await client.submit(job, payload)
            answer = await client.wait(job.id)
            assert answer.status == "done"
            times.append((time.perf_counter() - began) * 1000)
        return times

    await ask(20)
    began, began_cpu = time.perf_counter(), time.process_time()
    times = await asyncio.gather(*(ask(jobs // clients) for _ in range(clients)))
    seconds, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    worker.cancel()
    await asyncio.gather(worker, return_exceptions=True)
    await client.close()
    await consumer.close()
    return [t for some in times for t in some], seconds, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--payload", type=int, default=200_000, help="bytes of a job's input")
    parser.add_argument("--answer", type=int, default=64_000, help="bytes of its answer")
    parser.add_argument("--clients", type=int, default=1, help="requests at a time")
    parser.add_argument("--jobs", type=int, default=500)
    args = parser.parse_args()
    with PrivateRedis() as server:
        times, seconds, cpu = asyncio.run(measure(server.url, args.payload, args.answer, args.clients, args.jobs))
    cuts = statistics.quantiles(times, n=100)
    print(
        f"{args.payload} B in, {args.answer} B out, {args.clients} at a time, {len(times)} jobs: "
        f"p50 {cuts[49]:.2f} ms, p90 {cuts[89]:.2f} ms, p99 {cuts[98]:.2f} ms, {len(times) / seconds:.0f}/s, "
        f"{cpu / len(times) * 1000:.2f} ms of processor time a job"
    )


if __name__ == "__main__":
    main()
