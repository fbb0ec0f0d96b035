"""Every error that can leave the service: one table of codes, one exception, one body (RFC 9457 problem+json)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from media.errors import MediaError
from service.queue.estimate import MARGIN
from service.queue.jobs import Answer, QueueUnavailable, Refused

PROBLEM_JSON = "application/problem+json"


@dataclass(frozen=True)
class CodeInfo:
    """One row of the table. what: when this happens and what to do about it, for the page /errors/<code>."""

    status: int
    title: str
    what: str


# Source: serving.md section 4.5. `service_busy`, `model_not_found` and `headers_too_large` are ours: the first
# refuses before the body is read, the second keeps "no such model" apart from "no such path", the third is RFC 6585's.
CODES: Mapping[str, CodeInfo] = {
    "invalid_json": CodeInfo(400, "The JSON is not valid", "The body (or the `request` part) does not parse as JSON."),
    "invalid_multipart": CodeInfo(
        400, "The multipart body is not valid", "A part, a boundary or a part's header is broken."
    ),
    "invalid_header": CodeInfo(400, "A request header is not valid", "A header has a value that cannot be read."),
    "truncated_body": CodeInfo(
        400, "The body is empty or ends early", "Fewer bytes arrived than were announced, or none."
    ),
    "not_found": CodeInfo(404, "There is nothing at this address", "See /docs for the addresses of the service."),
    "model_not_found": CodeInfo(404, "There is no model of this name", "GET /v1/models lists the models."),
    "method_not_allowed": CodeInfo(
        405, "This address does not take this method", "The `Allow` header names those it takes."
    ),
    "not_acceptable": CodeInfo(
        406, "No format fits the Accept header", "The result cannot be given in any of the accepted formats."
    ),
    "upload_timeout": CodeInfo(
        408, "The upload is too slow", "The body did not arrive in the time that /v1/limits states."
    ),
    "model_mismatch": CodeInfo(
        409,
        "The tokens come from another model",
        "Tokens mean something only to the weights that made them. `force=true` decodes them anyway if the shapes fit.",
    ),
    "body_too_large": CodeInfo(
        413, "The body is too large", "Send fewer or smaller items; /v1/limits states the sizes."
    ),
    "item_too_large": CodeInfo(413, "The item is too large", "Send a smaller picture or a shorter clip."),
    "too_many_items": CodeInfo(413, "There are too many items", "Spread the items over several requests."),
    "too_many_tokens": CodeInfo(
        413, "The request has too many tokens", "Spread the items over several requests, or send them smaller."
    ),
    "unsupported_media_type": CodeInfo(415, "This type of content is not offered", "/v1/limits lists the formats."),
    "unsupported_codec": CodeInfo(
        415, "This codec is not offered", "The container is known, its codec is not offered."
    ),
    "media_type_mismatch": CodeInfo(
        415, "The content is not of the declared type", "The first bytes say another type."
    ),
    "invalid_parameter": CodeInfo(
        422, "A parameter is not valid", "The detail names the parameter and what is allowed."
    ),
    "unsupported_output": CodeInfo(422, "No model can do this", "The detail says which model offers what."),
    "image_too_large": CodeInfo(422, "The picture is too large", "Scale it down; /v1/limits states the sizes."),
    "image_too_small": CodeInfo(
        422, "The picture is too small", "`fit=crop` needs 16 pixels a side; `fit=pad` takes any."
    ),
    "video_too_long": CodeInfo(422, "The clip is too long", "Send a shorter clip; /v1/limits states the length."),
    "too_many_frames": CodeInfo(
        422, "The clip has too many frames", "Send fewer frames; /v1/limits states the number."
    ),
    "corrupt_media": CodeInfo(422, "The file is broken", "The file starts like a known format but cannot be decoded."),
    "decode_limit": CodeInfo(422, "The file takes too much to decode", "Decoding went over its time or memory limit."),
    "invalid_token_file": CodeInfo(
        422, "The tokens are not valid", "The token file or arrays break a rule of the format."
    ),
    "non_finite_input": CodeInfo(422, "A number is not finite", "Tokens and options hold no NaN and no infinity."),
    "invalid_camera": CodeInfo(422, "A camera is not valid", "The detail names the view and what is wrong with it."),
    "view_mismatch": CodeInfo(
        422, "The views do not fit together", "A view is an image, a depth map and a camera; pictures are square."
    ),
    "empty_object": CodeInfo(
        422, "The object is empty", "Nothing of it lies in the cube of -0.5 to 0.5 that becomes voxels."
    ),
    "deadline_too_short": CodeInfo(
        422,
        "The item takes longer than the request allows",
        "Even an idle service would not be done in time, at the speed that its workers measured: give more time with "
        "`Request-Timeout`, or send a shorter clip, a smaller picture or fewer items.",
    ),
    "queue_full": CodeInfo(429, "The queue is full", "Come back after the seconds of `Retry-After`."),
    "would_miss_deadline": CodeInfo(
        429,
        "The answer would come too late",
        "What waits in the queue takes longer than the request allows: come back after the seconds of `Retry-After`, "
        "or give more time with `Request-Timeout`.",
    ),
    "media_busy": CodeInfo(429, "The decoders are busy", "Come back after the seconds of `Retry-After`."),
    "service_busy": CodeInfo(429, "Too many requests at once", "Come back after the seconds of `Retry-After`."),
    "headers_too_large": CodeInfo(
        431, "The headers are too large", "Send fewer or shorter headers; /v1/limits states `header_bytes`."
    ),
    "client_closed": CodeInfo(499, "The client left", "Only in the log: there was nobody to answer."),
    "internal": CodeInfo(500, "The service failed", "A fault of the service; the log has it under the request id."),
    "item_failed_repeatedly": CodeInfo(
        500, "The item failed repeatedly", "Workers broke off on this item; it is given up."
    ),
    "no_worker": CodeInfo(503, "No worker has this model", "A worker is starting or missing; /health says more."),
    "queue_unavailable": CodeInfo(503, "The queue cannot be reached", "Come back after the seconds of `Retry-After`."),
    "queue_full_memory": CodeInfo(503, "The queue is out of memory", "Come back after the seconds of `Retry-After`."),
    "job_lost": CodeInfo(503, "The job was lost", "The queue restarted without its data; send the request again."),
    "shutting_down": CodeInfo(503, "The service is stopping", "Send the request again: another process takes it."),
    "deadline_exceeded": CodeInfo(504, "The deadline passed", "Give more time with `Request-Timeout`, or send less."),
}


@dataclass
class Problem(Exception):  # noqa: N818 - the name of RFC 9457
    """An error that a client sees. detail: what was given, what is allowed; never payload, paths or tracebacks.

    code: a row of CODES. item: position of the item in the request. extra: further members of the problem document.
    """

    code: str
    detail: str
    item: int | None = None
    limit: float | str | None = None
    actual: float | str | None = None
    retry_after: float | None = None
    headers: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.code}: {self.detail}"

    @property
    def status(self) -> int:
        """HTTP status of the code."""
        return CODES[self.code].status

    def document(self, instance: str) -> dict[str, Any]:
        """Return the problem document; instance is the request id."""
        info = CODES[self.code]
        body: dict[str, Any] = {
            "type": f"/errors/{self.code}",
            "title": info.title,
            "status": info.status,
            "detail": self.detail,
            "instance": instance,
            "code": self.code,
        }
        for name in ("item", "limit", "actual", "retry_after"):
            if getattr(self, name) is not None:
                body[name] = getattr(self, name)
        return body | self.extra


def as_problem(error: BaseException) -> Problem:
    """Turn what media, the queue or our own code raised into the problem that the client gets."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, MediaError):
        code = error.code if error.code in CODES else "internal"
        retry = 1.0 if CODES[code].status == 429 else None
        return Problem(code, error.detail, limit=error.limit, actual=error.actual, retry_after=retry)
    if isinstance(error, Refused):
        detail = CODES[error.code].what
        if error.code == "would_miss_deadline" and error.limit is not None and error.actual is not None:
            detail = (
                f"with what waits in the queue it takes about {error.actual:g} s, the request allows {error.limit:g} s "
                "from now; come back after the seconds of `Retry-After`, or give more time with `Request-Timeout`"
            )
        return Problem(error.code, detail, limit=error.limit, actual=error.actual, retry_after=error.retry_after)
    if isinstance(error, QueueUnavailable):
        return Problem("queue_unavailable", "the queue does not answer", retry_after=2.0)
    return Problem("internal", "an unexpected fault; the log has it under this request id")


def deadline_exceeded(timeout_s: float, max_timeout_s: float) -> Problem:
    """Return the problem of a request that was not answered in its time; timeout_s: allowed, max_timeout_s: the cap."""
    advice = "the most that this service allows; send less"
    if timeout_s < max_timeout_s:
        advice = f"allow more with the header `Request-Timeout: N` (seconds, at most {max_timeout_s:g}), or send less"
    return Problem("deadline_exceeded", f"there was no answer within {timeout_s:g} s: {advice}", limit=timeout_s)


def deadline_too_short(estimate_s: float, timeout_s: float, max_timeout_s: float) -> Problem:
    """Return the problem of a request that no idle worker could answer in its time; the seconds are as above."""
    about = float(f"{estimate_s:.3g}")
    advice = "send a shorter clip, a smaller picture or fewer items"
    enough = min(math.ceil(MARGIN * estimate_s), math.floor(max_timeout_s))
    if timeout_s < estimate_s <= enough:
        advice = f"allow more with the header `Request-Timeout: {enough}` (at most {max_timeout_s:g}), or {advice}"
    return Problem(
        "deadline_too_short",
        f"this takes about {about:g} s on an idle worker, the request allows {timeout_s:g} s: {advice}",
        limit=timeout_s,
        actual=about,
    )


def problem_of_answer(answer: Answer, *, timeout_s: float, max_timeout_s: float) -> Problem:
    """Return the problem that an answer other than `done` stands for; the seconds are as in deadline_exceeded."""
    if answer.status == "expired":
        return deadline_exceeded(timeout_s, max_timeout_s)
    if answer.status == "lost":
        return Problem("job_lost", "the queue restarted without this job; send the request again", retry_after=1.0)
    if answer.status == "canceled":
        return Problem("client_closed", "the job was canceled")
    code = answer.code if answer.code is not None and answer.code in CODES else "internal"
    # What broke inside a worker is for the log; a refusal of the input is for the client.
    detail = (answer.detail or CODES[code].what) if CODES[code].status != 500 else CODES[code].what
    return Problem(code, detail, retry_after=1.0 if CODES[code].status in (429, 503) else None)
