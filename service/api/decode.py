"""POST /decode: token files, or latents or codes with their coords, in; pictures, clips and Gaussians out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from media import wire
from media.arrays_json import array_from_json
from media.errors import MediaError
from media.limits import Limits
from media.sniff import probe
from media.tokens import check_decodable, layout_from_json, layout_to_json, load_tokens, tokens_from_arrays
from media.types import Tokens, UInt8Array
from service.api import children, render, splats
from service.api import negotiation as types
from service.api.core import Service, service_of
from service.api.documents import decode_operation
from service.api.encoding import fails_whole
from service.api.items import (
    Cost,
    Deadline,
    Done,
    Outcome,
    Ticket,
    admit,
    check_cost,
    check_kind,
    gather,
    run_job,
    settle_record,
)
from service.api.models import Card
from service.api.record import Record, record_of
from service.api.schemas import DecodeBody, DecodeItem, DecodeOptions, validate
from service.api.uploads import Upload, check_count, decode_base64, read_content
from service.errors import Problem, as_problem

router = APIRouter()


@dataclass(frozen=True, kw_only=True)
class Order:
    """One item to decode: its tokens and the model that they go to."""

    id: str
    tokens: Tokens
    card: Card

    @property
    def cost(self) -> Cost:
        """Its size."""
        return Cost(len(self.tokens), self.tokens.layout.grid[0])


@dataclass(frozen=True, kw_only=True)
class Named:
    """Tokens of one item, or why there are none."""

    id: str
    tokens: Tokens | Problem


@router.post("/decode", openapi_extra=decode_operation(DecodeOptions, DecodeBody))
async def decode(request: Request) -> Response:
    """Turn tokens back into the picture or clip, with its exact size and number of frames, or into Gaussian splats."""
    service, record = service_of(request), record_of(request.scope)
    deadline = Deadline.of(request, service, record)
    with record.stage("recv"):
        options, found = await _read(request, service)
    record.items = len(found)
    ticket = Ticket(
        service=service, record=record, deadline=deadline, op="decode", options={"force": options.force}, fail=False
    )
    with record.stage("check"):
        orders = [await _order(ticket, options, named) for named in found]
    only = orders[0] if len(orders) == 1 else None
    if isinstance(only, Problem):
        raise only
    good = [order for order in orders if isinstance(order, Order)]
    cards = {order.card.pool: order.card for order in good}
    if len(cards) == 1:
        (card,) = cards.values()
        record.model, record.revision = card.name, card.revision
    media_type = types.choose(
        request.headers.get("accept"),
        offers(only, good, options.format),
        result="the decoded item" if only else f"{len(orders)} decoded items",
    )
    ticket = replace(
        ticket,
        fail=fails_whole(options.on_error, media_type, len(orders)),
        options={**ticket.options, "splats": splats.asked(media_type, options)},
    )

    async def work() -> tuple[bytes, str]:
        outcomes = await _decode_all(ticket, [named.id for named in found], orders)
        settle_record(ticket, outcomes)
        notes = [order.card.splats_note for order in good if order.tokens.layout.kind == "voxels"]
        record.note = next(iter(notes), "")
        with record.stage("encode"):
            return await _write(service, media_type, outcomes, options, record)

    body, content_type = await ticket.race(request, work())
    return Response(body, media_type=content_type)


def offers(only: Order | None, good: Sequence[Order], wanted: splats.Format | None = None) -> list[str]:
    """Return the formats of the answer, the default first: of one item the picture, clip or Gaussians themselves.

    wanted: file of Gaussians that the options name.
    """
    if only is None:
        files = all(order.tokens.layout.kind != "voxels" or order.card.gaussian_decoder for order in good)
        return [types.JSON, types.MULTIPART] if files else [types.JSON]
    layout = only.tokens.layout
    if layout.kind == "voxels":
        return [*(splats.formats(wanted) if only.card.gaussian_decoder else ()), types.JSON, types.NPZ]
    return [*children.file_types(layout.kind, layout.frames), types.JSON, types.NPY]


async def _read(request: Request, service: Service) -> tuple[DecodeOptions, list[Named]]:
    settings = service.settings
    content = await read_content(request, settings)
    options: DecodeOptions
    if content.body is None:
        options = validate(DecodeOptions, content.options)
        found = await asyncio.to_thread(_tokens_of_uploads, content.uploads or [], settings.media)
    else:
        options = body = validate(DecodeBody, content.body)
        found = await asyncio.to_thread(_tokens_of_body, body, settings.media)
    check_count(len(found), settings)
    return options, found


def _tokens_of_uploads(uploads: Sequence[Upload], limits: Limits) -> list[Named]:
    found = []
    for upload in uploads:
        if upload.problem is not None:
            found.append(Named(id=upload.id, tokens=upload.problem))
        else:
            found += _tokens_of_file(upload.id, upload.data, limits)
    return found


def _tokens_of_body(body: DecodeBody, limits: Limits) -> list[Named]:
    if body.items is None:
        names = ("id", "status", "latents", "codes", "coords", "layout", "data")
        items = [DecodeItem.model_construct(**{name: getattr(body, name) for name in names})]
    else:
        items = body.items
    found = []
    for position, item in enumerate(items):
        name = str(position) if item.id is None else item.id
        field = "data" if body.items is None else f"items.{position}.data"
        try:
            if item.status == "error":
                raise Problem("invalid_parameter", 'the item has `status` "error": /encode made no tokens of it')
            if item.data is not None:
                if any(getattr(item, other) is not None for other in ("latents", "codes", "coords", "layout")):
                    raise Problem("invalid_parameter", "`data` is a whole token file; send it or arrays, not both")
                found += _tokens_of_file(name, decode_base64(item.data, what=f"`{field}`")[0], limits)
            else:
                found.append(
                    Named(id=name, tokens=_tokens_of_arrays(item, item.revision or body.revision or "", limits))
                )
        except (Problem, MediaError) as error:
            found.append(Named(id=name, tokens=as_problem(error)))
    return found


def _tokens_of_file(name: str, data: bytes, limits: Limits) -> list[Named]:
    try:
        loaded = load_tokens(data, limits=limits)
    except MediaError as error:
        return [Named(id=name, tokens=_what_it_is(data, limits) or as_problem(error))]
    if len(loaded) == 1:
        return [Named(id=name, tokens=loaded[0])]
    return [Named(id=f"{name}/{position}", tokens=tokens) for position, tokens in enumerate(loaded)]


def _what_it_is(data: bytes, limits: Limits) -> Problem | None:
    """Say so where a picture, clip or 3D file was sent instead of tokens."""
    try:
        found = probe(data, limits)
    except MediaError:
        return None
    if found.format == "safetensors":
        return None
    return Problem("invalid_token_file", f"this is a {found.format} file, not a token file; /encode takes it")


def _tokens_of_arrays(item: DecodeItem, revision: str, limits: Limits) -> Tokens:
    values = {name: getattr(item, name) for name in ("latents", "codes", "coords")}
    arrays = {name: array_from_json(value, f"`{name}`", limits) for name, value in values.items() if value is not None}
    layouts = None if item.layout is None else [layout_from_json(item.layout)]
    return tokens_from_arrays(arrays, revision=revision, layouts=layouts, limits=limits)[0]


async def _order(ticket: Ticket, options: DecodeOptions, named: Named) -> Order | Problem:
    """Find the model for one item's tokens and check that it can decode them. Raises QueueUnavailable."""
    if isinstance(named.tokens, Problem):
        return named.tokens
    tokens = named.tokens
    try:
        card = await _card_for(ticket.service, tokens, options)
        _check_origin(card, tokens, options.force)
        await asyncio.to_thread(check_decodable, tokens, latent_channels=card.latent_channels, codebooks=card.codebooks)
        check_kind(card, tokens.layout.kind)
        check_cost(ticket, card, len(tokens), tokens.layout.kind)
        _check_output_size(tokens, ticket.service.settings.media)
    except (Problem, MediaError) as error:
        return as_problem(error)
    return Order(id=named.id, tokens=tokens, card=card)


async def _card_for(service: Service, tokens: Tokens, options: DecodeOptions) -> Card:
    """Return the model that is asked for, else the one that made the tokens, else the first whose shapes fit."""
    if options.model is not None:
        return await service.models.named(options.model)
    cards = await service.models.cards()
    if tokens.model and not options.force:
        if any(card.name == tokens.model for card in cards) or tokens.model in service.settings.models or not cards:
            return await service.models.named(tokens.model)
        raise Problem(
            "model_mismatch",
            f"the tokens are of the model `{tokens.model[:100]}`; there are {', '.join(card.name for card in cards)}",
        )
    # Stable: among equals the default model stays first.
    for card in sorted(cards, key=lambda card: (card.revision != tokens.revision, card.name != tokens.model)):
        if _fits(card, tokens):
            return card
    if not cards:
        return await service.models.named(service.settings.default_model)
    what = f"codes of {tokens.codes.shape[1]} codebooks" if tokens.codes is not None else _latents_text(tokens)
    takes = "; ".join(
        f"`{card.name}` takes {card.codebooks} codes a token"
        if card.codebooks
        else f"`{card.name}` takes {card.latent_channels} latents a token"
        for card in cards
    )
    raise Problem("invalid_token_file", f"no model takes {what}; {takes}")


def _fits(card: Card, tokens: Tokens) -> bool:
    if tokens.codes is not None:
        return bool(card.codebooks == tokens.codes.shape[1])
    return tokens.latents is not None and bool(card.latent_channels == tokens.latents.shape[1])


def _latents_text(tokens: Tokens) -> str:
    return "neither latents nor codes" if tokens.latents is None else f"latents of {tokens.latents.shape[1]} channels"


def _check_origin(card: Card, tokens: Tokens, force: bool) -> None:
    """Refuse tokens of another model or of other weights, unless told otherwise."""
    if force:
        return
    if tokens.model and tokens.model != card.name:
        raise Problem("model_mismatch", f"the tokens are of the model `{tokens.model[:100]}`, not of `{card.name}`")
    if tokens.revision and tokens.revision != card.revision:
        raise Problem(
            "model_mismatch",
            f"the tokens are of revision {tokens.revision[:16]} of `{card.name}`, the live one is {card.revision[:16]}",
        )


def _check_output_size(tokens: Tokens, limits: Limits) -> None:
    layout = tokens.layout
    size = layout.frames * layout.height * layout.width * 3
    if size > limits.decode_bytes:
        raise Problem(
            "item_too_large",
            f"the item decodes to {size} bytes of pixels, at most {limits.decode_bytes} are allowed",
            limit=limits.decode_bytes,
            actual=size,
        )


async def _decode_all(ticket: Ticket, names: Sequence[str], orders: Sequence[Order | Problem]) -> list[Outcome]:
    await admit(ticket, [(order.card, order.cost) for order in orders if isinstance(order, Order)])
    if ticket.fail:
        for position, order in enumerate(orders):
            if isinstance(order, Problem):
                raise replace(order, item=position)
    return await gather(ticket, names, [_decode_one(ticket, order) for order in orders])


async def _decode_one(ticket: Ticket, order: Order | Problem) -> Done:
    if isinstance(order, Problem):
        raise order
    tokens, card = order.tokens, order.card
    arrays: dict[str, Any] = {"coords": tokens.coords}
    arrays |= {"codes": tokens.codes} if tokens.codes is not None else {"latents": tokens.latents}
    # The card's name and revision: what the client said was compared, and `force` overrides it.
    meta: dict[str, wire.JSON] = {
        "layout": layout_to_json(tokens.layout),
        "model": card.name,
        "revision": card.revision,
    }
    answered, answered_meta = await run_job(ticket, card, order.cost, wire.dumps(arrays, meta))
    return Done(id=order.id, kind=tokens.layout.kind, cost=len(tokens), arrays=answered, meta=answered_meta)


async def _write(
    service: Service, media_type: str, outcomes: Sequence[Outcome], options: DecodeOptions, record: Record
) -> tuple[bytes, str]:
    """Return the body and its content type."""
    if media_type in (types.PLY, types.BYTES):
        (done,) = (outcome for outcome in outcomes if isinstance(outcome, Done))
        return (await asyncio.to_thread(splats.file, done, splats.format_of(media_type, options))).data, media_type
    if media_type == types.MULTIPART:
        files = await children.write_all(service, [_clip(outcome) for outcome in outcomes], options.quality)
        files = [
            await asyncio.to_thread(splats.file, outcome, "ply") if _is_splats(outcome) else file
            for outcome, file in zip(outcomes, files, strict=True)
        ]
        return await asyncio.to_thread(render.multipart, outcomes, record, files)
    if media_type in (*children.IMAGE_FORMATS, *children.CLIP_FORMATS):
        clip = _clip(outcomes[0])
        assert clip is not None
        return (await children.write(service, clip[1], clip[2], media_type, options.quality)).data, media_type
    max_values = service.settings.json_values
    return await asyncio.to_thread(_render, media_type, outcomes, options.floats, record, max_values), media_type


def _clip(outcome: Outcome) -> tuple[str, UInt8Array, float | None] | None:
    if isinstance(outcome, Done) and "pixels" in outcome.arrays:
        return outcome.kind, outcome.arrays["pixels"], outcome.meta.get("fps")
    return None


def _is_splats(outcome: Outcome) -> TypeGuard[Done]:
    return isinstance(outcome, Done) and "positions" in outcome.arrays


def _render(media_type: str, outcomes: Sequence[Outcome], floats: bool, record: Record, max_values: int) -> bytes:
    if media_type == types.JSON:
        return render.decoded_json(outcomes, record, floats=floats, max_values=max_values)
    (done,) = (outcome for outcome in outcomes if isinstance(outcome, Done))
    arrays = render.decoded_arrays(done)
    return render.npz(arrays) if media_type == types.NPZ else render.npy(arrays["pixels"])
