from __future__ import annotations

from service.worker.budget import FLOOR_TOKENS, Budget


def test_a_budget_halves_to_its_floor() -> None:
    budget = Budget(1000)
    assert [budget.shrink(), budget.tokens] == [True, 500]
    assert [budget.shrink(), budget.tokens] == [True, FLOOR_TOKENS]
    assert [budget.shrink(), budget.tokens] == [False, FLOOR_TOKENS]


def test_a_budget_recovers_after_a_while() -> None:
    budget = Budget(1000, recovery_s=0.0)
    budget.shrink()
    assert budget.tokens == 1000
