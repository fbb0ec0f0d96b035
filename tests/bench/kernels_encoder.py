"""All blocks of the encoder, without gradients: eager, compiled, as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from model.encoder import Encoder
from model.kernels import segment_starts
from model.rope import rotary_table
from tests.bench.kernels_clock import Ceiling, Clock, Scale, inputs, short

DATASHEET = {"H100 PCIe": 756, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40S": 362}
"""bfloat16 TFLOP/s without sparsity, by what the GPU's name contains: what MFU is usually taken of."""


def encoder_table(clock: Clock, scale: Scale, top: Ceiling, *, reserve: float) -> Iterator[str]:
    """Lines of it; reserve: seconds that are to be left for what comes after."""
    yield "| tokens | how | ms | tokens/s | TFLOP/s | of the ceiling | MFU of the datasheet |"
    yield "|---|---|---|---|---|---|---|"
    stack = scale.config.encoder
    sheet = _datasheet(clock.device)
    with torch.device(clock.device):
        blocks = list(Encoder(scale.config).to(torch.bfloat16).blocks)
    compiled: list[Any] = [torch.compile(block, fullgraph=True) for block in blocks]
    for name, lengths in scale.encoder.items():
        starts = inputs(lengths, clock.device, sets=0)[2]
        rows = starts[-1]
        coords = torch.stack([torch.arange(rows) % 64] * 4, 1)
        rotary, held = rotary_table(coords, stack.head_width).to(clock.device), segment_starts(starts, clock.device)
        first = torch.randn(rows, stack.width, device=clock.device, dtype=torch.bfloat16)

        def run(
            layers: list[Any], first: Tensor = first, rotary: Tensor = rotary, held: object = held
        ) -> Callable[[], Tensor]:
            def forward() -> Tensor:
                h = first
                with torch.no_grad():
                    for layer in layers:
                        h = layer(h, rotary, held)
                return h

            return forward

        products = 2 * rows * (4 * stack.width**2 + 2 * stack.width * stack.mlp)
        flop = stack.blocks * (products + 4 * stack.width * sum(length**2 for length in lengths))
        ways: dict[str, Callable[[], Callable[[], object]]] = {"eager": lambda: run(blocks)}
        if clock.device.type == "cuda":
            ways["compiled"] = lambda: run(compiled)
            ways["CUDA graph, eager"] = lambda: recorded(run(blocks))
            ways["CUDA graph, compiled"] = lambda: recorded(run(compiled))
        for way, make in ways.items():
            if clock.left() < reserve:
                yield f"| {name} | {way} | left out: no time | | | | |"
                continue
            try:
                ms = clock.median([make()])
            except Exception as error:
                if way == "eager":
                    raise
                yield f"| {name} | {way} | {short(error)} | | | | |"
                continue
            rate = flop / ms / 1e9
            share = f"{rate / sheet:.2f}" if sheet else "not known"
            speed = f"{ms:.2f} | {1000 * rows / ms:.0f} | {rate:.0f}"
            yield f"| {name} | {way} | {speed} | {rate / top.tflops:.2f} | {share} |"


def _datasheet(device: torch.device) -> int:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((rate for part, rate in DATASHEET.items() if part in name), 0)


def recorded(call: Callable[[], object]) -> Callable[[], object]:
    """The same as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
