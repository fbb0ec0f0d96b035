"""Which format an answer gets: the Accept header against what a result can be given as (RFC 9110 section 12.5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.errors import Problem

JSON = "application/json"
SAFETENSORS = "application/vnd.safetensors"
NPY = "application/x-npy"
NPZ = "application/x-npz"
PNG = "image/png"
WEBP = "image/webp"
JPEG = "image/jpeg"
MP4 = "video/mp4"
MKV = "video/x-matroska"
MULTIPART = "multipart/mixed"
PLY = "model/ply"
BYTES = "application/octet-stream"
"""Of Gaussians: the compact formats, which have no type of their own. Elsewhere it asks for safetensors."""

# No type is registered for safetensors; these are in use. Source: serving.md section 4.2.
ALIASES = {
    "application/x-safetensors": SAFETENSORS,
    "application/safetensors": SAFETENSORS,
    BYTES: SAFETENSORS,
    "application/npy": NPY,
    "application/npz": NPZ,
    "image/jpg": JPEG,
    "video/matroska": MKV,
}


@dataclass(frozen=True)
class MediaRange:
    """One entry of an Accept header: type and subtype in lower case ("*" for any), quality 0..1."""

    type: str
    subtype: str
    quality: float

    @property
    def specificity(self) -> int:
        """0 for */*, 1 for type/*, 2 for an exact type."""
        return (self.type != "*") + (self.subtype != "*")

    def matches(self, media_type: str) -> bool:
        """Whether the range covers a concrete type, or names it by an alias."""
        kind, _, sub = media_type.partition("/")
        if self.type in ("*", kind) and self.subtype in ("*", sub):
            return True
        return ALIASES.get(f"{self.type}/{self.subtype}") == media_type


def parse_accept(header: str | None) -> list[MediaRange]:
    """Parse an Accept header; a missing or empty one means */*. Raises Problem invalid_header."""
    if header is None or not header.strip():
        return [MediaRange("*", "*", 1.0)]
    ranges = []
    for entry in header.split(","):
        if not entry.strip():
            continue
        name, *parameters = (piece.strip() for piece in entry.split(";"))
        name = name.lower()
        kind, slash, sub = name.partition("/")
        if not slash or not kind or not sub or (kind == "*" and sub != "*"):
            raise Problem("invalid_header", "the Accept header has an entry that is not of the form type/subtype")
        quality = 1.0
        for parameter in parameters:
            key, _, value = parameter.partition("=")
            if key.strip().lower() == "q":
                quality = _parse_quality(value.strip())
        ranges.append(MediaRange(kind, sub, quality))
    return ranges


def choose(header: str | None, offers: Sequence[str], *, result: str, why: str = "") -> str:
    """Return the best offer for an Accept header; the order of offers breaks ties, so the first is the default.

    result: what is answered, in words for the error; why: why there are no other offers.
    Raises Problem not_acceptable (with the offers) or invalid_header.
    """
    ranges = parse_accept(header)
    best, best_quality = None, 0.0
    for offer in offers:
        matching = [entry for entry in ranges if entry.matches(offer)]
        if not matching:
            continue
        # The most specific range decides, so that "image/png;q=0, */*" excludes PNG.
        quality = max(matching, key=lambda entry: entry.specificity).quality
        if quality > best_quality:
            best, best_quality = offer, quality
    if best is None:
        raise Problem(
            "not_acceptable",
            f"{result} can be given as {', '.join(offers)}; the Accept header takes none of these{why and f': {why}'}",
            extra={"available": list(offers)},
        )
    return best


def _parse_quality(text: str) -> float:
    try:
        quality = float(text)
    except ValueError:
        quality = -1.0
    if not 0.0 <= quality <= 1.0:
        raise Problem("invalid_header", "a quality in the Accept header is not a number in 0..1")
    return quality
