"""Seconds of work from tokens and measured speeds."""

import pytest

from model.config import VARIANTS
from service.queue.estimate import MARGIN, Rates, Work, effort_of, fastest
from service.queue.jobs import Job, QueueLimits


@pytest.mark.parametrize(
    ("op", "options", "work"),
    [
        ("encode", {}, Work(encode=7)),
        ("encode", {"outputs": ["latents", "embedding"]}, Work(encode=7)),
        ("encode", {"outputs": ["reconstruction"]}, Work(encode=7, decode=7)),
        ("embed", {"outputs": None}, Work(encode=7)),
        ("decode", {"force": True}, Work(decode=7)),
    ],
)
def test_what_a_job_asks_of_the_model(op: str, options: dict[str, object], work: Work) -> None:
    job = Job(id="j", op=op, pool="m", cost=7, deadline=0.0, options=options)  # type: ignore[arg-type]
    assert job.work == work


def test_an_item_counts_what_its_tokens_look_at() -> None:
    assert effort_of(256, 864) == 256, "pictures of 256 x 256 are the measure"
    assert effort_of(7, None) == effort_of(7, 0) == 7
    assert effort_of(1, 864) == 1
    assert effort_of(16_384, 864, steps=256, window=4) == 16_384, "a clip does not look beyond its windows"
    # CPU seconds of encoding with the bundled model: voxels (tests/bench/README.md, 9), then 8 pictures of 256 x 256,
    # one of 736 x 736, one of 1536 x 1536.
    voxels = [(1000, 0.10), (4000, 0.97), (8000, 3.67), (16_000, 13.02), (24_000, 28.54)]
    pictures = [(256, 0.207 / 8), (2116, 0.365), (9216, 3.79)]
    attention = VARIANTS["tiny-continuous"].encoder.attention_tokens
    rates = [effort_of(tokens, attention) / seconds for tokens, seconds in voxels + pictures]
    assert max(rates) / min(rates) < MARGIN


def test_a_job_of_more_effort_than_tokens() -> None:
    job = Job(id="j", op="encode", pool="m", cost=7, effort=30, deadline=0.0, options={"outputs": ["reconstruction"]})
    assert job.work == Work(encode=30, decode=30)


def test_seconds_are_a_sum_over_both_directions() -> None:
    rates = Rates(encode=10_000.0, decode=2_500.0)
    assert rates.seconds(Work(encode=20_000)) == 2.0
    assert rates.seconds(Work(decode=20_000)) == 8.0
    assert (rates + rates).seconds(Work(encode=20_000) + Work(decode=20_000)) == 5.0


def test_what_was_never_measured_takes_no_time() -> None:
    assert Rates().seconds(Work(encode=10**9, decode=10**9)) == 0.0
    assert Rates(encode=10.0).seconds(Work(encode=20, decode=10**9)) == 2.0


def test_the_fastest_worker_is_so_in_each_direction() -> None:
    assert fastest([Rates(encode=5.0, decode=1.0), Rates(encode=2.0, decode=3.0)]) == Rates(encode=5.0, decode=3.0)
    assert fastest([]) == Rates()


def test_room_follows_the_mix_that_waits() -> None:
    limits = QueueLimits(floor_tokens=100, queue_seconds=60.0)
    assert limits.room(1000, 10.0) == (6000, 0.01)
    assert limits.room(1000, 1000.0) == (100, 1.0)  # never under the floor
    assert limits.room(1000, 0.0) == (100, 0.6)  # no speed known: the floor, as if it took queue_seconds
    assert QueueLimits(tokens=50, queue_seconds=60.0).room(1000, 10.0) == (50, 0.01)
