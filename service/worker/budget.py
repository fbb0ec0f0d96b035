"""The token budget B of a batch: what the device takes, less for a while after it ran out of memory."""

from __future__ import annotations

import time

FLOOR_TOKENS = 256
"""A budget is never cut below this: a 256 x 256 image."""

RECOVERY_S = 60.0
"""Time after which a halved budget is tried in full again. Source: serving.md 3.5."""


class Budget:
    """tokens: B now. It halves with every shrink and is back at its full size RECOVERY_S after the last one."""

    def __init__(self, full: int, *, recovery_s: float = RECOVERY_S) -> None:
        self.full = full
        self._now = full
        self._recovery_s = recovery_s
        self._shrunk_at = 0.0

    @property
    def tokens(self) -> int:
        """Tokens that one batch may hold now."""
        if self._now < self.full and time.monotonic() - self._shrunk_at > self._recovery_s:
            self._now = self.full
        return self._now

    def shrink(self) -> bool:
        """Halve the budget; False when it is at its floor already."""
        if self.tokens <= FLOOR_TOKENS:
            return False
        self._now = max(FLOOR_TOKENS, self._now // 2)
        self._shrunk_at = time.monotonic()
        return True
