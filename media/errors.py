"""The one error of the media package: a stable code, its HTTP status, and what was given against what is allowed."""

from __future__ import annotations

from typing import TypeAlias

Detail: TypeAlias = int | float | str | None

STATUS: dict[str, int] = {
    # 413: more than the limits allow, known before any decoder runs.
    "item_too_large": 413,
    "too_many_items": 413,
    "too_many_tokens": 413,
    # 415: not one of the formats on offer.
    "unsupported_media_type": 415,
    "unsupported_codec": 415,
    "media_type_mismatch": 415,
    # 422: a format on offer, with content that cannot be used.
    "invalid_parameter": 422,
    "image_too_large": 422,
    "image_too_small": 422,
    "video_too_long": 422,
    "too_many_frames": 422,
    "corrupt_media": 422,
    "decode_limit": 422,
    "invalid_token_file": 422,
    "non_finite_input": 422,
    "invalid_camera": 422,
    "view_mismatch": 422,
    "empty_object": 422,
    # Ours, not the sender's.
    "media_busy": 429,
    "internal": 500,
    "shutting_down": 503,
}
"""Code -> HTTP status. Source: serving design, section 4.5."""


class MediaError(Exception):
    """Something about a media item that its sender has to know.

    code: a key of STATUS. detail: one sentence, without payload bytes, paths or tracebacks. limit, actual: the
    bound and the value that broke it, where the error is about a number. Can be pickled: it crosses processes.
    """

    def __init__(self, code: str, detail: str, *, limit: Detail = None, actual: Detail = None) -> None:
        if code not in STATUS:
            raise ValueError(f"unknown media error code {code!r}; known: {', '.join(STATUS)}")
        super().__init__(detail)
        self.code = code
        self.status = STATUS[code]
        self.detail = detail
        self.limit = limit
        self.actual = actual

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.code, self.detail, self.limit, self.actual)

    def __repr__(self) -> str:
        return f"MediaError({self.code!r}, {self.detail!r}, limit={self.limit!r}, actual={self.actual!r})"


def _rebuild(code: str, detail: str, limit: Detail, actual: Detail) -> MediaError:
    return MediaError(code, detail, limit=limit, actual=actual)
