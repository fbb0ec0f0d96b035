"""multipart/form-data read as it streams in: parts named `file`, and small fields, each with its own bound."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.errors import Problem

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

PART_HEADER_BYTES = 8 * 1024


@dataclass(kw_only=True)
class Part:
    """One part. content_type in lower case without parameters; filename as the client gave it."""

    name: str = ""
    filename: str | None = None
    content_type: str | None = None
    data: bytes = b""


@dataclass
class Form:
    """What a multipart body held, in order."""

    files: list[Part] = field(default_factory=list)
    fields: list[Part] = field(default_factory=list)

    def check_parts(self, most: int, *, coming: int = 0) -> None:
        """Raise Problem too_many_items where there are, or will be, more parts than that."""
        if len(self.files) + len(self.fields) + coming > most:
            raise Problem("too_many_items", f"at most {most} parts are allowed", limit=most)


class FormReader:
    """Push parser of one body. More parts, files or bytes a field than allowed are refused in mid-stream."""

    def __init__(self, boundary: bytes, *, max_parts: int, max_files: int, field_bytes: int) -> None:
        self.form = Form()
        self._max_parts = max_parts
        self._max_files = max_files
        self._field_bytes = field_bytes
        self._ended = False
        self._part = Part()
        self._chunks: list[bytes] = []
        self._size = 0
        self._header = (bytearray(), bytearray())
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._on_part_begin,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_end": self._on_end,
        }
        self._parser = MultipartParser(boundary, callbacks, max_header_size=PART_HEADER_BYTES)

    async def read(self, stream: AsyncIterator[bytes]) -> Form:
        """Read all. Raises Problem invalid_multipart, too_many_items, body_too_large or invalid_parameter."""
        try:
            async for chunk in stream:
                self._parser.write(chunk)
            self._parser.finalize()
        except FormParserError:
            raise Problem("invalid_multipart", "a boundary or the header of a part is malformed") from None
        if not self._ended:
            raise Problem("invalid_multipart", "the closing boundary is missing: the body ends early")
        return self.form

    def _on_part_begin(self) -> None:
        self.form.check_parts(self._max_parts, coming=1)
        self._part, self._chunks, self._size = Part(), [], 0

    def _on_header_end(self) -> None:
        name, value = (bytes(side) for side in self._header)
        for side in self._header:
            side.clear()
        if name.lower() == b"content-disposition":
            _, options = parse_options_header(value)
            self._part.name = options.get(b"name", b"").decode("utf-8", "replace")
            if b"filename" in options:
                self._part.filename = options[b"filename"].decode("utf-8", "replace")
        elif name.lower() == b"content-type":
            self._part.content_type = parse_options_header(value)[0].decode("latin-1").strip().lower()

    def _on_headers_finished(self) -> None:
        if not self._part.name:
            raise Problem("invalid_multipart", "a part has no name in its Content-Disposition header")
        if self._part.name == "file":
            if len(self.form.files) >= self._max_files:
                raise Problem("too_many_items", f"at most {self._max_files} files are allowed", limit=self._max_files)
        elif self._part.filename is not None and self._part.name not in ("request", "text"):
            shown = self._part.name[:100]
            raise Problem("invalid_parameter", f"unknown file part `{shown}`; parts with content are named `file`")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        if self._part.name != "file" and self._size > self._field_bytes:
            raise Problem(
                "body_too_large",
                f"the part `{self._part.name[:100]}` is over {self._field_bytes} bytes",
                limit=self._field_bytes,
            )
        self._chunks.append(data[start:end])

    def _on_part_end(self) -> None:
        self._part.data = b"".join(self._chunks)
        self._chunks = []
        (self.form.files if self._part.name == "file" else self.form.fields).append(self._part)

    def _on_end(self) -> None:
        self._ended = True


def boundary_of(content_type: str) -> bytes:
    """Return the boundary in a Content-Type header. Raises Problem invalid_multipart."""
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:  # RFC 2046 section 5.1.1
        raise Problem("invalid_multipart", "the Content-Type header has no boundary of 1 to 70 characters")
    return boundary
