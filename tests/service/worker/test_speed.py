from __future__ import annotations

import pytest

from service.queue.estimate import Rates
from service.worker.speed import Speed


def test_speeds_are_kept_by_pool_and_direction() -> None:
    speed = Speed(large_tokens=100)
    assert speed.rates("a") == Rates()
    speed.add("a", "encode", 1000, 1.0)
    speed.add("a", "decode", 1000, 4.0)
    speed.add("b", "encode", 1000, 0.5)
    assert speed.rates("a") == Rates(encode=1000.0, decode=250.0)
    assert speed.rates("b") == Rates(encode=2000.0)
    assert speed.rates("a").rounded() == {"encode": 1000, "decode": 250}


def test_small_passes_say_nothing() -> None:
    speed = Speed(large_tokens=100)
    speed.add("a", "encode", 1000, 1.0)
    speed.add("a", "encode", 99, 60.0)
    assert speed.rates("a").encode == 1000.0


def test_one_pass_that_was_held_up_changes_nothing() -> None:
    speed = Speed(large_tokens=1)
    for seconds in (1.0, 1.0, 300.0):
        speed.add("a", "decode", 1000, seconds)
    assert speed.rates("a").decode == 1000.0


@pytest.mark.parametrize("passes", [5, 50])
def test_speed_follows_a_change(passes: int) -> None:
    speed = Speed(large_tokens=1)
    for _ in range(20):
        speed.add("a", "encode", 1000, 1.0)
    for _ in range(passes):
        speed.add("a", "encode", 1000, 2.0)
    assert speed.rates("a").encode == 500.0
