from __future__ import annotations

import pytest

from service.worker.budget import FLOOR_TOKENS, Budget, Speed


def test_a_budget_halves_to_its_floor() -> None:
    budget = Budget(1000)
    assert [budget.shrink(), budget.tokens] == [True, 500]
    assert [budget.shrink(), budget.tokens] == [True, FLOOR_TOKENS]
    assert [budget.shrink(), budget.tokens] == [False, FLOOR_TOKENS]


def test_a_budget_recovers_after_a_while() -> None:
    budget = Budget(1000, recovery_s=0.0)
    budget.shrink()
    assert budget.tokens == 1000


def test_speed_is_an_average_of_large_batches() -> None:
    speed = Speed(large_tokens=100)
    assert speed.tokens_per_s == 0
    speed.add(1000, 1.0)
    speed.add(1000, 1.0)
    speed.add(99, 60.0)  # one small item that took long says nothing
    assert speed.tokens_per_s == pytest.approx(1000)


def test_speed_follows_a_change() -> None:
    speed = Speed(large_tokens=1)
    for _ in range(20):
        speed.add(1000, 1.0)
    for _ in range(40):
        speed.add(1000, 2.0)
    assert speed.tokens_per_s == pytest.approx(500, rel=0.05)
