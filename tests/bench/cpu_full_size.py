"""Full size on the CPU: encode and decode against the matrix products alone, measured in turns in one process.

    python -m tests.bench.cpu_full_size [--threads 1] [--repeats 3]

Random weights, float32. "Products" are the network's own linear layers (input, blocks, output; no pooling head; the
fastest product at hand, model/linear.py) on matrices of the same shape; share = products / (encode + decode).
"torch's" are the same layers as plain F.linear. Times are CPU seconds of the process with one thread (robust when
others use the machine), wall seconds with more. Prints a Markdown table.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from media.types import Image, Item, Video
from model import VARIANTS, Tokenizer
from model.network import ATokenNet

# Height x width of the mixed batch: the sizes that the published code was timed with.
MIXED = (
    "320x320 112x128 128x144 128x272 272x304 80x224 96x112 80x192 "
    "256x128 112x256 272x208 128x288 224x176 192x320 176x288 256x304"
)


def main() -> None:
    """Parse, build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    tokenizer = Tokenizer(_random_network(), name="full", revision="0" * 64)
    loaded = _peak()
    print(f"torch {torch.__version__}, {args.threads} thread(s), {args.repeats} repeats; loaded: {loaded:.2f} GiB")
    print("| input | tokens | encode s | decode s | products s | torch's s | GFLOP/s | share | peak GiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, items in _workloads().items():
        print(_row(tokenizer, name, items, args.repeats, clock), flush=True)


def _row(tokenizer: Tokenizer, name: str, items: list[Item], repeats: int, clock: Callable[[], float]) -> str:
    tokens = tokenizer.encode(items, {"latents", "embedding"})
    n = sum(len(item) for item in tokens)
    times: dict[str, list[float]] = {"encode": [], "decode": [], "products": [], "torch": []}
    for _ in range(repeats):  # in turns: the machine's speed drifts
        times["products"].append(_timed(clock, lambda: _products(tokenizer.net, n)))
        times["torch"].append(_timed(clock, lambda: _products(tokenizer.net, n, call=_plain)))
        times["encode"].append(_timed(clock, lambda: tokenizer.encode(items, {"latents", "embedding"})))
        times["decode"].append(_timed(clock, lambda: tokenizer.decode(tokens)))
    shares = [p / (e + d) for p, e, d in zip(times["products"], times["encode"], times["decode"], strict=True)]
    encode, decode, products, plain = (
        statistics.median(times[key]) for key in ("encode", "decode", "products", "torch")
    )
    rate = 2 * n * _linear_weights(tokenizer.net) / products / 1e9
    figures = f"{encode:.2f} | {decode:.2f} | {products:.2f} | {plain:.2f} | {rate:.0f}"
    return f"| {name} | {n} | {figures} | {statistics.median(shares):.2f} | {_peak():.2f} |"


def _workloads() -> dict[str, list[Item]]:
    rng = np.random.default_rng(0)

    def pixels(*shape: int) -> np.ndarray:
        return rng.integers(0, 256, (*shape, 3), dtype=np.uint8)

    sizes = [tuple(map(int, size.split("x"))) for size in MIXED.split()]
    return {
        "image 256x256": [Image(pixels=pixels(256, 256))],
        "clip 8x256x256": [Video(frames=pixels(8, 256, 256))],
        "16 images 64..320": [Image(pixels=pixels(*size)) for size in sizes],
    }


def _random_network() -> ATokenNet:
    with torch.device("meta"):
        net = ATokenNet(VARIANTS["so400m-continuous"])
    net.to_empty(device="cpu")
    for name, parameter in net.named_parameters():
        if "norm" in name or "gamma" in name:
            parameter.data.fill_(1.0)
        else:
            parameter.data.uniform_(-0.03, 0.03)
    return net.requires_grad_(False)


def _linears(net: ATokenNet) -> list[nn.Linear]:
    stacks = (net.encoder.input_layer, net.encoder.blocks, net.proj, net.decoder)
    return [module for stack in stacks for module in stack.modules() if isinstance(module, nn.Linear)]


def _linear_weights(net: ATokenNet) -> int:
    return sum(linear.weight.numel() for linear in _linears(net))


@torch.inference_mode()
def _products(
    net: ATokenNet, tokens: int, call: Callable[[nn.Linear, torch.Tensor], object] = nn.Linear.__call__
) -> None:
    inputs: dict[int, torch.Tensor] = {}
    for linear in _linears(net):
        width = linear.in_features
        if width not in inputs:
            inputs[width] = torch.rand(tokens, width)
        call(linear, inputs[width])


def _plain(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, linear.weight, linear.bias)


def _timed(clock: Callable[[], float], call: Callable[[], object]) -> float:
    start = clock()
    call()
    return clock() - start


def _peak() -> float:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


if __name__ == "__main__":
    main()
