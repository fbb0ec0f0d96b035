"""The application: routes, middleware and error handlers around one set of running parts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from media.pool import MediaPool
from service.api import decode, embed, encode, ops
from service.api.core import Service, media_workers
from service.api.documents import build_openapi
from service.api.load import QueueLoad
from service.api.middleware import BodyMiddleware, RequestMiddleware
from service.api.models import ModelDirectory
from service.errors import Problem
from service.queue.client import QueueClient
from service.queue.jobs import QueueLimits
from service.settings import Settings
from service.telemetry import Telemetry, package_version

LARGEST_BATCH_TOKENS = 32_768
"""What a worker on a GPU packs by default; the API does not know on what its workers run."""

DESCRIPTION = "Images and videos to tokens and back: the AToken tokenizer as a service."


def create_app(settings: Settings) -> FastAPI:
    """Build the application. Its parts (queue client, decoder children) live from start-up to shutdown of the server.

    settings: redis_url must be set. Raises ValueError if it is not.
    """
    if settings.redis_url is None:
        raise ValueError("ATOKEN_REDIS_URL is not set: the API needs the address of a Redis or Valkey server")
    telemetry = Telemetry()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = build_service(settings, telemetry)
        await service.queue.start()
        app.state.service = service
        try:
            yield
        finally:
            service.draining = True
            await service.queue.close()
            await service.media.aclose()

    app = FastAPI(
        title="AToken Serve",
        version=package_version(),
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    for prefix in ("/v1", ""):
        for router in (encode.router, decode.router, embed.router, ops.versioned):
            app.include_router(router, prefix=prefix, include_in_schema=bool(prefix))
    app.include_router(ops.router)
    app.openapi = lambda: build_openapi(app)  # type: ignore[method-assign]
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    # The last one added is the outermost.
    app.add_middleware(BodyMiddleware, settings=settings)
    app.add_middleware(RequestMiddleware, settings=settings, telemetry=telemetry)
    return app


def build_service(settings: Settings, telemetry: Telemetry) -> Service:
    """Return the running parts of one application; the queue client is not started yet."""
    assert settings.redis_url is not None
    limits = QueueLimits(
        tokens=settings.queue_tokens or None,
        payload_bytes=settings.queue_bytes,
        items=settings.queue_items,
        floor_tokens=8 * (settings.batch_tokens or LARGEST_BATCH_TOKENS),
        lease_s=settings.lease_s,
    )
    queue = QueueClient(settings.redis_url, limits)
    workers = media_workers(settings)
    return Service(
        settings=settings,
        telemetry=telemetry,
        queue=queue,
        media=MediaPool(settings.media, workers),
        models=ModelDirectory(queue, settings),
        load=QueueLoad(queue, limits, max_timeout_s=settings.max_timeout_s),
        children=asyncio.Semaphore(workers),
    )


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Turn the framework's own refusals (404, 405) into problems; the middleware writes them."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        raise Problem(
            "method_not_allowed",
            f"this address takes {allowed or 'other methods'}, not {request.method}",
            headers={"Allow": allowed},
        )
    if error.status_code == 404:
        raise Problem("not_found", "there is nothing at this address; /docs lists what there is")
    raise Problem("invalid_parameter", "the request is not valid")


async def _on_validation_error(request: Request, error: Exception) -> Response:
    """Turn the framework's validation errors into problems, without repeating what was sent."""
    assert isinstance(error, RequestValidationError)
    fields = ", ".join(sorted({".".join(str(step) for step in entry["loc"]) for entry in error.errors()}))
    raise Problem("invalid_parameter", f"not valid: {fields[:500]}")
