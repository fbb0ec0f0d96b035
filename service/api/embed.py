"""POST /embed: pictures, clips, 3D assets and texts in, one unit vector each out."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.api.core import service_of
from service.api.documents import embed_operation
from service.api.encoding import answer_media
from service.api.items import Deadline
from service.api.record import record_of
from service.api.schemas import EmbedBody, EmbedOptions
from service.api.uploads import read_media
from service.errors import Problem

router = APIRouter()


@router.post("/embed", openapi_extra=embed_operation(EmbedOptions, EmbedBody))
async def embed(request: Request) -> Response:
    """Turn pictures, clips, 3D assets and texts into an embedding each (unit length), in one space.

    On request also a vector for each token, of what has tokens. Texts go to a model whose card says `text`.
    """
    service, record = service_of(request), record_of(request.scope)
    deadline = Deadline.of(request, service, record)
    with record.stage("recv"):
        options, uploads = await read_media(request, service.settings, EmbedOptions, EmbedBody)
    outputs = list(dict.fromkeys(options.outputs or ["embedding"]))
    has_text = any(upload.text is not None for upload in uploads)
    if has_text and "features" in outputs:
        raise Problem("unsupported_output", "a text has an embedding, no features: those are of tokens")
    card = await service.models.for_outputs(options.model, outputs, text=has_text)
    return await answer_media(
        request,
        deadline,
        op="embed",
        options=options,
        job_options={"outputs": outputs, "fit": options.fit},
        card=card,
        uploads=uploads,
        outputs=outputs,
    )
