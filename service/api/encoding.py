"""What /encode and /embed share: from uploads to an answer in the format that the client accepts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response

from media.sniff import Probe
from media.types import Text, UInt8Array
from service.api import children, render, splats
from service.api import negotiation as types
from service.api.core import Service, service_of
from service.api.items import (
    THREAD_BYTES,
    Deadline,
    Done,
    Found,
    Outcome,
    Ticket,
    check_kind,
    encode_all,
    probe_all,
    settle_record,
)
from service.api.models import Card
from service.api.record import Record, record_of
from service.api.schemas import EmbedOptions, EncodeOptions
from service.api.uploads import Upload
from service.errors import Problem

PIXELS = "a reconstruction is pixels, which a token file, npy and npz do not hold; leave it out of `outputs` for those"

TEXTS = "a text has no tokens for a token file"


async def answer_media(
    request: Request,
    deadline: Deadline,
    *,
    op: Literal["encode", "embed"],
    options: EncodeOptions | EmbedOptions,
    job_options: dict[str, Any],
    card: Card,
    uploads: Sequence[Upload],
    outputs: Sequence[str],
) -> Response:
    """Run the uploads through `card`'s workers and write the answer. Raises Problem and what the queue raises."""
    service, record = service_of(request), record_of(request.scope)
    record.items, record.model, record.revision = len(uploads), card.name, card.revision
    probes = await probe_all(service, record, uploads)
    single = probes[0] if len(probes) == 1 else None
    if isinstance(single, Problem):
        raise single
    if isinstance(single, Probe):
        check_kind(card, single.kind)
        if single.kind == "voxels" and "reconstruction" in outputs and not card.gaussian_decoder:
            raise Problem(
                "unsupported_output",
                f"`{card.name}` has no Gaussian decoder here: a reconstruction of 3D needs one",
            )
    media_type = types.choose(
        request.headers.get("accept"),
        offers(outputs, probes),
        result=f"{', '.join(outputs)} of {_count(len(uploads))}",
        why=PIXELS if "reconstruction" in outputs else TEXTS if _has_text(probes) else "",
    )
    ticket = Ticket(
        service=service,
        record=record,
        deadline=deadline,
        op=op,
        options=job_options,
        fail=fails_whole(options.on_error, media_type, len(uploads)),
    )

    async def work() -> bytes:
        outcomes = await encode_all(
            ticket, card, uploads, probes, keep_pixels="reconstruction" in outputs, up=options.up
        )
        settle_record(ticket, outcomes)
        if op == "encode":
            _note_splats(outcomes, card, record)
        with record.stage("encode"):
            return await _write(service, media_type, outcomes, outputs, options, record)

    return Response(await ticket.race(request, work()), media_type=media_type)


def offers(outputs: Sequence[str], probes: Sequence[Found]) -> list[str]:
    """Return the formats that these outputs of these items can be given as, the default first."""
    arrays = [name for name in outputs if name != "reconstruction"]
    single = probes[0] if len(probes) == 1 else None
    if "reconstruction" in outputs:
        if arrays or not isinstance(single, Probe):
            return [types.JSON]
        if single.kind == "voxels":
            return [types.JSON, types.PLY]
        return [types.JSON, *children.file_types(single.kind, single.frames or 0)]
    found = [types.JSON] if _has_text(probes) else [types.JSON, types.SAFETENSORS]
    if len(arrays) == 1 and (single is not None or arrays == ["embedding"]):
        found.append(types.NPY)
    if single is not None or arrays == ["embedding"]:
        found.append(types.NPZ)
    return found


def fails_whole(on_error: Literal["partial", "fail"] | None, media_type: str, count: int) -> bool:
    """Tell whether one bad item fails the request: when asked to, when it is alone, and where a format cannot tell.

    Raises Problem invalid_parameter when `partial` was asked of such a format.
    """
    if count == 1 or on_error == "fail":
        return True
    if media_type in (types.JSON, types.MULTIPART):
        return False
    if on_error == "partial":
        raise Problem(
            "invalid_parameter",
            f"`on_error`: {media_type} cannot carry a problem beside a result; accept {types.JSON} for `partial`",
        )
    return True


async def _write(
    service: Service,
    media_type: str,
    outcomes: Sequence[Outcome],
    outputs: Sequence[str],
    options: EncodeOptions | EmbedOptions,
    record: Record,
) -> bytes:
    if media_type == types.PLY:
        (done,) = (outcome for outcome in outcomes if isinstance(outcome, Done))
        return (await asyncio.to_thread(splats.file, done, "ply", "reconstruction.")).data
    clips = [_reconstruction(outcome) for outcome in outcomes]
    if media_type in (*children.IMAGE_FORMATS, *children.CLIP_FORMATS):
        (clip,) = clips
        assert clip is not None
        return (await children.write(service, clip[1], clip[2], media_type)).data
    files = await children.write_all(service, clips)
    for position, outcome in enumerate(outcomes):
        if isinstance(outcome, Done) and "reconstruction.positions" in outcome.arrays:
            files[position] = await asyncio.to_thread(splats.file, outcome, "ply", "reconstruction.")
    work = partial(_render, media_type, outcomes, outputs, options, record, files, service.settings.json_values)
    size = sum(array.nbytes for outcome in outcomes if isinstance(outcome, Done) for array in outcome.arrays.values())
    return work() if size < THREAD_BYTES and not options.floats else await asyncio.to_thread(work)


def _render(
    media_type: str,
    outcomes: Sequence[Outcome],
    outputs: Sequence[str],
    options: EncodeOptions | EmbedOptions,
    record: Record,
    files: Sequence[children.File | None],
    max_values: int,
) -> bytes:
    if media_type == types.JSON:
        return render.encoded_json(outcomes, outputs, record, files, floats=options.floats, max_values=max_values)
    good = [outcome for outcome in outcomes if isinstance(outcome, Done)]
    if media_type == types.SAFETENSORS:
        sample, seed = (options.sample, options.seed) if isinstance(options, EncodeOptions) else (False, None)
        return render.token_file(good, outputs, record, sample=sample, seed=seed)
    if media_type == types.NPZ:
        return render.npz(render.encoded_arrays(good, outputs))
    return render.npy(render.encoded_arrays(good, outputs)[outputs[0]])


def _note_splats(outcomes: Sequence[Outcome], card: Card, record: Record) -> None:
    """Say of 3D assets what their tokens are worth once they are decoded: who embeds need not know."""
    for outcome in outcomes:
        if isinstance(outcome, Done) and outcome.kind == "voxels" and card.splats_note:
            outcome.meta["notes"] = [*(outcome.meta.get("notes") or ()), card.splats_note]
            record.note = card.splats_note


def _reconstruction(outcome: Outcome) -> tuple[str, UInt8Array, float | None] | None:
    if isinstance(outcome, Done) and "reconstruction.pixels" in outcome.arrays:
        return outcome.kind, outcome.arrays["reconstruction.pixels"], outcome.meta["layout"].get("fps")
    return None


def _has_text(probes: Sequence[Found]) -> bool:
    return any(isinstance(found, Text) for found in probes)


def _count(count: int) -> str:
    return "one item" if count == 1 else f"{count} items"
