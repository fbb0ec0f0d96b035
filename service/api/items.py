"""The way of one item: header, cost, queue check, decoder child, queue, answer. And of several, side by side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeAlias
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import structlog
from starlette.requests import Request

from media import wire
from media.errors import MediaError
from media.sniff import PATCH_SIDE, Probe, probe, token_cost
from media.types import Asset, Image, Kind, Text, UInt8Array, Video
from service.api import children
from service.api.core import Service
from service.api.models import Card
from service.api.racing import race
from service.api.record import Record, timeout_of
from service.api.uploads import Upload
from service.errors import Problem, as_problem, deadline_exceeded, problem_of_answer
from service.queue.estimate import Work
from service.queue.jobs import Job, Op, QueueUnavailable, Refused

log = structlog.get_logger("atoken.items")

GRACE_S = 0.5
"""How much longer than the deadline we wait: the queue's own word on an expired job says more than ours."""

WITHDRAW_S = 2.0
LOOK_BYTES = 128 * 1024
"""Headers of files with so many bytes together are read in the event loop: more could hold it up."""
THREAD_BYTES = 1024 * 1024
"""From here on a copy takes long enough to leave the event loop for it."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """One item's result. cost: its tokens. pixels: the input uint8 [T, H, W, 3], where the answer needs it again."""

    id: str
    kind: Kind | Literal["text"]
    cost: int
    arrays: dict[str, npt.NDArray[Any]]
    meta: dict[str, Any]
    pixels: UInt8Array | None = None


@dataclass(frozen=True, kw_only=True)
class Bad:
    """One item that has no result."""

    id: str
    problem: Problem


Outcome: TypeAlias = Done | Bad

Found: TypeAlias = Probe | Text | Problem
"""What an upload is before anything of it is decoded, or why it cannot be used."""

Content: TypeAlias = Image | Video | Asset | Text
"""What goes to a worker."""


class Cost(NamedTuple):
    """Size of an item. steps: latent frames of a clip; 1 or 0 of anything else."""

    tokens: int
    steps: int = 1


TEXT_COST = Cost(tokens=1)
"""Of a text in the queue; it has no tokens, but nothing is free."""


@dataclass(frozen=True, kw_only=True)
class Deadline:
    """When the client gives up: seconds it allowed, and the moment in Unix time."""

    timeout_s: float
    at: float

    @classmethod
    def of(cls, request: Request, service: Service, record: Record) -> Deadline:
        """Read the deadline of a request from its headers; time spent so far counts."""
        timeout_s = timeout_of(request.headers, service.settings)
        return cls(timeout_s=timeout_s, at=time.time() + timeout_s - record.elapsed)


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """What all items of one request have in common on their way through the queue."""

    service: Service
    record: Record
    deadline: Deadline
    op: Op
    options: dict[str, Any]
    fail: bool
    """The first bad item fails the request, before anything is queued."""

    async def race(self, request: Request, work: Any) -> Any:
        """Wait for work within the deadline, while the client is there."""
        remaining = self.deadline.at - time.time() + GRACE_S
        return await race(
            work,
            request,
            remaining_s=remaining,
            late=deadline_exceeded(self.deadline.timeout_s, self.service.settings.max_timeout_s),
            stopping=self.service.stopping,
        )


async def probe_all(service: Service, record: Record, uploads: Sequence[Upload]) -> list[Found]:
    """Read the headers of all uploads: kind and size, before any decoder runs."""
    limits = service.settings.media

    def look(upload: Upload) -> Found:
        if upload.problem is not None:
            return upload.problem
        if upload.text is not None:
            return Text(text=upload.text)
        try:
            return probe(upload.data, limits, declared=upload.declared)
        except MediaError as error:
            return as_problem(error)

    with record.stage("check"):
        if sum(len(upload.data) for upload in uploads) < LOOK_BYTES:
            return [look(upload) for upload in uploads]
        return await asyncio.to_thread(lambda: [look(upload) for upload in uploads])


async def encode_all(
    ticket: Ticket,
    card: Card,
    uploads: Sequence[Upload],
    probes: Sequence[Found],
    *,
    keep_pixels: bool = False,
    up: Literal["y", "z"] | None = None,
) -> list[Outcome]:
    """Send pictures, clips, 3D assets and texts through an encode or embed job each.

    keep_pixels: what a reconstruction is compared with is wanted. up: axis of mesh files that is up, None by format.
    Raises Problem too_many_tokens, the first item's problem when the ticket says `fail`, or what the queue refuses.
    """
    fit = ticket.options["fit"]
    costs: list[Cost | Problem | None] = [_cost_of_probe(ticket, card, found, fit) for found in probes]
    await admit(ticket, [(card, cost) for cost in costs if isinstance(cost, Cost)])

    async def decode(upload: Upload, cost: Cost | Problem | None) -> tuple[Content, Cost]:
        if isinstance(cost, Problem):
            raise cost
        if upload.text is not None:
            return Text(text=upload.text), TEXT_COST
        item = await children.read(ticket.service, ticket.record, upload, up=up, with_pictures=keep_pixels)
        # Headers lie; what counts is what came out.
        known, cost = cost, _cost_of_item(item, fit)
        check_cost(ticket, card, cost.tokens, "voxels" if isinstance(item, Asset) else item.kind)
        if known is None:
            await admit(ticket, [(card, cost)])
        return item, cost

    async def send(upload: Upload, item: Content, cost: Cost) -> Done:
        arrays, meta = await asyncio.to_thread(_wire_form, item) if isinstance(item, Asset) else _wire_form(item)
        payload = await _dump(arrays, meta, sum(array.nbytes for array in arrays.values()))
        answers, answered = await run_job(ticket, card, cost, payload)
        kind = "voxels" if isinstance(item, Asset) else item.kind
        kept = arrays.get("pixels") if keep_pixels else None
        return Done(id=upload.id, kind=kind, cost=cost.tokens, arrays=answers, meta=answered, pixels=kept)

    async def whole_way(upload: Upload, cost: Cost | Problem | None) -> Done:
        return await send(upload, *await decode(upload, cost))

    names = [upload.id for upload in uploads]
    if not ticket.fail:
        return await gather(ticket, names, [whole_way(*pair) for pair in zip(uploads, costs, strict=True)])
    decoded = await _all_or_first_problem([decode(*pair) for pair in zip(uploads, costs, strict=True)])
    return await gather(ticket, names, [send(upload, *found) for upload, found in zip(uploads, decoded, strict=True)])


async def gather(ticket: Ticket, names: Sequence[str], work: Sequence[Awaitable[Done]]) -> list[Outcome]:
    """Wait for all items; with `fail` the first problem is raised and the others are given up."""
    if ticket.fail:
        return list(await _all_or_first_problem(work))

    async def settle(name: str, one: Awaitable[Done]) -> Outcome:
        try:
            return await one
        except Exception as error:
            problem = as_problem(error)
            if problem.code == "internal":
                log.error("an item failed", request_id=ticket.record.request_id, exc_info=error)
            return Bad(id=name, problem=problem)

    return list(await asyncio.gather(*(settle(name, one) for name, one in zip(names, work, strict=True))))


async def run_job(
    ticket: Ticket, card: Card, cost: Cost, payload: bytes
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Queue one job, wait for its answer and take it apart. Whoever is canceled here withdraws the job.

    Raises Problem, Refused or QueueUnavailable.
    """
    queue, record = ticket.service.queue, ticket.record
    job = Job(
        id=uuid4().hex,
        op=ticket.op,
        pool=card.pool,
        cost=cost.tokens,
        effort=card.effort(*cost),
        deadline=ticket.deadline.at,
        options=ticket.options,
        request_id=record.request_id,
    )
    ours = True
    try:
        with record.stage("submit"):
            await queue.submit(job, payload)
        submitted = time.perf_counter()
        answer = await queue.wait(job.id)
        ours = False
    except (Refused, QueueUnavailable):
        ours = False
        raise
    finally:
        if ours:
            await _withdraw(ticket.service, job.id)
    known = {name: answer.timings[name] for name in ("queue", "model") if name in answer.timings}
    for name, milliseconds in known.items():
        record.add_stage(name, milliseconds)
    waited = 1000.0 * (time.perf_counter() - submitted)
    record.add_stage("deliver", max(0.0, waited - sum(known.values())))
    if answer.status != "done" or answer.payload is None:
        cap = ticket.service.settings.max_timeout_s
        raise problem_of_answer(answer, timeout_s=ticket.deadline.timeout_s, max_timeout_s=cap)
    return wire.loads(answer.payload)


def check_cost(ticket: Ticket, card: Card, cost: int, kind: Kind) -> None:
    """Raise Problem item_too_large when one item has more tokens than the limits or the model's workers take."""
    limit = ticket.service.settings.media.item_tokens
    if card.max_item_tokens is not None:
        limit = min(limit, card.max_item_tokens)
    if cost > limit:
        advice = (
            "an object that fills fewer voxels of the 64 x 64 x 64 is needed"
            if kind == "voxels"
            else f"a picture of {limit} tokens has {limit * 256} pixels (16 x 16 a token)"
            if kind == "image"
            else "send a smaller frame size or fewer frames (a token is 4 frames of 16 x 16 pixels)"
        )
        raise Problem(
            "item_too_large",
            f"the item has {cost} tokens, at most {limit} are allowed; {advice}",
            limit=limit,
            actual=cost,
        )


def check_kind(card: Card, kind: Kind) -> None:
    """Raise Problem unsupported_output when a model does not take a kind of item."""
    if kind not in card.kinds:
        raise Problem("unsupported_output", f"`{card.name}` takes {', '.join(card.kinds)}, not {kind}")


async def admit(ticket: Ticket, items: Sequence[tuple[Card, Cost]]) -> None:
    """Refuse a request whose items (model and size) are too many together, take too long, or find no room now."""
    limit = ticket.service.settings.media.request_tokens
    total = sum(cost.tokens for _, cost in items)
    if total > limit:
        raise Problem(
            "too_many_tokens",
            f"the items have {total} tokens together, at most {limit} are allowed; send several requests",
            limit=limit,
            actual=total,
        )
    of_pools: dict[str, list[tuple[Card, Cost]]] = {}
    for card, cost in items:
        of_pools.setdefault(card.pool, []).append((card, cost))
    deadline = ticket.deadline
    for pool, found in of_pools.items():
        works = [Work.of(ticket.op, ticket.options, card.effort(*cost)) for card, cost in found]
        tokens = sum(cost.tokens for _, cost in found)
        await ticket.service.load.check(pool, works, tokens, timeout_s=deadline.timeout_s, deadline=deadline.at)


def _cost_of_probe(ticket: Ticket, card: Card, found: Found, fit: Literal["pad", "crop"]) -> Cost | Problem | None:
    """Return the size of an item as its header promises, None if it does not say, or why it is refused."""
    if isinstance(found, Problem):
        return found
    if isinstance(found, Text):
        return TEXT_COST
    try:
        check_kind(card, found.kind)
        if found.kind == "voxels" or (found.kind == "video" and found.frames is None):
            return None
        cost = _cost_of_pixels(found.kind, found.frames or 1, found.height, found.width, fit)
        check_cost(ticket, card, cost.tokens, found.kind)
    except (Problem, MediaError) as error:
        return as_problem(error)
    return cost


def _cost_of_item(item: Image | Video | Asset, fit: Literal["pad", "crop"]) -> Cost:
    if isinstance(item, Asset):
        return Cost(len(item.voxels.coords))
    frames = 1 if isinstance(item, Image) else len(item.frames)
    height, width = item.pixels.shape[:2] if isinstance(item, Image) else item.frames.shape[1:3]
    return _cost_of_pixels(item.kind, frames, height, width, fit)


def _cost_of_pixels(kind: Kind, frames: int, height: int, width: int, fit: Literal["pad", "crop"]) -> Cost:
    return Cost(token_cost(kind, frames, height, width, fit), token_cost(kind, frames, PATCH_SIDE, PATCH_SIDE, fit))


def _wire_form(item: Content) -> tuple[dict[str, npt.NDArray[Any]], dict[str, wire.JSON]]:
    """What goes to the worker: arrays and the rest."""
    if isinstance(item, Text):
        return {}, {"kind": "text", "text": item.text}
    if not isinstance(item, Asset):
        pixels = item.pixels[np.newaxis] if isinstance(item, Image) else item.frames
        fps = item.fps if isinstance(item, Video) else None
        return {"pixels": pixels}, {"kind": item.kind, "fps": fps, "notes": list(item.notes)}
    voxels, views = item.voxels, item.pictures
    arrays: dict[str, npt.NDArray[Any]] = {"coords": voxels.coords, "feats": _shortest(voxels.feats)}
    meta: dict[str, wire.JSON] = {"kind": "voxels", "notes": list(voxels.notes)}
    if views is not None:
        arrays |= {name: getattr(views, name) for name in ("pictures", "world_to_camera", "intrinsics")}
        meta["held_out"] = views.held_out
    return arrays, meta


def _shortest(feats: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """As bytes where nothing is lost: features that came out of pictures are k / 255."""
    rounded = np.rint(feats * 255).astype(np.uint8)
    return rounded if np.array_equal(rounded / np.float32(255), feats) else feats


async def _dump(arrays: dict[str, npt.NDArray[Any]], meta: dict[str, wire.JSON], size: int) -> bytes:
    if size < THREAD_BYTES:
        return wire.dumps(arrays, meta)
    return await asyncio.to_thread(wire.dumps, arrays, meta)


async def _all_or_first_problem(work: Sequence[Awaitable[Any]]) -> list[Any]:
    """Wait for all; when one fails, give up the others and raise its problem with its position."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for position, task in enumerate(tasks):
            if task.done() and not task.cancelled():
                error = task.exception()
                if error is not None:
                    raise _at(error, position if len(tasks) > 1 else None) from error
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _at(error: BaseException, position: int | None) -> BaseException:
    if not isinstance(error, Problem | MediaError | Refused | QueueUnavailable):
        return error
    return replace(as_problem(error), item=position)


async def _withdraw(service: Service, job_id: str) -> None:
    with suppress(TimeoutError, QueueUnavailable):  # then the job's own deadline ends it
        async with asyncio.timeout(WITHDRAW_S):
            await service.queue.cancel(job_id)


def settle_record(ticket: Ticket, outcomes: Sequence[Outcome]) -> None:
    """Count what came out, for headers, log and metrics. Raises the first Problem, with all, if none is good."""
    record, telemetry = ticket.record, ticket.service.telemetry
    for outcome in outcomes:
        if isinstance(outcome, Done):
            record.tokens += outcome.cost
            telemetry.items.labels(ticket.op, outcome.kind, "ok").inc()
            telemetry.tokens.labels(ticket.op, outcome.kind).inc(outcome.cost)
        else:
            record.failed_items += 1
            telemetry.items.labels(ticket.op, "unknown", outcome.problem.code).inc()
    bad = [(position, outcome) for position, outcome in enumerate(outcomes) if isinstance(outcome, Bad)]
    if len(bad) == len(outcomes):
        position, first = bad[0]
        entries = [{"id": outcome.id, "error": outcome.problem.document(record.request_id)} for _, outcome in bad]
        raise replace(first.problem, item=position, extra={**first.problem.extra, "items": entries})
