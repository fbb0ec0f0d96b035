"""The one place that reads the environment: every knob of the API, the worker and the embedded deployment."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from media.limits import Limits

KIB = 1024
MIB = 1024 * KIB

PUBLIC = (
    *("body_bytes", "json_bytes", "json_values", "json_depth", "part_bytes", "header_bytes"),
    *("request_items", "request_parts", "request_headers", "request_timeout_s", "max_timeout_s"),
    *("upload_timeout_s", "upload_bytes_per_s", "in_flight", "queue_tokens", "queue_bytes", "queue_items"),
)
"""What a client may know."""


class Settings(BaseSettings):
    """Settings of one process; each field is the variable ATOKEN_<NAME>, a media limit is ATOKEN_MEDIA__<NAME>.

    Raises: pydantic.ValidationError that names the variable and what is allowed.
    Source of the limits: serving.md sections 3.8 and 4.7.
    """

    model_config = SettingsConfigDict(env_prefix="ATOKEN_", env_nested_delimiter="__", frozen=True, extra="forbid")

    # Where the service listens and where its queue is.
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    redis_url: str | None = None
    """None: the embedded deployment starts a private server and fills this in."""

    # Models and the device they run on.
    models: Annotated[list[str], NoDecode] = ["tiny-continuous", "tiny-discrete"]
    """Names of bundled models, or files or folders with weights; comma separated in the environment."""
    default_model: str = "tiny-continuous"
    gaussian_decoder: str = "tiny-splats"
    """What makes Gaussians of decoded voxels: the bundled one's name, or a weights file (ours or the published one);
    empty: none, voxels are answered as voxels."""
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_invariant: bool = False
    """Tokens and pixels bit for bit the same whatever shares the batch, for slower matrix products."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Arithmetic threads of a worker; 0: as many as there are cores."""
    batch_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens of one packed batch (the budget B); 0: by device and size of the model."""
    batch_items: Annotated[int, Field(ge=1)] = 64
    lease_s: Annotated[float, Field(gt=0)] = 15.0
    """A worker that is silent for this long loses its jobs to another."""
    watchdog_s: Annotated[float, Field(gt=0)] = 60.0
    """A worker ends itself when no layer of the model began for this long during a batch."""

    # What a request may take.
    request_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    max_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    body_bytes: Annotated[int, Field(ge=1 * KIB)] = 64 * MIB
    json_bytes: Annotated[int, Field(ge=1 * KIB)] = 32 * MIB
    json_values: Annotated[int, Field(ge=1)] = 2_000_000
    """Values in a JSON body; one item of 32,768 tokens as plain floats has 1.7 million."""
    json_depth: Annotated[int, Field(ge=4)] = 32
    part_bytes: Annotated[int, Field(ge=1 * KIB)] = 64 * KIB
    """A multipart part that is not a file."""
    request_items: Annotated[int, Field(ge=1)] = 64
    """Posed renders that come as parts of a form are one item; media.views bounds how many they are."""
    request_parts: Annotated[int, Field(ge=1)] = 80
    """Of a form; one with a file of cameras may have as many more as media.views needs."""
    request_headers: Annotated[int, Field(ge=16)] = 64
    header_bytes: Annotated[int, Field(ge=4 * KIB)] = 16 * KIB
    upload_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    upload_bytes_per_s: Annotated[int, Field(ge=0)] = 16 * KIB
    head_timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """How long a request's head may take; the connection is closed then."""
    answer_stall_s: Annotated[float, Field(gt=0)] = 20.0
    """A client that takes less than 256 KiB of its answer in so many seconds is cut off."""
    """Slowest upload, as an average over 10 s."""
    in_flight: Annotated[int, Field(ge=1)] = 256
    """Requests that this process works on at once; more are answered with 429."""
    connections: Annotated[int, Field(ge=1)] = 1000
    keep_alive_s: Annotated[int, Field(ge=1)] = 5
    media_workers: Annotated[int, Field(ge=0)] = 0
    """Decoder children; 0: as many as there are cores."""

    # What the queue may hold.
    queue_tokens: Annotated[int, Field(ge=0)] = 0
    """0: what the ready workers do in sixty seconds at their measured speed, at least eight batches."""
    queue_bytes: Annotated[int, Field(ge=1 * MIB)] = 2048 * MIB
    queue_items: Annotated[int, Field(ge=1)] = 10_000

    # Stopping and telling.
    drain_s: Annotated[float, Field(ge=0)] = 0.0
    """After SIGTERM: time in which /health/ready says 503 and all is still served, for a load balancer to notice."""
    shutdown_s: Annotated[int, Field(ge=1)] = 30
    """After that: time for requests in flight, or the batch in a worker's hand, to finish."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    media: Limits = Field(default_factory=Limits)

    @field_validator("models", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_relations(self) -> Settings:
        if self.request_timeout_s > self.max_timeout_s:
            raise ValueError(
                f"ATOKEN_REQUEST_TIMEOUT_S={self.request_timeout_s} is over ATOKEN_MAX_TIMEOUT_S={self.max_timeout_s}"
            )
        if self.json_bytes > self.body_bytes:
            raise ValueError(f"ATOKEN_JSON_BYTES={self.json_bytes} is over ATOKEN_BODY_BYTES={self.body_bytes}")
        if not self.models:
            raise ValueError("ATOKEN_MODELS is empty; name at least one model")
        return self

    def printable(self) -> dict[str, Any]:
        """Return every setting as JSON, the password in the Redis address masked: what a process prints at start."""
        shown = self.model_dump(mode="json")
        shown["media"] = asdict(self.media)
        if self.redis_url:
            shown["redis_url"] = _mask_password(self.redis_url)
        return shown

    def public(self) -> dict[str, Any]:
        """Return the limits that a client can check before it sends; the answer of /v1/limits.

        queue_tokens is None where it follows the workers' speed.
        """
        shown = {name: getattr(self, name) for name in PUBLIC} | {"media": asdict(self.media)}
        return shown | {"queue_tokens": self.queue_tokens or None}


def _mask_password(url: str) -> str:
    parts = urlsplit(url)
    if "@" not in parts.netloc:
        return url
    return urlunsplit(parts._replace(netloc="***@" + parts.netloc.rpartition("@")[2]))
