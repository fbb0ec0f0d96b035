"""Gaussians to pictures: seconds and memory of the torch renderer, forward alone and with its gradient.

    python -m tests.bench.splat_render [--repeats 5] [--threads 1] [--device cuda]

Gaussians lie on a sphere of radius 0.4, the camera at 1.6 with a view of 40 degrees. Opacities are "faint" (around 0.1)
or "opaque" (mostly near 1). One process a row, so that the peak of memory is its own (torch
itself is about 0.2 GiB of it). CPU seconds stand beside wall seconds, because the machine may be shared.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Sequence
from typing import TypeAlias

import torch

from model.orbit import look_at
from model.projection import SplatTensors
from model.rasterizer import Rendering, render

Scene: TypeAlias = tuple[int, float, str]
"""Gaussians, their size, and how opaque they are."""

SCENES: tuple[Scene, ...] = (
    (100_000, 0.004, "faint"),
    (100_000, 0.004, "opaque"),
    (100_000, 0.01, "faint"),
    (100_000, 0.01, "opaque"),
)
LARGE: Scene = (320_000, 0.004, "faint")


def shell(count: int, scale: float, kind: str, seed: int = 0) -> SplatTensors:
    """Gaussians of random turns on a sphere, float32."""
    rng = torch.Generator().manual_seed(seed)

    def normal(width: int) -> torch.Tensor:
        return torch.randn(count, width, generator=rng)

    return SplatTensors(
        positions=torch.nn.functional.normalize(normal(3)) * 0.4,
        colours=torch.rand(count, 3, generator=rng),
        opacities=(normal(1) + (-2.2 if kind == "faint" else 3.0)).sigmoid(),
        scales=scale * (0.3 * normal(3)).exp(),
        rotations=torch.nn.functional.normalize(normal(4)),
    )


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    rows = [(scene, 512, False) for scene in (*SCENES, LARGE)]
    small = (20_000, 0.004, "faint"), (20_000, 0.01, "opaque")
    rows += [(scene, side, True) for side in (128, 256) for scene in (*small, *SCENES)]
    print_table(rows, args.repeats, args.threads, args.device)


def print_table(rows: Sequence[tuple[Scene, int, bool]], repeats: int, threads: int = 1, device: str = "cpu") -> None:
    """rows: scene, side of the picture, and whether the gradient is computed, too."""
    print("| Gaussians | picture | what | best s | median s | median CPU s | peak GiB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for row in rows:
        # spawn, not fork: a child must not start with the parent's memory.
        child = multiprocessing.get_context("spawn").Process(target=_measure, args=(*row, repeats, threads, device))
        child.start()
        child.join()


def _measure(scene: Scene, side: int, gradient: bool, repeats: int, threads: int, device: str) -> None:
    torch.set_num_threads(threads)
    splats = SplatTensors(*(tensor.to(device).requires_grad_(gradient) for tensor in shell(*scene)))
    camera = [matrix.to(device) for matrix in look_at(30, 20, 1.6, 40)]

    def call() -> Rendering:
        drawn = render(splats, *camera, height=side, width=side)
        if gradient:
            (drawn.colour.square().mean() + drawn.alpha.mean()).backward()
        return drawn

    render(splats, *camera, height=16, width=16)  # warm
    wall, cpu = [], []
    for _ in range(repeats):
        start, start_cpu = time.perf_counter(), time.process_time()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    print(
        f"| {scene[0] // 1000}k, {scene[1]}, {scene[2]} | {side} | {'with gradient' if gradient else 'forward'} "
        f"| {min(wall):.3f} | {statistics.median(wall):.3f} | {statistics.median(cpu):.3f} "
        f"| {_peak(device):.2f} |",
        flush=True,
    )


def _peak(device: str) -> float:
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
