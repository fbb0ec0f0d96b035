"""Accept headers against offers."""

from __future__ import annotations

import pytest

from service.api.negotiation import JPEG, JSON, PNG, SAFETENSORS, choose
from service.errors import Problem


@pytest.mark.parametrize(
    ("header", "chosen"),
    [
        (None, PNG),
        ("", PNG),
        ("*/*", PNG),
        ("image/*", PNG),
        ("application/json", JSON),
        ("application/json, */*;q=0.5", JSON),
        ("application/*", JSON),
        ("image/png;q=0.1, image/jpeg", JPEG),
        ("image/png;q=0, */*", JPEG),
        ("image/*;q=0, */*", JSON),
        ("application/octet-stream", SAFETENSORS),
        ("application/x-safetensors", SAFETENSORS),
        ("IMAGE/JPEG", JPEG),
        ("text/html, image/jpg ; q=0.3", JPEG),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8", PNG),
    ],
)
def test_choice(header: str | None, chosen: str) -> None:
    assert choose(header, [PNG, JPEG, JSON, SAFETENSORS], result="it") == chosen


@pytest.mark.parametrize("header", ["text/html", "*/*;q=0", "image/webp", "application/json;q=0.0"])
def test_nothing_fits(header: str) -> None:
    with pytest.raises(Problem) as caught:
        choose(header, [PNG, JSON], result="it")
    assert caught.value.status == 406
    assert caught.value.extra["available"] == [PNG, JSON]
