"""What is known about one request while it is worked on; becomes its headers, its log line and its metrics."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast
from uuid import uuid4

from starlette.datastructures import Headers
from starlette.types import Scope

from service.errors import Problem

if TYPE_CHECKING:
    from service.settings import Settings

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
PREFER_WAIT = re.compile(r"(?:^|[,;])\s*wait\s*=\s*\"?(\d{1,9})\"?\s*(?=$|[,;])", re.IGNORECASE)
OPERATIONS = {f"{prefix}/{op}": op for op in ("encode", "decode", "embed") for prefix in ("", "/v1")}


@dataclass(kw_only=True)
class Record:
    """One request. op: encode, decode, embed or other. stages: milliseconds by name, in the order they ended.

    note: one line of what to know of the result's quality; empty: nothing.
    """

    request_id: str
    op: str
    method: str
    route: str
    started: float = field(default_factory=time.perf_counter)
    stages: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    items: int = 0
    failed_items: int = 0
    model: str | None = None
    revision: str | None = None
    note: str = ""
    status: int = 0
    code: str = ""
    request_bytes: int = 0
    body_read: bool = False
    response_bytes: int = 0

    @classmethod
    def of(cls, scope: Scope) -> Record:
        """Begin the record of a request; an id from the client is kept when it is well-formed."""
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid4().hex
        path = scope["path"]
        op = OPERATIONS.get(path, "other") if scope["method"] == "POST" else "other"
        return cls(request_id=request_id, op=op, method=scope["method"], route=op if op != "other" else "")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; the longest counts when items pass through it side by side."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.add_stage(name, 1000.0 * (time.perf_counter() - begun))

    def add_stage(self, name: str, milliseconds: float) -> None:
        """Take a stage's time that was measured elsewhere."""
        self.stages[name] = max(self.stages.get(name, 0.0), milliseconds)

    @property
    def elapsed(self) -> float:
        """Seconds since the request's headers were read."""
        return time.perf_counter() - self.started

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that every answer carries."""
        pairs = {
            "X-Request-Id": self.request_id,
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        }
        if self.stages:
            pairs["Server-Timing"] = ", ".join(f"{name};dur={value:.1f}" for name, value in self.stages.items())
        if self.tokens:
            pairs["Atoken-Tokens"] = str(self.tokens)
        if self.model and self.revision:
            pairs |= {"Atoken-Model": self.model, "Atoken-Revision": self.revision}
        if self.note:
            pairs["Atoken-Note"] = self.note
        return [(name.lower().encode("latin-1"), value.encode("latin-1", "replace")) for name, value in pairs.items()]


def record_of(scope: Scope) -> Record:
    """Return the record that the middleware began for a request."""
    return cast(Record, scope["state"]["record"])


def timeout_of(headers: Headers, settings: Settings) -> float:
    """Return the seconds that a request may take: `Request-Timeout`, else `Prefer: wait=N`, else the default; capped.

    Raises Problem invalid_header.
    """
    given = headers.get("request-timeout")
    if given is None:
        match = PREFER_WAIT.search(headers.get("prefer", ""))
        if match is None:
            return settings.request_timeout_s
        given = match[1]
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0.0 < seconds <= 1e9:
        raise Problem("invalid_header", "Request-Timeout is not a number of seconds above 0")
    return min(seconds, settings.max_timeout_s)
