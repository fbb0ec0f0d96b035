"""How long work takes: tokens by what the model does with them, over the speed that the workers measured.

All tokens of a picture or asset attend to each other, those of a clip within a window, so that one item of many tokens
takes longer than many of few. Times are therefore reckoned in effort: how many tokens of pictures of 256 x 256 would
take as long.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Direction = Literal["encode", "decode"]

MARGIN = 1.5
"""A job is taken as too slow for its deadline only if it would still be with its estimate divided by this."""

PICTURE_TOKENS = 256
"""Of the item of which effort and tokens are the same number."""


def effort_of(tokens: int, attention_tokens: int | None, steps: int = 1, window: int | None = None) -> int:
    """Effort of one item, whose tokens lie in windows of about the same size.

    attention_tokens: see StackConfig; None: attention counts as nothing, effort is tokens. steps: latent frames of a
    clip, 1 or 0 of anything else; window: of so many of them, None for one of all.
    """
    if not attention_tokens:
        return tokens
    windows = max(1, -(-steps // window)) if window else 1
    share = (attention_tokens + tokens / windows) / (attention_tokens + PICTURE_TOKENS)
    return max(1, round(tokens * share))


@dataclass(frozen=True, kw_only=True)
class Work:
    """Effort of the encoder and of the decoder; that of a reconstruction counts for both."""

    encode: int = 0
    decode: int = 0

    @classmethod
    def of(cls, op: str, options: dict[str, Any], effort: int) -> "Work":
        """What a job asks of the model: embedding takes the encoder, a reconstruction both halves."""
        if op == "decode":
            return cls(decode=effort)
        return cls(encode=effort, decode=effort if "reconstruction" in (options.get("outputs") or ()) else 0)

    def __add__(self, other: "Work") -> "Work":
        return Work(encode=self.encode + other.encode, decode=self.decode + other.decode)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Effort a second of the encoder and of the decoder; 0 where nothing was measured yet."""

    encode: float = 0.0
    decode: float = 0.0

    def __add__(self, other: "Rates") -> "Rates":
        return Rates(encode=self.encode + other.encode, decode=self.decode + other.decode)

    def rounded(self) -> dict[Direction, int]:
        """For people: whole tokens a second by direction, as of pictures of 256 x 256."""
        return {"encode": round(self.encode), "decode": round(self.decode)}

    def seconds(self, work: Work) -> float:
        """How long the work takes. What has no measured speed counts as nothing: no guess refuses anybody."""
        pairs = ((work.encode, self.encode), (work.decode, self.decode))
        return sum(effort / rate for effort, rate in pairs if rate > 0)


@dataclass(frozen=True, kw_only=True)
class Load:
    """One pool: jobs queued or running, and its ready workers.

    tokens, bytes, items: what is open; work: its effort by direction. oldest_s: age of the oldest open job.
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
