"""Two plain HTML pages without scripts: the documentation (from the OpenAPI document) and one for each error code."""

from __future__ import annotations

from html import escape
from typing import Any

from service.errors import CODES, CodeInfo

STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "code,pre{font-family:ui-monospace,monospace;background:#f3f3f3}pre{padding:.8rem;overflow-x:auto}"
    "table{border-collapse:collapse;width:100%}td,th{border-bottom:1px solid #ddd;padding:.3rem .6rem;text-align:left;"
    "vertical-align:top}h2{margin-top:2.5rem}"
)
EXAMPLES = """# a picture to a token file, and back
curl -H 'Accept: application/vnd.safetensors' -F file=@photo.jpg {base}/v1/encode -o photo.tokens
curl --data-binary @photo.tokens {base}/v1/decode -o photo.png

# several files, an embedding each
curl -F file=@a.png -F file=@clip.mp4 {base}/v1/embed

# words, in the same space: the cosine with a picture's embedding says how well they fit it
curl -F file=@a.png -F text='a bird' -F text='a castle' {base}/v1/embed
curl -H 'Content-Type: application/json' -d '{{"text": ["a bird", "a castle"]}}' {base}/v1/embed"""


def docs_page(document: dict[str, Any], base: str) -> str:
    """Return the documentation; base: the address under which the reader sees the service."""
    parts = [
        f"<p>{escape(document['info'].get('description', ''))}</p>",
        "<p>The whole contract is at <a href=/openapi.json>/openapi.json</a>.</p>",
        f"<pre>{escape(EXAMPLES.format(base=base))}</pre>",
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(_operation(path, method, operation))
    rows = "".join(
        f"<tr><td>{info.status}<td><a href=/errors/{code}><code>{code}</code></a><td>{escape(info.title)}"
        for code, info in CODES.items()
    )
    parts.append(f"<h2>Errors</h2><table><tr><th>status<th>code<th>meaning{rows}</table>")
    return _page(document["info"]["title"], "".join(parts))


def error_page(code: str, info: CodeInfo) -> str:
    """Return the page that a problem's `type` points to."""
    return _page(code, f"<p>HTTP status {info.status}. {escape(info.title)}.</p><p>{escape(info.what)}</p>")


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    text = [f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation.get('description', ''))}</p>"]
    body = operation.get("requestBody", {}).get("content", {})
    if body:
        text.append(f"<p>Takes {_codes(body)}.</p>")
    answer = operation.get("responses", {}).get("200", {}).get("content", {})
    if answer:
        text.append(f"<p>Gives {_codes(answer)}.</p>")
    parameters = operation.get("parameters", [])
    if parameters:
        rows = "".join(_row(entry) for entry in parameters)
        text.append(f"<table><tr><th>option<th>values<th>meaning{rows}</table>")
    return "".join(text)


def _row(parameter: dict[str, Any]) -> str:
    cells = (_values(parameter["schema"]), parameter.get("description", ""))
    return f"<tr><td><code>{escape(parameter['name'])}</code>" + "".join(f"<td>{escape(cell)}" for cell in cells)


def _values(schema: dict[str, Any]) -> str:
    for choice in schema.get("anyOf", [schema]):
        inner = choice.get("items", choice)
        if "enum" in inner:
            return ", ".join(map(str, inner["enum"]))
        if choice.get("type") not in (None, "null"):
            return str(choice["type"])
    return ""


def _codes(names: dict[str, Any]) -> str:
    return ", ".join(f"<code>{escape(name)}</code>" for name in names)


def _page(title: str, body: str) -> str:
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"
    return f"{head}<h1>{escape(title)}</h1>{body}"
