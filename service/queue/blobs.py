"""Payloads in pieces: one large SET or GET would make everybody else wait for it."""

from collections.abc import Sequence
from typing import TypeAlias

from redis.asyncio import Redis

Buffer: TypeAlias = bytes | bytearray | memoryview

# Exactly 4 MiB would fall into the allocator's next size class and cost 5 MiB. Source: serving design, section 3.3.
PIECE_BYTES = (4 << 20) - 64
# Up to here an answer travels inside its stream entry, which saves it four round trips: the float32 latents of a
# 512x256 picture fit. A reader takes 64 entries at a time, 8 MB at most.
INLINE_BYTES = 128 << 10


def count(payload_bytes: int) -> int:
    """Return how many pieces a payload of that many bytes has. None at all for an empty one."""
    return -(-payload_bytes // PIECE_BYTES)


def split(payload: Buffer) -> list[memoryview]:
    """Cut a payload into pieces, without a copy."""
    view = memoryview(payload).cast("B")
    return [view[start : start + PIECE_BYTES] for start in range(0, len(view), PIECE_BYTES)]


async def put(client: Redis, keys: Sequence[str], payload: Buffer, ttl_ms: int) -> None:
    """Store a payload under its keys. Raises what redis-py raises, OutOfMemoryError too; some pieces may then exist."""
    for key, piece in zip(keys, split(payload), strict=True):
        await client.set(key, piece, px=ttl_ms)


async def get(client: Redis, keys: Sequence[str]) -> bytes | None:
    """Return the payload under its keys, or None if any piece is gone."""
    pieces: list[bytes] = []
    for key in keys:
        piece = await client.get(key)
        if not isinstance(piece, bytes):
            return None
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


async def delete(client: Redis, keys: Sequence[str]) -> None:
    """Forget a payload."""
    if keys:
        await client.unlink(*keys)
