"""Three ways to send content (multipart, one raw body, JSON), one result: options and a list of uploads."""

from __future__ import annotations

import asyncio
import binascii
import io
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from posixpath import splitext
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import orjson
from pydantic import BaseModel
from starlette.requests import Request

from service.api.multipart import Form, FormReader, Part, boundary_of
from service.api.negotiation import ALIASES, NPZ, SAFETENSORS
from service.api.schemas import NO_TEXT, EmbedItem, MediaItem, shown, type_of, validate
from service.errors import Problem
from service.settings import Settings

URLENCODED = "application/x-www-form-urlencoded"
"""What curl sends with -d and --data-binary unless told otherwise."""
UNDECLARED = {"", "application/octet-stream", URLENCODED, "binary/octet-stream"}
"""Types that say nothing: the first bytes decide."""
CAMERA_FILES = ("transforms.json", "cameras.json")
"""A form that has one of them is one asset: its files are the posed renders of it."""
DEPTH_SUFFIXES = (".npy", ".exr")
DEPTH_STEM = "_depth"
"""000_depth.png is the depth map of 000.png."""
THREAD_BYTES = 256 * 1024
"""Bodies from this size on are parsed in a thread; below, the switch costs more than the parsing."""

GLTF = "model/gltf+json"
"""A file, though JSON."""
ARCHIVES = ("application/zip", "application/x-zip-compressed", NPZ)
TEXT_FIELD = re.compile(rb"(?:[a-z_]{1,40}=[!-%'-~]{0,200}&){0,20}text=")
"""A urlencoded form with a text, at its start; no file begins so."""
DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.ASCII)

S = TypeVar("S", bound=BaseModel)


@dataclass(frozen=True, kw_only=True)
class Upload:
    """One file or text as it came.

    declared: media type that a file's sender stated, None if none. text: None of a file. problem: why it has none of
    both.
    """

    id: str
    data: bytes = b""
    declared: str | None = None
    text: str | None = None
    problem: Problem | None = None


@dataclass(frozen=True, kw_only=True)
class Content:
    """A request's content before anybody looked into it: either uploads (with options) or a JSON object with both."""

    options: dict[str, Any]
    uploads: list[Upload] | None = None
    body: dict[str, Any] | None = None


async def read_content(request: Request, settings: Settings, *, takes_text: bool = False) -> Content:
    """Read the body in whichever of the three forms it has. Raises Problem; nothing is decoded yet.

    takes_text: form fields named `text` are items, too, after the files; without a file the form may be urlencoded.
    """
    header = request.headers.get("content-type", "")
    media_type = header.partition(";")[0].strip().lower()
    query = _collect((name, value) for name, value in request.query_params.multi_items())
    if media_type == "multipart/form-data":
        return await _read_multipart(request, header, query, settings, takes_text)
    data = b"".join([chunk async for chunk in request.stream()])
    if not data:
        raise Problem("truncated_body", "the body is empty; send a file, JSON or multipart/form-data")
    if media_type == "application/json" or (media_type.endswith("+json") and media_type != GLTF):
        parse = _parse_object
        body = await asyncio.to_thread(parse, data, settings) if len(data) >= THREAD_BYTES else parse(data, settings)
        return Content(options={}, body=_merge(query, body))
    if takes_text and media_type == URLENCODED and TEXT_FIELD.match(data):
        return _read_urlencoded(data, query, settings)
    if media_type in UNDECLARED:
        declared = None
    elif (
        media_type.startswith(("image/", "video/", "model/"))
        or media_type in ARCHIVES
        or ALIASES.get(media_type, media_type) == SAFETENSORS
    ):
        declared = media_type
    else:
        raise Problem(
            "unsupported_media_type",
            f"the Content-Type {media_type[:100]!r} is not offered; send multipart/form-data, application/json, "
            f"an image, video or model type, application/zip, {SAFETENSORS} or application/octet-stream",
        )
    return Content(options=query, uploads=[Upload(id="0", data=data, declared=declared)])


async def read_media(
    request: Request, settings: Settings, options_schema: type[S], body_schema: type[S]
) -> tuple[S, list[Upload]]:
    """Read pictures, clips and 3D assets, and texts for embed, with their options. Raises Problem."""
    content = await read_content(request, settings, takes_text="text" in body_schema.model_fields)
    if content.body is None:
        options, uploads = validate(options_schema, content.options), content.uploads or []
        _check_cameras([upload.id for upload in uploads if upload.text is None])
    else:
        options = validate(body_schema, content.body)
        uploads = await asyncio.to_thread(_uploads_of_body, options, settings)
    return options, uploads


def decode_base64(text: str, *, what: str) -> tuple[bytes, str | None]:
    """Decode base64, padded or not, or a base64 data: URL to bytes and the declared media type.

    what: the field's name for errors. Raises Problem invalid_parameter.
    """
    declared = None
    if text[:5].lower() == "data:":
        match = DATA_URL.match(text[:300])
        if match is None:
            raise Problem("invalid_parameter", f"{what} is a data: URL, but not of the form data:TYPE;base64,CONTENT")
        declared, text = match[1], text[match.end() :]
    elif "://" in text[:20]:
        raise Problem(
            "invalid_parameter", f"{what} is an address; addresses are not fetched, send the content in base64"
        )
    try:
        data = binascii.a2b_base64(text.encode("ascii") + b"=" * (-len(text) % 4), strict_mode=True)
    except (binascii.Error, UnicodeEncodeError):
        raise Problem(
            "invalid_parameter", f"{what} is not valid base64: standard alphabet, no spaces, no line breaks"
        ) from None
    if not data:
        raise Problem("truncated_body", f"{what} is empty")
    return data, None if declared is None or declared.lower() in UNDECLARED else declared.lower()


async def _read_multipart(
    request: Request, header: str, query: dict[str, Any], settings: Settings, takes_text: bool
) -> Content:
    # All files of posed renders are one item; whether they are is known when the file of cameras has come.
    more = max(0, 2 * settings.media.views + 1 - settings.request_items)
    reader = FormReader(
        boundary_of(header),
        max_parts=settings.request_parts + more,
        max_files=settings.request_items + more,
        field_bytes=settings.part_bytes,
    )
    form = await reader.read(request.stream())
    is_set = any(PurePosixPath(part.filename or "").name in CAMERA_FILES for part in form.files)
    if not is_set:
        form.check_parts(settings.request_parts)
    options = query
    values, texts = [], []
    for part in form.fields:
        if part.name == "request":
            options = _merge(options, _parse_object(part.data, settings, what="the part `request`"))
        elif part.name == "text":
            texts.append(part)
        else:
            values.append((part.name, _text_of(part)))
    options = _merge(options, _collect(values))
    if texts and not takes_text:
        raise Problem("invalid_parameter", f"`text`: {NO_TEXT}")
    if not form.files and not texts:
        parts = "no part named `file` or `text`" if takes_text else "no part named `file`"
        raise Problem("invalid_parameter", f"there is {parts}; {_describe(form)}")
    if is_set:
        uploads = [await asyncio.to_thread(_set_of, form.files)]
    else:
        uploads = [_upload_of(position, part) for position, part in enumerate(form.files)]
    check_count(len(uploads) + len(texts), settings)
    for part in texts:
        uploads.append(_text_part(str(len(uploads)), part, settings))
    return Content(options=options, uploads=uploads)


def _read_urlencoded(data: bytes, query: dict[str, Any], settings: Settings) -> Content:
    limit = settings.request_parts
    if (count := data.count(b"&") + 1) > limit:  # before they are taken apart
        raise Problem("too_many_items", f"at most {limit} fields are allowed", limit=limit, actual=count)
    if len(data) > (limit := settings.json_bytes):
        raise Problem(
            "body_too_large",
            f"the body has {len(data)} bytes; urlencoded at most {limit} are allowed",
            limit=limit,
            actual=len(data),
        )
    pairs = [Part(name=name.decode("utf-8", "replace"), data=value) for name, value in parse_qsl(data, True)]
    texts = [part for part in pairs if part.name == "text"]
    check_count(len(texts), settings)
    values = _collect((part.name, _text_of(part)) for part in pairs if part.name != "text")
    uploads = [_text_part(str(position), part, settings) for position, part in enumerate(texts)]
    return Content(options=_merge(query, values), uploads=uploads)


def _set_of(parts: Sequence[Part]) -> Upload:
    """Posed renders that came as parts, as the zip of them that could have been sent instead."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for position, part in enumerate(parts):
            archive.writestr(zipfile.ZipInfo(part.filename or str(position)), part.data)
    return Upload(id="renders", data=buffer.getvalue())


def _check_cameras(names: Sequence[str]) -> None:
    """Raise Problem where files of these names are posed renders, but came without the file of cameras."""
    stems = {splitext(name)[0] for name in names}
    for name in names:
        stem, suffix = splitext(name)
        is_beside = stem.endswith(DEPTH_STEM) and stem.removesuffix(DEPTH_STEM) in stems
        # One that belongs to no picture among pictures is an item that cannot be read, and fails alone.
        is_array = suffix.lower() in DEPTH_SUFFIXES
        has_picture = any(other != name and splitext(other)[0] == stem for other in names)
        if is_beside or (is_array and (has_picture or all(splitext(other)[1] == suffix for other in names))):
            raise Problem(
                "view_mismatch",
                f"{name[:100]!r} is taken to be a depth map of posed renders, of which the camera file is missing: "
                f"send {' or '.join(f'`{file}`' for file in CAMERA_FILES)} in the same form",
            )


def _upload_of(position: int, part: Part) -> Upload:
    name = part.filename or str(position)
    label = "".join(character for character in name if character.isprintable())[:200] or str(position)
    declared = None if (part.content_type or "") in UNDECLARED else part.content_type
    problem = None if part.data else Problem("truncated_body", "the file is empty")
    return Upload(id=label, data=part.data, declared=declared, problem=problem)


def _text_part(name: str, part: Part, settings: Settings) -> Upload:
    try:
        return _text_upload(name, _text_of(part), settings)
    except Problem as problem:
        return Upload(id=name, text="", problem=problem)


def _text_upload(name: str, given: object, settings: Settings) -> Upload:
    """A text as an item; given: what should be one."""
    limit = settings.media.text_characters
    text = given.strip() if isinstance(given, str) else ""
    if 1 <= len(text) <= limit:
        return Upload(id=name, text=text)
    actual = len(text) if isinstance(given, str) else None
    what = f"given is {type_of(given)}" if actual is None else f"the text {shown(text)} has {actual} characters"
    detail = f"{what}; a text has 1 to {limit} characters, space around it not counted"
    return Upload(id=name, text="", problem=Problem("invalid_parameter", detail, limit=limit, actual=actual))


def _base64_upload(name: str, field: str, given: str) -> Upload:
    try:
        data, declared = decode_base64(given, what=f"`{field}`")
    except Problem as problem:
        return Upload(id=name, problem=problem)
    return Upload(id=name, data=data, declared=declared)


def _uploads_of_body(body: Any, settings: Settings) -> list[Upload]:
    if body.items is not None:
        check_count(len(body.items), settings)
        return [_upload_of_item(position, item, settings) for position, item in enumerate(body.items)]
    field = next(name for name in ("file", "data", "text") if getattr(body, name, None) is not None)
    value = getattr(body, field)
    values = value if isinstance(value, list) else [value]
    check_count(len(values), settings)
    if field == "text":
        return [_text_upload(str(position), given, settings) for position, given in enumerate(values)]
    if isinstance(value, str):
        return [_base64_upload("0", field, value)]
    return [_base64_upload(str(position), f"{field}.{position}", given) for position, given in enumerate(values)]


def _upload_of_item(position: int, item: MediaItem | EmbedItem, settings: Settings) -> Upload:
    name = str(position) if item.id is None else item.id
    if item.data is not None:
        return _base64_upload(name, f"items.{position}.data", item.data)
    return _text_upload(name, getattr(item, "text", None), settings)


def check_count(count: int, settings: Settings) -> None:
    """Raise Problem unless a request has between one and the allowed number of items."""
    if count == 0:
        raise Problem("invalid_parameter", "`items` is empty; send at least one")
    if count > settings.request_items:
        raise Problem(
            "too_many_items",
            f"{count} items are too many; at most {settings.request_items} are allowed in one request",
            limit=settings.request_items,
            actual=count,
        )


def _parse_object(data: bytes, settings: Settings, *, what: str = "the body") -> dict[str, Any]:
    """Parse a JSON object within bounds of size, number of values and depth; of equal names the last counts."""
    if len(data) > settings.json_bytes:
        raise Problem(
            "body_too_large",
            f"{what} has {len(data)} bytes; as JSON at most {settings.json_bytes} are allowed",
            limit=settings.json_bytes,
            actual=len(data),
        )
    # Counted before parsing: a body of numbers takes twenty times its size as Python objects.
    values = data.count(b",") + data.count(b"[") + data.count(b"{")
    if values > settings.json_values:
        raise Problem(
            "body_too_large",
            f"{what} has more than {settings.json_values} values; send tensors as base64 or as a token file",
            limit=settings.json_values,
            actual=values,
        )
    try:
        parsed = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        place = f"(line {error.lineno}, column {error.colno})"
        if "infinity" in error.msg or error.doc.startswith(("NaN", "Infinity"), error.pos):
            raise Problem("non_finite_input", f"{what} has a number that is not finite {place}") from None
        raise Problem("invalid_json", f"{what} is not valid JSON {place}") from None
    if not isinstance(parsed, dict):
        raise Problem("invalid_parameter", f"{what} must be a JSON object")
    level: list[Any] = [parsed]
    for _ in range(settings.json_depth):
        level = [
            child
            for container in level
            for child in (container.values() if isinstance(container, dict) else container)
            if isinstance(child, dict | list)
        ]
        if not level:
            return parsed
    raise Problem(
        "invalid_json", f"{what} is nested deeper than {settings.json_depth} levels", limit=settings.json_depth
    )


def _collect(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Gather text parameters; only `outputs` may be repeated."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name == "outputs":
            values.setdefault(name, []).append(value)
        elif name in values:
            raise Problem("invalid_parameter", f"`{name[:100]}` is given twice")
        else:
            values[name] = value
    return values


def _merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    for name in second:
        if name in first:
            raise Problem(
                "invalid_parameter", f"`{name[:100]}` is given twice, in the query or a field and in the body"
            )
    return {**first, **second}


def _text_of(part: Part) -> str:
    try:
        return part.data.decode("utf-8")
    except UnicodeDecodeError:
        raise Problem("invalid_parameter", f"the field `{part.name[:100]}` is not UTF-8 text") from None


def _describe(form: Form) -> str:
    names = sorted({part.name[:50] for part in form.fields})
    return f"the parts are named {', '.join(names)}" if names else "the body has no part"
