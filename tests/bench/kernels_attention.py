"""Attention against its peers, forward and backward, with and without QK norm; and a search for better tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from tests.bench.kernels_clock import FAILED, HEADS, WIDTH, Ceiling, Clock, Scale, inputs, short
from tests.bench.kernels_peers import Attention, Gains, Make, ours, with_preparation

SEARCH_S = 30  # for each of the three kernels
BACKWARD = 2.5  # times the forward's operations: five products instead of two


def make_gains(device: torch.device) -> Gains:
    """Of the norm of queries and keys, [H, D] each."""
    q, k = (torch.ones(HEADS, WIDTH, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    return q, k


def forward_ms(clock: Clock, attention: Attention, sets: list[Tensor]) -> float:
    """Milliseconds of the forward alone, as in inference."""

    def forward(qkv: Tensor) -> Tensor:
        with torch.no_grad():
            return attention(*qkv.unbind(1))

    return clock.median([lambda x=x: forward(x) for x in sets])


def both_ms(clock: Clock, attention: Attention, sets: list[Tensor], gains: Sequence[Tensor]) -> float:
    """Milliseconds of forward + backward, for the gradients of qkv and of the gains."""
    grads = [torch.randn_like(qkv[:, 0]) for qkv in sets]

    def both(qkv: Tensor, grad: Tensor) -> object:
        return torch.autograd.grad(attention(*qkv.unbind(1)), [qkv, *gains], grad)

    return clock.median([lambda x=x, g=g: both(x, g) for x, g in zip(sets, grads, strict=True)])


class AttentionTable:
    """Lines of the table as they are measured; the verdicts over all of them come last."""

    def __init__(self, clock: Clock, scale: Scale, top: Ceiling) -> None:
        self.clock, self.scale, self.top = clock, scale, top
        # Best times so far: by shape and norm, then by name, (forward, backward).
        self.found: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}

    def head(self) -> Iterator[str]:
        yield (
            "| shape | norm | attention | norm and rotation | forward ms | forward + backward ms "
            "| TFLOP/s forward, both | of the ceiling |"
        )
        yield "|---|---|---|---|---|---|---|---|"

    def measure(self, peers: dict[str, Make], *, own: bool, reserve: float) -> Iterator[str]:
        """Every shape with these peers, and with ours; reserve: seconds that are to be left for what comes after."""
        device = self.clock.device
        for shape, lengths in self.scale.shapes.items():
            sets, rotary, starts = inputs(lengths, device)
            gains = make_gains(device)
            if own:
                for norm in (None, gains):
                    yield self._line(shape, lengths, "ours", "inside", norm, ours(starts, rotary, norm), sets)
            for name, make in peers.items():
                if self.clock.left() < reserve:
                    yield f"| {shape} | | {name} | left out: no time | | | | |"
                    continue
                try:
                    peer = make(starts, device)
                except Exception as error:  # a peer that is not there is a line of the report
                    yield f"| {shape} | | {name} | {short(error)} | | | | |"
                    continue
                for norm in (None, gains):
                    for fused in (True, False) if device.type == "cuda" else (False,):
                        label = "Triton pass" if fused else "plain torch"
                        prepared = with_preparation(peer, rotary, norm, fused=fused)
                        yield self._line(shape, lengths, name, label, norm, prepared, sets)

    def _line(
        self,
        shape: str,
        lengths: list[int],
        name: str,
        label: str,
        gains: Gains | None,
        attention: Attention,
        sets: list[Tensor],
    ) -> str:
        norm = "none" if gains is None else "QK norm"
        begin = f"| {shape} | {norm} | {name} | {label} |"
        try:
            alone = forward_ms(self.clock, attention, sets)
            both = both_ms(self.clock, attention, sets, gains or ())
        except Exception as error:
            mark = f"{FAILED} " if name == "ours" else ""
            return f"{begin} {mark}{short(error)} | | | |"
        best = self.found.setdefault((shape, norm), {})
        before = best.get(name, (float("inf"), float("inf")))
        best[name] = min(before[0], alone), min(before[1], both - alone)
        flop = 4 * HEADS * WIDTH * sum(length**2 for length in lengths)
        rate, whole = flop / alone / 1e9, (1 + BACKWARD) * flop / both / 1e9
        return f"{begin} {alone:.3f} | {both:.3f} | {rate:.0f}, {whole:.0f} | {rate / self.top.tflops:.2f} |"

    def verdicts(self) -> Iterator[str]:
        """Ours against the best peer, in its best form."""
        yield "| shape | norm | forward against the best peer | backward against the best peer |"
        yield "|---|---|---|---|"
        for (shape, norm), best in self.found.items():
            own, peers = best.get("ours"), {name: times for name, times in best.items() if name != "ours"}
            if own is None or not peers:
                yield f"| {shape} | {norm} | no peer ran | |"
                continue
            cells = []
            for direction in (0, 1):
                name = min(peers, key=lambda peer: peers[peer][direction])
                cells.append(f"{peers[name][direction] / own[direction]:.2f} x ({name})")
            yield f"| {shape} | {norm} | {cells[0]} | {cells[1]} |"


def search(clock: Clock, scale: Scale) -> Iterator[str]:
    """Other tiles for head width 72 in bfloat16 than the table's. It changes nothing: who reads it edits tiles.py."""
    from model.kernels import launch, tiles

    arch = launch.device_arch(clock.device)
    yield "| kernel | tile | (a) ms | (b) ms | |"
    yield "|---|---|---|---|---|"
    shapes = [inputs(lengths, clock.device, sets=1) for lengths in list(scale.shapes.values())[:2]]
    lookup, split = launch.lookup, launch.split_width
    sizes = [(128, 64, 8, 2), (128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 2)]
    sizes += [(64, 32, 4, 2), (64, 128, 8, 2), (128, 64, 4, 2)]
    for direction in ("forward", "keys", "queries"):
        used = lookup(arch, WIDTH, torch.bfloat16, direction)
        forms = [(False, False)]
        if direction == "forward":  # what saves most registers first
            forms = [(False, True)] * (arch >= 90) + forms + [(True, False)]
        candidates = [(used, False), (used, True)]
        candidates += [(tile, False) for form in forms for size in sizes if (tile := tiles.Tile(*size, *form)) != used]
        rows: list[tuple[float, str]] = []
        stop = clock.left() - SEARCH_S
        for done, (tile, padded) in enumerate(candidates):
            if clock.left() < stop or clock.left() < 10:
                yield f"| {direction} | {len(candidates) - done} tiles not tried: no time | | | |"
                break
            launch.lookup = lambda *given, t=tile, wanted=direction: t if given[3] == wanted else lookup(*given)
            launch.split_width = (lambda _: (128, 0)) if padded else split
            note = "in the table" if tile == used else ""
            note = "the same, head padded to 128 instead of 64 + 16" if padded else note
            try:
                times = list(_times(clock, shapes, backward=direction != "forward"))
            except Exception as error:  # too much shared memory, most often
                rows.append((float("inf"), f"| {direction} | {tile} | {short(error)} | | {note} |"))
                continue
            finally:
                launch.lookup, launch.split_width = lookup, split
            rows.append((sum(times), f"| {direction} | {tile} | {times[0]:.3f} | {times[1]:.3f} | {note} |"))
        best = [line for _, line in sorted(rows)[:6]]
        yield from best
        yield from (line for _, line in rows[:2] if line not in best)


def _times(
    clock: Clock, shapes: Iterable[tuple[list[Tensor], Tensor, list[int]]], *, backward: bool
) -> Iterator[float]:
    for sets, rotary, starts in shapes:
        attention: Callable[[Tensor, Tensor, Tensor], Tensor] = ours(starts, rotary, None)
        yield both_ms(clock, attention, sets, ()) if backward else forward_ms(clock, attention, sets)
