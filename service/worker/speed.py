"""How fast this worker runs each of its models, encoder and decoder apart: what admission reckons with."""

from __future__ import annotations

from statistics import median

from service.queue.estimate import Direction, Rates


class Speed:
    """Effort a second of the busy model, by pool and direction: the median of the last passes of at least large_tokens.

    Small passes say nothing about how fast a queue drains, since queued jobs make large ones. A median, so that one
    pass during which the process was held up does not make the next long items look hopeless.
    """

    KEEP = 9

    def __init__(self, large_tokens: int) -> None:
        self.large_tokens = large_tokens
        self._last: dict[tuple[str, Direction], tuple[float, ...]] = {}

    def add(self, pool: str, direction: Direction, effort: int, seconds: float) -> None:
        """Count one pass. The model's thread calls it while the loop reads: tuples are replaced, never changed."""
        if effort >= self.large_tokens and seconds > 0:
            key = pool, direction
            self._last[key] = (*self._last.get(key, ()), effort / seconds)[-self.KEEP :]

    def rates(self, pool: str) -> Rates:
        """What was measured; 0 before the first pass."""
        return Rates(encode=self._median(pool, "encode"), decode=self._median(pool, "decode"))

    def _median(self, pool: str, direction: Direction) -> float:
        rates = self._last.get((pool, direction))
        return median(rates) if rates else 0.0
