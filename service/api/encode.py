"""POST /encode: pictures, clips and 3D assets in, tokens out."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.api.core import service_of
from service.api.documents import encode_operation
from service.api.encoding import answer_media
from service.api.items import Deadline
from service.api.models import Card
from service.api.record import record_of
from service.api.schemas import EncodeBody, EncodeOptions
from service.api.uploads import read_media

router = APIRouter()


@router.post("/encode", openapi_extra=encode_operation(EncodeOptions, EncodeBody))
async def encode(request: Request) -> Response:
    """Turn pictures, clips and 3D assets into latents, codes, an embedding, features or a reconstruction."""
    service, record = service_of(request), record_of(request.scope)
    deadline = Deadline.of(request, service, record)
    with record.stage("recv"):
        options, uploads = await read_media(request, service.settings, EncodeOptions, EncodeBody)
    card = await service.models.for_outputs(options.model, options.outputs or [])
    outputs = resolve_outputs(options.outputs, card)
    return await answer_media(
        request,
        deadline,
        op="encode",
        options=options,
        job_options={"outputs": outputs, "fit": options.fit, "sample": options.sample, "seed": options.seed},
        card=card,
        uploads=uploads,
        outputs=outputs,
    )


def resolve_outputs(asked: Sequence[str] | None, card: Card) -> list[str]:
    """Return what the model is asked for, each name once; by default what its decoder takes.

    Of a model with codes the latents are a function of the codes: who asks for both gets the codes.
    """
    if asked is None:
        return ["codes" if "codes" in card.outputs else "latents"]
    outputs = list(dict.fromkeys(asked))
    return [name for name in outputs if not (name == "latents" and "codes" in outputs)]
