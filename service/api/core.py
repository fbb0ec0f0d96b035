"""What the routes share: settings, the queue, the decoder children, the models and the metrics of one API process."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from typing import cast

from starlette.requests import Request

from media.pool import MediaPool
from service.api.load import QueueLoad
from service.api.models import ModelDirectory
from service.queue.client import QueueClient
from service.settings import Settings
from service.telemetry import Telemetry


@dataclass(kw_only=True)
class Service:
    """The running parts of one application.

    draining: readiness says no, everything is still served. stopping: set when even requests in flight have to end.
    children: a place for each decoder child: a request waits for one up to its deadline instead of being refused.
    """

    settings: Settings
    telemetry: Telemetry
    queue: QueueClient
    media: MediaPool
    models: ModelDirectory
    load: QueueLoad
    children: asyncio.Semaphore
    draining: bool = False
    stopping: asyncio.Event = field(default_factory=asyncio.Event)


def media_workers(settings: Settings) -> int:
    """Return the number of decoder children: as set, or as many as this process may use cores."""
    return settings.media_workers or len(os.sched_getaffinity(0))


def service_of(request: Request) -> Service:
    """Return the running parts behind a request."""
    return cast(Service, request.app.state.service)
