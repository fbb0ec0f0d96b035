"""How long work takes: tokens by what the model does with them, over the speed that the workers measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Direction = Literal["encode", "decode"]

MARGIN = 1.5
"""A job is taken as too slow for its deadline only if it would still be with its estimate divided by this."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """Tokens that the encoder and the decoder have to pass; those of a reconstruction count for both."""

    encode: int = 0
    decode: int = 0

    @classmethod
    def of(cls, op: str, options: dict[str, Any], tokens: int) -> "Work":
        """What a job asks of the model: embedding takes the encoder, a reconstruction both halves."""
        if op == "decode":
            return cls(decode=tokens)
        return cls(encode=tokens, decode=tokens if "reconstruction" in (options.get("outputs") or ()) else 0)

    @property
    def tokens(self) -> int:
        """Each token once, for work of one operation."""
        return max(self.encode, self.decode)

    def __add__(self, other: "Work") -> "Work":
        return Work(encode=self.encode + other.encode, decode=self.decode + other.decode)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Tokens a second of the encoder and of the decoder; 0 where nothing was measured yet."""

    encode: float = 0.0
    decode: float = 0.0

    def __add__(self, other: "Rates") -> "Rates":
        return Rates(encode=self.encode + other.encode, decode=self.decode + other.decode)

    def rounded(self) -> dict[Direction, int]:
        """For people: whole tokens a second by direction."""
        return {"encode": round(self.encode), "decode": round(self.decode)}

    def seconds(self, work: Work) -> float:
        """How long the work takes. What has no measured speed counts as nothing: no guess refuses anybody."""
        pairs = ((work.encode, self.encode), (work.decode, self.decode))
        return sum(tokens / rate for tokens, rate in pairs if rate > 0)


@dataclass(frozen=True, kw_only=True)
class Load:
    """One pool: jobs queued or running, and its ready workers.

    tokens, bytes, items: what is open; work: the same tokens by direction. oldest_s: age of the oldest open job.
    workers: how many are ready; rates: what they do together; fastest: the best rate of any one, for a single job.
    """

    tokens: int = 0
    bytes: int = 0
    items: int = 0
    work: Work = Work()
    oldest_s: float = 0.0
    workers: int = 0
    rates: Rates = Rates()
    fastest: Rates = Rates()

    @property
    def wait_s(self) -> float:
        """Seconds until all that is open is done, as far as speeds are known."""
        return self.rates.seconds(self.work)


def fastest(rates: Sequence[Rates]) -> Rates:
    """The best rate of any worker for each direction."""
    return Rates(
        encode=max((each.encode for each in rates), default=0.0),
        decode=max((each.decode for each in rates), default=0.0),
    )
