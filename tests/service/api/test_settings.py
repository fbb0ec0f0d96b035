"""Settings from the environment, and the table of error codes."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from media.errors import STATUS, MediaError
from service.errors import CODES, Problem, as_problem, deadline_exceeded, problem_of_answer
from service.queue.jobs import Answer, QueueUnavailable, Refused
from service.settings import Settings


def test_settings_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOKEN_PORT", "9000")
    monkeypatch.setenv("ATOKEN_MODELS", "a, b ,c")
    monkeypatch.setenv("ATOKEN_MEDIA__IMAGE_BYTES", "1000")
    settings = Settings()
    assert settings.port == 9000
    assert settings.models == ["a", "b", "c"]
    assert settings.media.image_bytes == 1000
    assert settings.public()["media"]["image_bytes"] == 1000


def test_password_is_not_printed() -> None:
    for url in ("redis://:secret@host:6379/0", "unix://user:secret@/run/sock"):
        assert "secret" not in str(Settings(redis_url=url).printable())
    assert Settings(redis_url="redis://host:6379/0").printable()["redis_url"] == "redis://host:6379/0"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 70_000),
        ("request_timeout_s", 1e6),
        ("json_bytes", 1 << 40),
        ("models", ""),
        ("dtype", "float8"),
        ("body_bytes", -1),
        ("no_such_setting", 1),
        ("media", {"image_bytes": 0}),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=name.split("_")[0]):
        Settings(**{name: value})


def test_status_of_media_codes_is_the_same_in_both_tables() -> None:
    assert {code: CODES[code].status for code in STATUS} == STATUS


def test_every_error_of_a_lower_layer_has_a_problem() -> None:
    for code in STATUS:
        assert as_problem(MediaError(code, "x", limit=1, actual=2)).code == code
    for code in ("queue_full", "would_miss_deadline", "queue_full_memory", "no_worker"):
        found = as_problem(Refused(code, retry_after=3.2))  # type: ignore[arg-type]
        assert (found.code, found.retry_after) == (code, 3.2)
    assert as_problem(QueueUnavailable("x")).code == "queue_unavailable"
    assert as_problem(ZeroDivisionError("secret")).document("id")["detail"].find("secret") == -1


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (Answer(id="1", status="expired"), "deadline_exceeded"),
        (Answer(id="1", status="lost"), "job_lost"),
        (Answer(id="1", status="canceled"), "client_closed"),
        (
            Answer(id="1", status="failed", code="item_failed_repeatedly", detail="worker x died"),
            "item_failed_repeatedly",
        ),
        (Answer(id="1", status="failed", code="no_such_code", detail="secret"), "internal"),
        (Answer(id="1", status="failed"), "internal"),
    ],
)
def test_answers_without_a_result_become_problems(answer: Answer, code: str) -> None:
    found = problem_of_answer(answer, timeout_s=5.0, max_timeout_s=300.0)
    assert found.code == code
    assert isinstance(found, Problem)
    assert "secret" not in found.detail
    refusal = Answer(id="1", status="failed", code="invalid_parameter", detail="say so")
    assert problem_of_answer(refusal, timeout_s=5.0, max_timeout_s=300.0).detail == "say so"


def test_missed_deadline_says_how_to_get_more_time_where_there_is_more() -> None:
    assert "within 5 s: " in deadline_exceeded(5.0, 300.0).detail
    assert "`Request-Timeout: N` (seconds, at most 300)" in deadline_exceeded(5.0, 300.0).detail
    assert "Request-Timeout" not in deadline_exceeded(300.0, 300.0).detail
