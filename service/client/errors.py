"""What can go wrong between a client and the service; all are `ClientError`."""

from __future__ import annotations

from typing import Any


class ClientError(Exception):
    """A call that has no result."""


class UnreachableError(ClientError):
    """The service cannot be reached, or the connection broke before an answer had come."""


class AnswerError(ClientError):
    """The service answered with something that this client does not understand."""


class ProblemError(ClientError):
    """The service refused or failed, and said why.

    status: of HTTP. code: stable word for programs ("queue_full", "image_too_large", ...). detail: for people.
    item: position of the bad item, None if it is not about one. limit, actual: what is allowed and what was given.
    retry_after: seconds after which it may work, None if not said. request_id: for the operator's log.
    """

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        *,
        item: int | None = None,
        limit: float | str | None = None,
        actual: float | str | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
    ) -> None:
        place = f" (item {item})" if item is not None else ""
        super().__init__(f"{status} {code}{place}: {detail}")
        self.status = status
        self.code = code
        self.detail = detail
        self.item = item
        self.limit = limit
        self.actual = actual
        self.retry_after = retry_after
        self.request_id = request_id

    @classmethod
    def of(
        cls, status: int, document: dict[str, Any], *, retry_after: float | None, request_id: str | None
    ) -> ProblemError:
        """Build from a problem document (RFC 9457); members that are missing or of a wrong type are left out."""
        item = document.get("item")
        return cls(
            status,
            str(document.get("code", "unknown")),
            str(document.get("detail") or document.get("title") or "no reason was given"),
            item=item if isinstance(item, int) else None,
            limit=document.get("limit"),
            actual=document.get("actual"),
            retry_after=retry_after,
            request_id=request_id,
        )
