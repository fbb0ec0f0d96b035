"""Which model answers a request: the live workers' cards, and a choice that is explained when there is none."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict

from service.errors import Problem
from service.queue.estimate import effort_of
from service.settings import Settings

CARDS_LIFE_S = 1.0
NO_WORKER_RETRY_S = 10.0


class Card(BaseModel):
    """What a worker says about one of its models. Further members are passed on to /v1/models as they are."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    name: str
    revision: str
    outputs: list[str]
    kinds: list[str]
    latent_channels: int
    codebooks: int = 0
    codebook_size: int = 4096
    embedding_dim: int = 0
    text: bool = False
    """Whether it embeds texts, too."""
    max_item_tokens: int | None = None
    attention_tokens: int | None = None
    window: int | None = None
    gaussian_decoder: dict[str, Any] | None = None

    def effort(self, tokens: int, steps: int) -> int:
        """What an item counts in estimates of time. steps: latent frames of a clip; 1 or 0 of anything else."""
        return effort_of(tokens, self.attention_tokens, steps, self.window)

    @property
    def splats_note(self) -> str:
        """One line of what to know of 3D that comes back through the Gaussian decoder; empty: nothing."""
        about = self.gaussian_decoder or {}
        note = " ".join(str(about.get("note") or "").split())
        return f"3D comes back through {about.get('name')}: {note}" if note else ""

    @property
    def pool(self) -> str:
        """Name of the queue of this model's workers."""
        return f"{self.name}@{self.revision[:12]}"


class CardSource(Protocol):
    """The part of the queue that knows the workers."""

    async def models(self) -> list[dict[str, Any]]:
        """Return the cards of the live, ready workers."""
        ...


class ModelDirectory:
    """The cards, read from the queue at most once a second however many requests ask."""

    def __init__(self, source: CardSource, settings: Settings) -> None:
        self._source = source
        self._settings = settings
        self._cards: list[Card] = []
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()

    async def cards(self) -> list[Card]:
        """Return the live models, the default one first. Raises QueueUnavailable."""
        async with self._reading:
            # None are never remembered: who waits for the first worker should not wait longer than it takes.
            if not self._cards or time.monotonic() - self._read_at > CARDS_LIFE_S:
                cards = [Card.model_validate(card) for card in await self._source.models()]
                cards.sort(key=lambda card: (card.name != self._settings.default_model, card.name))
                self._cards, self._read_at = cards, time.monotonic()
            return self._cards

    async def named(self, name: str) -> Card:
        """Return the live model of a name. Raises Problem model_not_found or no_worker, QueueUnavailable."""
        cards = await self.cards()
        for card in cards:
            if card.name == name:
                return card
        if name in self._settings.models or not cards:
            raise _no_worker(f"no live worker has the model `{name[:100]}`")
        raise Problem("model_not_found", f"there is no model `{name[:100]}`; {_list_names(cards)}")

    async def for_outputs(self, name: str | None, outputs: Sequence[str], *, text: bool = False) -> Card:
        """Return the named model, or the first that offers all outputs; text: and that takes texts.

        Raises Problem unsupported_output (which model offers what), model_not_found or no_worker, QueueUnavailable.
        """
        candidates = [await self.named(name)] if name is not None else await self.cards()
        if not candidates:
            raise _no_worker("no live worker has a model")
        able = [card for card in candidates if set(outputs) <= set(card.outputs)]
        for card in able:
            if card.text or not text:
                return card
        if able:
            raise _no_text(name, await self.cards())
        everything = await self.cards()
        who = f"`{name}` does not offer" if name is not None else "no model offers"
        offers = "; ".join(f"`{card.name}` offers {', '.join(card.outputs)}" for card in everything)
        raise Problem(
            "unsupported_output",
            f"{who} {' with '.join(outputs)}; {offers}",
            extra={"models": {card.name: card.outputs for card in everything}},
        )


def _list_names(cards: Iterable[Card]) -> str:
    return f"there are {', '.join(f'`{card.name}`' for card in cards)}"


def _no_text(name: str | None, cards: Sequence[Card]) -> Problem:
    who = f"`{name}` takes no text" if name is not None else "no model here takes text"
    others = ", ".join(f"`{card.name}`" for card in cards if card.text)
    return Problem("unsupported_output", f"{who}; {f'text goes to {others}' if others else 'the bundled models do'}")


def _no_worker(detail: str) -> Problem:
    return Problem("no_worker", detail, retry_after=NO_WORKER_RETRY_S)
