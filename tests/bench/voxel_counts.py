"""Time and peak memory of a 3D asset through the default models, by the number of its voxels.

    python -m tests.bench.voxel_counts [--voxels 1000,4000,8000,16000,24000]

Voxels are the surface of a cube with random patches; encode, decode and Gaussians of a service's worker, one process a
row, so that the peak of memory is its own. One arithmetic thread. All voxels of an asset attend to each other.
"""

import argparse
import itertools
import multiprocessing
import resource
import time

import numpy as np
import torch

from media.types import Voxels
from model import Tokenizer
from model.splat_decoder import SplatDecoder


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--voxels", default="1000,4000,8000,16000,24000")
    given = parser.parse_args()
    print("| voxels | encode s | decode s | Gaussians s | CPU s of all | peak GiB |\n|---|---|---|---|---|---|")
    for count in map(int, given.voxels.split(",")):
        # spawn, not fork: a child must not start with the parent's memory.
        child = multiprocessing.get_context("spawn").Process(target=_row, args=(count,))
        child.start()
        child.join()


def shell(count: int) -> Voxels:
    """So many voxels of the surface of a cube of 64 cells."""
    places = np.stack(np.meshgrid(*[np.arange(64)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    surface = places[((places == 0) | (places == 63)).any(axis=1)]
    if count > len(surface):
        inner = places[((places == 1) | (places == 62)).any(axis=1) & ((places > 0) & (places < 63)).all(axis=1)]
        surface = np.concatenate([surface, inner])
    feats = np.random.default_rng(0).random((count, 768), dtype=np.float32)
    return Voxels(coords=surface[:count].astype(np.int32), feats=feats)


def _row(count: int) -> None:
    torch.set_num_threads(1)
    tokenizer = Tokenizer.load("tiny-continuous", device="cpu")
    splatter = SplatDecoder.load("tiny-splats", device="cpu")
    tokenizer.decode(tokenizer.encode([shell(64)]))  # warm
    item = shell(count)
    marks = [time.perf_counter()]
    cpu = time.process_time()
    tokens = tokenizer.encode([item])
    marks.append(time.perf_counter())
    (back,) = tokenizer.decode(tokens)
    marks.append(time.perf_counter())
    assert isinstance(back, Voxels)
    splatter.decode([back])
    marks.append(time.perf_counter())
    spent = [later - earlier for earlier, later in itertools.pairwise(marks)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    times = " | ".join(f"{seconds:.2f}" for seconds in spent)
    print(f"| {len(item.coords)} | {times} | {time.process_time() - cpu:.1f} | {peak:.2f} |", flush=True)


if __name__ == "__main__":
    main()
