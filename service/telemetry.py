"""JSON logs and Prometheus metrics of the API process. Labels are closed sets; ids and names never become labels."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from service.queue.estimate import Load

# Source of names and buckets: serving.md section 5.
REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
STAGE_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
SIZE_BYTES = (1e3, 1e4, 1e5, 1e6, 1e7, 6.4e7)


def configure_logging(level: str = "info", stream: Any = None) -> None:
    """Send structlog and the standard library's logging to one stream (stderr by default), a JSON object a line.

    level: debug, info, warning or error.
    """
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Uvicorn brings its own handlers and an access log; ours has the request's one line.
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every readiness probe of our own


class QueueCollector(Collector):
    """Gauges of the queue, taken from Redis at scrape time so that they cannot drift from what is there.

    `stats` is set just before a scrape: the load by pool.
    """

    def __init__(self) -> None:
        self.stats: Mapping[str, Load] = {}

    def collect(self) -> Iterable[Metric]:
        """Yield the gauges of the last snapshot."""
        for key, name, text in (
            ("tokens", "atoken_queue_tokens", "Tokens queued or running"),
            ("bytes", "atoken_queue_bytes", "Input bytes queued or running"),
            ("items", "atoken_queue_items", "Jobs queued or running"),
            ("oldest_s", "atoken_queue_oldest_age_seconds", "Age of the oldest open job"),
            ("wait_s", "atoken_queue_wait_seconds", "Time the ready workers need for all of it, at measured speed"),
            ("workers", "atoken_workers_ready", "Live, ready workers"),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["pool"])
            for pool, load in self.stats.items():
                gauge.add_metric([pool], float(getattr(load, key)))
            yield gauge
        speed = GaugeMetricFamily(
            "atoken_workers_tokens_per_second",
            "What the ready workers do together, as measured, as of pictures of 256 x 256; embed counts as encode",
            labels=["pool", "op"],
        )
        for pool, load in self.stats.items():
            speed.add_metric([pool, "encode"], load.rates.encode)
            speed.add_metric([pool, "decode"], load.rates.decode)
        yield speed


class Telemetry:
    """The metrics of one API process, in a registry of its own: two applications in a process do not collide."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.queue = QueueCollector()
        registry.register(self.queue)
        self.requests = Counter(
            "atoken_http_requests", "Requests answered", ["op", "status", "code"], registry=registry
        )
        self.request_seconds = Histogram(
            "atoken_http_request_duration_seconds",
            "From the request line to the last byte of the answer",
            ["op", "status"],
            buckets=REQUEST_SECONDS,
            registry=registry,
        )
        self.request_bytes = Histogram(
            "atoken_http_request_size_bytes", "Bytes of the body", ["op"], buckets=SIZE_BYTES, registry=registry
        )
        self.response_bytes = Histogram(
            "atoken_http_response_size_bytes", "Bytes of the answer", ["op"], buckets=SIZE_BYTES, registry=registry
        )
        self.stage_seconds = Histogram(
            "atoken_stage_duration_seconds", "Time by stage", ["stage"], buckets=STAGE_SECONDS, registry=registry
        )
        self.items = Counter("atoken_items", "Items by result", ["op", "kind", "result"], registry=registry)
        self.tokens = Counter("atoken_tokens", "Tokens of good items", ["op", "kind"], registry=registry)
        self.rejected = Counter("atoken_rejected", "Requests or items refused", ["reason"], registry=registry)
        self.in_flight = Gauge("atoken_http_in_flight", "Requests being worked on", registry=registry)
        self.decode_exits = Counter("atoken_decode_child_exits", "Decodes by outcome", ["reason"], registry=registry)
        self.redis_errors = Counter("atoken_redis_errors", "Failed calls of the queue", registry=registry)
        build = Gauge("atoken_build_info", "Always 1", ["version"], registry=registry)
        build.labels(package_version()).set(1)


def package_version() -> str:
    """Return the installed version, or "unknown" when the package runs from a plain checkout."""
    try:
        return version("atoken-serve")
    except PackageNotFoundError:
        return "unknown"
