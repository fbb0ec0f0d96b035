"""What a client and an operator ask about the service itself: models, limits, health, metrics, documentation."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import orjson
from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from media.sniff import IMAGE_FORMATS, VIDEO_FORMATS
from service.api import pages
from service.api.core import Service, service_of
from service.errors import CODES, Problem, as_problem
from service.queue.jobs import QueueUnavailable
from service.telemetry import package_version

versioned = APIRouter()
router = APIRouter()

# Source: serving.md section 5.
PING_LIMIT_S = 1.0
SLOW_PING_MS = 200.0


@versioned.get("/models")
async def models(request: Request) -> Response:
    """List the models of the live workers, the default one first."""
    service = service_of(request)
    cards = await service.models.cards()
    data = [
        {**card.model_dump(mode="json"), "object": "model", "default": position == 0}
        for position, card in enumerate(cards)
    ]
    return json_response({"object": "list", "data": data})


@versioned.get("/limits")
async def limits(request: Request) -> Response:
    """State every limit in force, and the formats on offer, so that a client can check before it sends."""
    settings = service_of(request).settings
    return json_response(settings.public() | {"formats": {"image": list(IMAGE_FORMATS), "video": list(VIDEO_FORMATS)}})


@router.get("/", include_in_schema=False)
async def root() -> Response:
    """Lead whoever opens the bare address to the documentation."""
    return RedirectResponse("/docs", 307)


@router.get("/health/live")
@router.head("/health/live", include_in_schema=False)
async def live() -> Response:
    """Say that this process answers."""
    return json_response({"status": "live"})


@router.get("/health/ready")
@router.head("/health/ready", include_in_schema=False)
async def ready(request: Request) -> Response:
    """Say whether a request would be served: queue reachable, a worker ready, not stopping."""
    service = service_of(request)
    if service.draining:
        raise Problem("shutting_down", "the service is stopping", retry_after=1.0)
    await _ping(service)
    if not await service.models.cards():
        raise Problem("no_worker", "no live worker has a model", retry_after=2.0)
    return json_response({"status": "ready"})


@router.get("/health")
async def health(request: Request) -> Response:
    """Describe the state in detail; always 200."""
    service = service_of(request)
    status = "ready"
    checks: dict[str, dict[str, Any]] = {}
    try:
        milliseconds = await _ping(service)
        checks["queue"] = {"ok": True, "ping_ms": round(milliseconds, 2)}
        workers = await service.queue.workers()
        checks["workers"] = {
            "ok": any(worker.ready for worker in workers),
            "workers": [
                {
                    "pool": worker.pool,
                    "ready": worker.ready,
                    "silent_s": round(worker.silent_s, 1),
                    "tokens_per_s": worker.rates.rounded(),
                }
                for worker in workers
            ],
        }
        if not checks["workers"]["ok"]:
            status = "no_worker"
        elif milliseconds > SLOW_PING_MS:
            status = "degraded"
    except (Problem, QueueUnavailable) as error:
        status = as_problem(error).code
        checks["queue"] = {"ok": False}
    if service.draining:
        status = "shutting_down"
    return json_response({"status": status, "version": package_version(), "checks": checks})


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Give the metrics of this process and of the queue in Prometheus' text format."""
    service = service_of(request)
    try:
        service.telemetry.queue.stats = await service.load.stats()
    except QueueUnavailable:
        service.telemetry.queue.stats = {}
        service.telemetry.redis_errors.inc()
    return Response(generate_latest(service.telemetry.registry), headers={"content-type": CONTENT_TYPE_LATEST})


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """Show the documentation."""
    return HTMLResponse(pages.docs_page(request.app.openapi(), str(request.base_url).rstrip("/")))


@router.get("/errors/{code}", include_in_schema=False)
async def error_page(code: str) -> Response:
    """Explain one error code."""
    if code not in CODES:
        raise Problem("not_found", f"there is no error code of this name; there are {', '.join(CODES)}")
    return HTMLResponse(pages.error_page(code, CODES[code]))


def json_response(content: Any) -> Response:
    """Return a JSON answer."""
    return Response(orjson.dumps(content), media_type="application/json")


async def _ping(service: Service) -> float:
    """Return the milliseconds that the queue takes to answer. Raises QueueUnavailable or Problem queue_unavailable."""
    begun = time.perf_counter()
    try:
        async with asyncio.timeout(PING_LIMIT_S):
            await service.queue.ping()
    except TimeoutError:
        raise Problem(
            "queue_unavailable", f"the queue did not answer within {PING_LIMIT_S:g} s", retry_after=2.0
        ) from None
    return 1000.0 * (time.perf_counter() - begun)
