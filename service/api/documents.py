"""The OpenAPI document's hand-written parts: bodies that are streamed are beyond what the framework can see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.api import negotiation as types
from service.api.answers import DecodeAnswer, EncodeAnswer, ProblemDocument
from service.api.schemas import DecodeBody, EmbedBody, EncodeBody
from service.errors import CODES, PROBLEM_JSON

REF = "#/components/schemas/{model}"
MODELS: tuple[type[BaseModel], ...] = (EncodeBody, EmbedBody, DecodeBody, EncodeAnswer, DecodeAnswer, ProblemDocument)
BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}

TEXT: dict[str, Any] = {
    "type": "array",
    "items": {"type": "string"},
    "description": "Plain English words; answered after the files. `text_characters` of /v1/limits bounds each.",
}
EMBED_EXAMPLES: dict[str, Any] = {
    "texts": {"value": {"text": ["a bird", "a castle"], "floats": True}},
    "a text beside a picture": {"value": {"items": [{"id": "query", "text": "a bird"}, {"data": "<base64>"}]}},
}

ANY = "application/octet-stream"
TIMEOUT: dict[str, Any] = {
    "name": "Request-Timeout",
    "in": "header",
    "required": False,
    "description": "Seconds that the answer may take, up to `max_timeout_s` of /v1/limits.",
    "schema": {"type": "number", "exclusiveMinimum": 0},
}
RESULT = "The result, in the format that `Accept` asks for."
PICTURES = ("image/png", "image/jpeg", "image/webp", "image/avif", "image/gif")
ASSETS = ("model/gltf-binary", "model/gltf+json", "model/obj", "model/stl", "model/ply", "application/zip")
CLIPS = ("video/mp4", "video/quicktime", "video/webm", "video/x-matroska", "video/x-msvideo")
TENSORS = (types.JSON, types.SAFETENSORS, types.NPY, types.NPZ)
SPLATS = (types.PLY, types.BYTES)
FILES = (types.PNG, types.WEBP, types.JPEG, types.MP4, types.MKV)


def encode_operation(options: type[BaseModel], body: type[BaseModel]) -> dict[str, Any]:
    """Describe an operation that takes pictures, clips and 3D assets, and may give them back."""
    result = f"{RESULT} Pictures, clips and PLY: with `outputs=reconstruction` of one item."
    answers = (*TENSORS, *FILES, types.PLY)
    return _operation(options, body, EncodeAnswer, [*PICTURES, *CLIPS, *ASSETS, ANY], answers, result)


def embed_operation(options: type[BaseModel], body: type[BaseModel]) -> dict[str, Any]:
    """Describe an operation that takes pictures, clips, 3D assets and texts, and gives tensors only."""
    result = f"{RESULT} A token file has no room for texts."
    operation = _operation(options, body, EncodeAnswer, [*PICTURES, *CLIPS, *ASSETS, ANY], TENSORS, result)
    content = operation["requestBody"]["content"]
    form = content["multipart/form-data"]["schema"]
    form["properties"] = {**form["properties"], "text": TEXT}
    del form["required"]  # a form of texts alone is one, too
    content[types.JSON]["examples"] = EMBED_EXAMPLES
    return operation


def decode_operation(options: type[BaseModel], body: type[BaseModel]) -> dict[str, Any]:
    """Describe an operation that takes tokens."""
    answers = (*FILES, *SPLATS, types.JSON, types.NPY, types.NPZ, types.MULTIPART)
    return _operation(options, body, DecodeAnswer, [types.SAFETENSORS, ANY], answers)


def build_openapi(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document of an application, built once."""
    if not app.openapi_schema:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        _, definitions = models_json_schema([(model, "validation") for model in MODELS], ref_template=REF)
        document.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
        app.openapi_schema = document
    return app.openapi_schema


def _operation(
    options: type[BaseModel],
    body: type[BaseModel],
    answer: type[BaseModel],
    raw: Sequence[str],
    answers: Sequence[str],
    result: str = RESULT,
) -> dict[str, Any]:
    fields = options.model_json_schema()["properties"]
    form = {
        "type": "object",
        "required": ["file"],
        "properties": {"file": {"type": "array", "items": BINARY["schema"]}, **fields},
    }
    content = {"multipart/form-data": {"schema": form}, types.JSON: _reference(body)} | dict.fromkeys(raw, BINARY)
    by_status: dict[int, list[str]] = {}
    for code, info in CODES.items():
        if info.status != 499:  # nobody is there to see it
            by_status.setdefault(info.status, []).append(code)
    responses: dict[str, Any] = {
        "200": {
            "description": result,
            "content": dict.fromkeys(answers, BINARY) | {types.JSON: _reference(answer)},
        }
    }
    for status, codes in sorted(by_status.items()):
        responses[str(status)] = {
            "description": ", ".join(codes),
            "content": {PROBLEM_JSON: _reference(ProblemDocument)},
        }
    return {
        "requestBody": {"required": True, "content": content},
        "parameters": [
            {
                "name": name,
                "in": "query",
                "required": False,
                "description": schema.get("description", ""),
                "schema": schema,
            }
            for name, schema in fields.items()
        ]
        + [TIMEOUT],
        "responses": responses,
    }


def _reference(model: type[BaseModel]) -> dict[str, Any]:
    return {"schema": {"$ref": REF.format(model=model.__name__)}}
