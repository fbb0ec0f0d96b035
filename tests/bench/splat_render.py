"""What drawing Gaussians costs on a CPU, forward and as a step of training.

    python -m tests.bench.splat_render [--threads 1]

Scenes: a shell of radius 0.4 seen from 1.6 at 40 degrees. CPU seconds beside wall seconds: the machine may be shared.
"""

import argparse
import math
import resource
import time

import torch

from model.config import GaussianConfig
from model.orbit import look_at
from model.rasterizer import render
from model.splats import Splats

CONFIG = GaussianConfig()


def shell(count: int, scale: float, opacity: float) -> Splats:
    """Gaussians of random turn on a sphere; opacity: middle of the raw values, 0 is 0.1 and 6 nearly opaque."""
    chance = torch.Generator().manual_seed(0)
    places = torch.nn.functional.normalize(torch.randn(count, 3, generator=chance)) * 0.4 + 0.5
    bias = math.log(math.expm1(scale)) - math.log(math.expm1(CONFIG.initial_scale))
    scaling = bias + 0.1 * torch.randn(count, 3, generator=chance)
    colours, turns = torch.randn(count, 3, generator=chance), torch.randn(count, 4, generator=chance)
    return Splats(places, colours, scaling, turns, opacity + torch.randn(count, 1, generator=chance), CONFIG)


def main() -> None:
    """Print two Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    camera, intrinsics = look_at(30, 20, 1.6, 40)
    print("| Gaussians | scale | | picture | CPU s | wall s |\n|---|---|---|---|---|---|")
    for count, scale, opacity in (
        (100_000, 0.004, 0.0),
        (100_000, 0.004, 6.0),
        (100_000, 0.01, 0.0),
        (100_000, 0.01, 6.0),
        (320_000, 0.004, 0.0),
    ):
        splats = shell(count, scale, opacity)
        with torch.inference_mode():
            begin, begin_cpu = time.perf_counter(), time.process_time()
            render(splats, camera, intrinsics, height=512, width=512)
            cpu, wall = time.process_time() - begin_cpu, time.perf_counter() - begin
        kind = "mostly opaque" if opacity else "opacity near 0.1"
        print(f"| {count:,} | {scale} | {kind} | 512x512 | {cpu:.2f} | {wall:.2f} |", flush=True)
    print("\n| Gaussians | picture | forward CPU s | backward CPU s |\n|---|---|---|---|")
    for count, side in ((20_000, 128), (100_000, 128), (100_000, 256)):
        splats = shell(count, 0.006, 0.0)
        for name in ("xyz01", "features_dc", "scaling", "rotation", "opacity"):
            getattr(splats, name).requires_grad_()
        begin_cpu = time.process_time()
        colour = render(splats, camera, intrinsics, height=side, width=side).colour
        between = time.process_time()
        colour.square().sum().backward()
        print(
            f"| {count:,} | {side}x{side} | {between - begin_cpu:.2f} | {time.process_time() - between:.2f} |",
            flush=True,
        )
    print(f"\npeak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
