"""The client: one method for each thing that the service does."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

import httpx
import numpy as np
import numpy.typing as npt

from service.client.errors import AnswerError, ClientError, ProblemError, UnreachableError
from service.client.records import Decoded, EncodedFile, Model, TokenFile, text_embeddings

Source: TypeAlias = bytes | str | os.PathLike[str]
"""A file: its bytes, or its path."""

SAFETENSORS = "application/vnd.safetensors"
JSON = "application/json"
MEDIA_TYPES = {
    "png": "image/png",
    "webp": "image/webp",
    "jpeg": "image/jpeg",
    "mp4": "video/mp4",
    "mkv": "video/x-matroska",
    "ply": "model/ply",
    "splat": "application/octet-stream",
    "spz": "application/octet-stream",
}

# Statuses that say "not now": the same request may work later.
RETRIED = (429, 503)
# The server closes idle connections after 5 s; ours end before, so that none is used while it is being closed.
IDLE_S = 3.0
FIRST_BACKOFF_S = 0.25
# The service gives up by itself at the deadline and says so; that answer is worth waiting for.
GRACE_S = 5.0


class Client:
    """A connection to AToken Serve. Use it as a context manager or call `close`; threads may share one.

    base_url: "http://127.0.0.1:8000". timeout_s: how long the service may work on one request, sent along as the
    request's deadline. retries: how often a call is sent again after 429, 503 or a broken connection; each wait is
    what `Retry-After` says, at most max_wait_s, or grows from a quarter of a second where nothing is said.
    http: an httpx client of your own for proxies or certificates; it is used as it is and not closed here.

    All calls raise ProblemError when the service refuses or fails, UnreachableError when it does not answer,
    AnswerError when the answer makes no sense, OSError when a file cannot be read.
    """

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float = 60.0,
        retries: int = 4,
        max_wait_s: float = 30.0,
        http: httpx.Client | None = None,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must start with http:// or https://, not {base_url!r}")
        if timeout_s <= 0 or retries < 0 or max_wait_s < 0:
            raise ValueError("timeout_s must be above 0, retries and max_wait_s at least 0")
        self._url = base_url.rstrip("/")
        self._timeout_s = timeout_s
        self._retries = retries
        self._max_wait_s = max_wait_s
        self._owned = http is None
        self._http = http or httpx.Client(limits=httpx.Limits(keepalive_expiry=IDLE_S))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        if self._owned:
            self._http.close()

    def encode(
        self,
        files: Source | Sequence[Source],
        *,
        outputs: str | Sequence[str] | None = None,
        model: str | None = None,
        fit: Literal["pad", "crop"] | None = None,
        up: Literal["y", "z"] | None = None,
        sample: bool = False,
        seed: int | None = None,
    ) -> TokenFile:
        """Turn images, clips and 3D assets into tokens.

        outputs: any of latents, codes, embedding, features; None for what the model decodes. model: a name of
        `models`, None for the first that offers the outputs. fit: "pad" keeps every pixel. up: axis of mesh files that
        is up, None by format. sample: draw latents from the posterior with `seed` instead of taking its mean. One bad
        file fails the call: see ProblemError.item.
        """
        options = {
            "outputs": _joined(outputs),
            "model": model,
            "fit": fit,
            "up": up,
            "sample": sample or None,
            "seed": seed,
        }
        return TokenFile.parse(self._send_files("/v1/encode", files, options))

    def embed(
        self,
        files: Source | Sequence[Source],
        *,
        outputs: str | Sequence[str] | None = None,
        model: str | None = None,
        fit: Literal["pad", "crop"] | None = None,
        up: Literal["y", "z"] | None = None,
    ) -> TokenFile:
        """Turn images, clips and 3D assets into one embedding each (`.items[k].embedding`).

        outputs: embedding and features (a vector for each token); None for the embedding alone. Others as in `encode`.
        """
        options = {"outputs": _joined(outputs), "model": model, "fit": fit, "up": up}
        return TokenFile.parse(self._send_files("/v1/embed", files, options))

    def embed_text(self, texts: str | Sequence[str], *, model: str | None = None) -> npt.NDArray[np.float32]:
        """Turn texts into embeddings beside those of `embed`: float32 [N, D], unit length, so `@` gives cosines.

        texts: one or several, of plain English words. model: a name of `models` with `text`, None for the first; the
        pictures' embeddings have to come from it, or from one with the same space. One bad text fails the call: see
        ProblemError.item.
        """
        given = [texts] if isinstance(texts, str) else list(texts)
        if not given:
            raise ValueError("there is no text to send")
        response = self._send(
            "POST", "/v1/embed", accept=JSON, params={"model": model, "on_error": "fail"}, json={"text": given}
        )
        return text_embeddings(_json(response), len(given))

    def decode(
        self, tokens: TokenFile | Source, *, model: str | None = None, force: bool = False
    ) -> tuple[Decoded, ...]:
        """Turn tokens back into pixels, exactly in the size that was encoded; one result for each item.

        tokens: an answer of `encode`, or a token file as bytes or path. force: decode tokens of another model or
        revision if the shapes fit.
        """
        options = {"model": model, "force": force or None, "on_error": "fail"}
        response = self._send_tokens(tokens, options, JSON)
        items = _json(response).get("items")
        if not isinstance(items, list):
            raise AnswerError("the answer of decode has no items")
        return tuple(Decoded.of(entry) for entry in items)

    def decode_file(
        self,
        tokens: TokenFile | Source,
        format: Literal["png", "webp", "jpeg", "mp4", "mkv", "ply", "splat", "spz"],
        *,
        quality: int | None = None,
        camera: Mapping[str, float | str] | None = None,
        model: str | None = None,
        force: bool = False,
    ) -> EncodedFile:
        """Turn the tokens of one item into a file.

        format: png, webp or jpeg of an image; mp4 (lossy) or mkv (lossless) of a clip; of a 3D asset ply, splat or spz
        (Gaussians), a picture, or as a clip a turn around it. quality: 1 to 100, of JPEG and lossy WebP. camera: of 3D
        pictures and clips, any of azimuth, elevation, distance, fov, side, frames, background. Others as in `decode`.
        """
        if format not in MEDIA_TYPES:
            raise ValueError(f"format must be one of {', '.join(MEDIA_TYPES)}, not {format!r}")
        compact = format if format in ("splat", "spz") else None
        options = {"model": model, "force": force or None, "quality": quality, "format": compact, **(camera or {})}
        response = self._send_tokens(tokens, options, MEDIA_TYPES[format])
        return EncodedFile(data=response.content, media_type=_media_type(response))

    def models(self) -> tuple[Model, ...]:
        """Return the models that are ready now, the default one first."""
        cards = _json(self._send("GET", "/v1/models", accept=JSON)).get("data")
        if not isinstance(cards, list):
            raise AnswerError("the answer of /v1/models has no list of models")
        return tuple(Model.of(card) for card in cards)

    def limits(self) -> dict[str, Any]:
        """Return what the service allows: sizes, counts, formats, timeouts; names carry the units."""
        return _json(self._send("GET", "/v1/limits", accept=JSON))

    def _send_files(self, path: str, files: Source | Sequence[Source], options: dict[str, Any]) -> bytes:
        sources = [files] if isinstance(files, bytes | str | os.PathLike) else list(files)
        if not sources:
            raise ValueError("there is no file to send")
        parts = [(_name(source, position), _read(source)) for position, source in enumerate(sources)]
        kind = "application/octet-stream"
        if len(parts) == 1:
            response = self._send(
                "POST", path, accept=SAFETENSORS, params=options, headers={"Content-Type": kind}, content=parts[0][1]
            )
        else:
            response = self._send(
                "POST",
                path,
                accept=SAFETENSORS,
                params=options,
                files=[("file", (name, data, kind)) for name, data in parts],
            )
        return response.content

    def _send_tokens(self, tokens: TokenFile | Source, options: dict[str, Any], accept: str) -> httpx.Response:
        data = tokens.data if isinstance(tokens, TokenFile) else _read(tokens)
        return self._send(
            "POST", "/v1/decode", accept=accept, params=options, headers={"Content-Type": SAFETENSORS}, content=data
        )

    def _send(
        self,
        method: str,
        path: str,
        *,
        accept: str,
        params: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        **body: Any,
    ) -> httpx.Response:
        """Send a request until it is answered with something else than "not now", or the retries are used up."""
        given = {name: value for name, value in (params or {}).items() if value is not None}
        common = {"Accept": accept, "Request-Timeout": f"{self._timeout_s:g}"} | (headers or {})
        attempt = 0
        while True:
            failure: ClientError
            wait: float | None = None
            try:
                response = self._http.request(
                    method,
                    self._url + path,
                    params=given,
                    headers=common,
                    timeout=httpx.Timeout(self._timeout_s + GRACE_S, connect=min(10.0, self._timeout_s)),
                    **body,
                )
            except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
                raise UnreachableError(f"{self._url} gave no answer within {self._timeout_s:g} s") from error
            except httpx.TransportError as error:
                failure = UnreachableError(f"{self._url} cannot be reached: {error or type(error).__name__}")
                failure.__cause__ = error
            else:
                if response.is_success:
                    return response
                failure = _failure(response)
                if response.status_code not in RETRIED:
                    raise failure
                wait = failure.retry_after if isinstance(failure, ProblemError) else None
            if attempt == self._retries:
                raise failure
            if wait is None:
                # Clients that failed together should not come back together.
                wait = FIRST_BACKOFF_S * 2.0**attempt * random.uniform(0.5, 1.0)
            time.sleep(min(wait, self._max_wait_s))
            attempt += 1


def _joined(outputs: str | Sequence[str] | None) -> str | None:
    return outputs if outputs is None or isinstance(outputs, str) else ",".join(outputs)


def _read(source: Source) -> bytes:
    return source if isinstance(source, bytes) else Path(source).read_bytes()


def _name(source: Source, position: int) -> str:
    return str(position) if isinstance(source, bytes) else Path(source).name


def _media_type(response: httpx.Response) -> str:
    header: str = response.headers.get("content-type", "")
    return header.partition(";")[0].strip().lower()


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        found = response.json()
    except ValueError as error:
        raise AnswerError("the service answered with something that is no JSON") from error
    if not isinstance(found, dict):
        raise AnswerError("the service answered with JSON that is no object")
    return found


def _failure(response: httpx.Response) -> ClientError:
    request_id = response.headers.get("x-request-id")
    retry_after = _seconds(response.headers.get("retry-after"))
    try:
        document = _json(response)
    except AnswerError:
        # Not from the service: a proxy in between, or another server altogether.
        document = {"detail": f"HTTP {response.status_code} {response.reason_phrase}"}
    return ProblemError.of(response.status_code, document, retry_after=retry_after, request_id=request_id)


def _seconds(text: str | None) -> float | None:
    """Read Retry-After: seconds, or a date. None for anything else."""
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            when = parsedate_to_datetime(text)
        except ValueError:
            return None
        seconds = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp()
        return max(seconds, 0.0)
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
