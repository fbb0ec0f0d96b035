"""Two pure ASGI layers around every route: the record of the request with a net under all faults, the body's bounds."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import orjson
import structlog
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.record import Record
from service.errors import PROBLEM_JSON, Problem, as_problem
from service.settings import Settings
from service.telemetry import Telemetry

log = structlog.get_logger("atoken.request")

SLOW_UPLOAD_WINDOW_S = 10.0
PIECE_BYTES = 256 * 1024
"""Of an answer; the server holds back a piece until the client has taken most of those before."""
LINGER_S = 2.0
LINGER_BYTES = 256 * 1024 * 1024


class RequestMiddleware:
    """Outermost layer: request id, common headers, one log line, metrics; no exception passes it.

    Also refuses operations above the number in flight, and requests with too many or too large headers, before
    anything is read.
    """

    def __init__(self, app: ASGIApp, settings: Settings, telemetry: Telemetry) -> None:
        self.app = app
        self.settings = settings
        self.telemetry = telemetry
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record, headers = Record.of(scope), Headers(scope=scope)
        scope["state"] = {**scope.get("state", {}), "record": record}
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                record.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *record.headers()]}
            elif message["type"] == "http.response.body" and len(message.get("body", b"")) > PIECE_BYTES:
                await self._send_in_pieces(message, record, send)
                return
            record.response_bytes += len(message.get("body", b""))
            await send(message)

        try:
            self._check_headers(headers)
            with self._in_flight(record):
                await self.app(scope, receive, answer)
        except ClientDisconnect:
            record.status, record.code = 499, "client_closed"
        except Exception as error:
            problem = as_problem(error)
            if problem.code == "internal":
                log.error("unexpected fault", request_id=record.request_id, exc_info=error)
            if started:
                raise  # too late for another answer; the server closes the connection
            await _send_problem(problem, record, answer, receive if _has_unread_body(headers, record) else None)
        finally:
            self._tell(record, scope)

    async def _send_in_pieces(self, message: Message, record: Record, send: Send) -> None:
        """Send a large body as the client takes it: it stays in flight until then. Raises ClientDisconnect."""
        body, more = message["body"], message.get("more_body", False)
        for start in range(0, len(body), PIECE_BYTES):
            stop = min(start + PIECE_BYTES, len(body))
            try:
                async with asyncio.timeout(self.settings.answer_stall_s):
                    await send({**message, "body": body[start:stop], "more_body": more or stop < len(body)})
            except TimeoutError:
                log.warning("answer_not_taken", request_id=record.request_id, sent=start, bytes=len(body))
                raise ClientDisconnect from None
            record.response_bytes += stop - start

    def _check_headers(self, headers: Headers) -> None:
        limit = self.settings.request_headers
        if len(headers) > limit:
            raise Problem("invalid_header", f"{len(headers)} headers; at most {limit} are allowed", limit=limit)
        size = sum(len(name) + len(value) + 4 for name, value in headers.raw)  # as sent: "name: value", line end
        if size > self.settings.header_bytes:
            raise Problem(
                "headers_too_large",
                f"the headers have {size} bytes together, at most {self.settings.header_bytes} are allowed",
                limit=self.settings.header_bytes,
                actual=size,
            )

    @contextmanager
    def _in_flight(self, record: Record) -> Iterator[None]:
        if record.op == "other":
            yield
            return
        limit = self.settings.in_flight
        if self.in_flight >= limit:
            detail = f"{limit} requests are being worked on; come back in a second"
            raise Problem("service_busy", detail, limit=limit, retry_after=1.0)
        self.in_flight += 1
        self.telemetry.in_flight.set(self.in_flight)
        try:
            yield
        finally:
            self.in_flight -= 1
            self.telemetry.in_flight.set(self.in_flight)

    def _tell(self, record: Record, scope: Scope) -> None:
        metrics = self.telemetry
        route = record.route or getattr(scope.get("route"), "path", "unknown")
        status = f"{record.status // 100}xx"
        metrics.requests.labels(record.op, status, record.code).inc()
        metrics.request_seconds.labels(record.op, status).observe(record.elapsed)
        if record.op != "other":
            metrics.request_bytes.labels(record.op).observe(record.request_bytes)
            metrics.response_bytes.labels(record.op).observe(record.response_bytes)
        if record.op != "other" and record.status in (413, 429, 503):
            metrics.rejected.labels(record.code).inc()
        for name, milliseconds in record.stages.items():
            metrics.stage_seconds.labels(name).observe(milliseconds / 1000.0)
        # Health checks and scrapes come every second, and a service that waits for its worker says no to many.
        quiet = record.op == "other" and (record.status < 400 or route.startswith("/health"))
        (log.debug if quiet else log.info)(
            "request",
            request_id=record.request_id,
            method=record.method,
            route=route,
            status=record.status,
            code=record.code or None,
            items=record.items,
            failed_items=record.failed_items,
            tokens=record.tokens,
            model=record.model,
            request_bytes=record.request_bytes,
            response_bytes=record.response_bytes,
            total_ms=round(1000.0 * record.elapsed, 1),
            **{f"{name}_ms": round(value, 1) for name, value in record.stages.items()},
        )


class BodyMiddleware:
    """Bounds of a request's body: no content coding, a size (announced, then counted) and a least speed.

    Source: serving.md section 6.6; neither the server nor the framework has these.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request with a guarded `receive`."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record: Record = scope["state"]["record"]
        self._check_headers(Headers(scope=scope))
        begun = time.monotonic()

        async def guarded() -> Message:
            if record.body_read:
                return await receive()  # what comes now is the news that the client left
            elapsed = time.monotonic() - begun
            message = await self._receive_in_time(receive, record.request_bytes, elapsed)
            if message["type"] == "http.request":
                record.request_bytes += len(message.get("body", b""))
                record.body_read = not message.get("more_body", False)
                if record.request_bytes > self.settings.body_bytes:
                    raise self._too_large(record.request_bytes)
            return message

        await self.app(scope, guarded, send)

    def _check_headers(self, headers: Headers) -> None:
        coding = headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            raise Problem("unsupported_media_type", "Content-Encoding is not offered; send the body as it is")
        length = headers.get("content-length")
        if length is not None:
            # The HTTP parser has refused what is not a number.
            announced = int(length)
            limit = self.settings.json_bytes if self._is_json(headers) else self.settings.body_bytes
            if announced > limit:
                raise self._too_large(announced, limit)

    async def _receive_in_time(self, receive: Receive, received: int, elapsed: float) -> Message:
        allowed = self.settings.upload_timeout_s - elapsed
        if self.settings.upload_bytes_per_s:
            # On average since the start, with a window's worth of credit.
            allowed = min(allowed, SLOW_UPLOAD_WINDOW_S + received / self.settings.upload_bytes_per_s - elapsed)
        try:
            async with asyncio.timeout(max(allowed, 0.0)):
                return await receive()
        except TimeoutError:
            raise Problem(
                "upload_timeout",
                f"{received} bytes arrived in {elapsed:.0f} s; an upload takes at most "
                f"{self.settings.upload_timeout_s:g} s and has at least {self.settings.upload_bytes_per_s} bytes/s",
            ) from None

    def _too_large(self, actual: int, limit: int | None = None) -> Problem:
        limit = self.settings.body_bytes if limit is None else limit
        return Problem(
            "body_too_large",
            f"the body has over {limit} bytes; send fewer or smaller items",
            limit=limit,
            actual=actual,
        )

    @staticmethod
    def _is_json(headers: Headers) -> bool:
        return headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"


async def _send_problem(problem: Problem, record: Record, send: Send, unread: Receive | None) -> None:
    """Send a problem document as the whole answer. unread: where the rest of a body comes from that nobody wants.

    A server that closes while its client still sends makes the client lose the answer. So the connection is kept for
    a moment, and closed then: whoever sends without end gets no more than that.
    """
    record.code = problem.code
    body = orjson.dumps(problem.document(record.request_id))
    headers = _problem_headers(problem, len(body))
    if unread is not None:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": unread is not None})
    if unread is not None:
        await _drain(unread)
        await send({"type": "http.response.body", "body": b""})


async def _drain(receive: Receive) -> None:
    received = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while received < LINGER_BYTES:
                message = await receive()
                received += len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return


def _has_unread_body(headers: Headers, record: Record) -> bool:
    announced = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
    return announced and not record.body_read


def _problem_headers(problem: Problem, length: int) -> list[tuple[bytes, bytes]]:
    """Return the headers of a problem document of `length` bytes."""
    headers: dict[str, Any] = {"content-type": PROBLEM_JSON, "content-length": str(length)} | problem.headers
    if problem.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(problem.retry_after)))
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
