"""What a 3D asset costs without the tokenizer between: posed views to voxels, Gaussians to a picture, voxels to a PLY.

    python -m tests.bench.assets_3d [--repeats 5] [--voxels 500,2000,5800]

Views are drawn by the tests' ray caster (float32 depth, RGBA), outside of the timing. Pictures are of 512x512, of the
100,000 Gaussians of tests/bench/splat_render.py. The Gaussian decoder has its published size, random weights and the
voxels of a cube's surface. One process a row of the last two tables, so that the peak of memory is its own. CPU seconds
stand beside wall seconds, because the machine may be shared. One arithmetic thread.
"""

import argparse
import multiprocessing
import resource
import statistics
import time

import torch

from media.multiview import voxelize
from media.ply import encode_ply
from model.config import GaussianConfig
from model.gaussian_decoder import GaussianDecoder
from tests.bench import splat_render
from tests.media.posed import ARMS, Box, draw

CUBE = (Box((-0.45, -0.45, -0.45), (0.45, 0.45, 0.45), (200, 120, 40)),)


def main() -> None:
    """Print three Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--voxels", default="500,2000,5800")
    args = parser.parse_args()
    _views(args.repeats)
    print()
    splat_render.print_table([(scene, 512, False) for scene in splat_render.SCENES], args.repeats)
    print("\n| voxels | Gaussians | decoder s | CPU s | PLY s | PLY MB | peak GiB |\n|---|---|---|---|---|---|---|")
    for count in map(int, args.voxels.split(",")):
        # spawn, not fork: a child must not start with the parent's memory.
        child = multiprocessing.get_context("spawn").Process(target=_decoder, args=(count,))
        child.start()
        child.join()


def _views(repeats: int) -> None:
    print(
        "| object | views | surface pixels | voxels | best s | median s | median CPU s |\n|---|---|---|---|---|---|---|"
    )
    for name, boxes in (("three arms", ARMS), ("cube of 0.9", CUBE)):
        for count, side in ((8, 128), (16, 256), (16, 512), (24, 512), (16, 1024)):
            views = draw(boxes, count, side)
            wall, cpu = [], []
            for _ in range(repeats):
                start, start_cpu = time.perf_counter(), time.process_time()
                voxels = voxelize(views)
                wall.append(time.perf_counter() - start)
                cpu.append(time.process_time() - start_cpu)
            surface = sum(int((depth >= 0).sum()) for depth in views.depths)
            print(
                f"| {name} | {count} of {side}x{side} | {surface} | {len(voxels.coords)} "
                f"| {min(wall):.3f} | {statistics.median(wall):.3f} | {statistics.median(cpu):.3f} |",
                flush=True,
            )


def _decoder(count: int) -> None:
    torch.set_num_threads(1)
    places = torch.from_numpy(voxelize(draw(CUBE, 12, 128)).coords[:count]).long()
    coords = torch.cat([torch.zeros(len(places), 1, dtype=torch.int64), places], dim=1)
    net = GaussianDecoder(GaussianConfig()).eval()
    feats = torch.randn(len(coords), net.config.feature_channels)
    with torch.inference_mode():
        net(feats[:64], coords[:64])  # warm
        start, start_cpu = time.perf_counter(), time.process_time()
        splats = net.splats(net(feats, coords), coords)
        seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
        start = time.perf_counter()
        file = encode_ply(splats.to_record())
        written = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"| {len(coords)} | {len(coords) * net.config.gaussians} | {seconds:.2f} | {cpu:.2f} | {written:.2f} "
        f"| {len(file) / 1e6:.1f} | {peak:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
