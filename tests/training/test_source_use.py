"""How a run uses its sources: every draw is announced a step before, nothing is drawn for nothing, all are closed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.training.tiny_run import SIDES, recipe, trainer, work
from training.batches import Kind, Sample
from training.chain import run_stages
from training.curriculum import Habits, NotFiniteError
from training.generated import Generated
from training.ranks import Ranks, joined


class Watched(Generated):
    """Writes down what is asked of it."""

    def __init__(self) -> None:
        super().__init__(sides=SIDES)
        self.drawn: list[tuple[Kind, tuple[int, ...]]] = []
        self.announced: list[tuple[Kind, tuple[int, ...]]] = []
        self.closed = 0

    def draw(self, kind: Kind, numbers: Sequence[int]) -> list[Sample]:
        self.drawn.append((kind, tuple(numbers)))
        return super().draw(kind, numbers)

    def ahead(self, kind: Kind, numbers: Sequence[int]) -> None:
        self.announced.append((kind, tuple(numbers)))

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined() as one:
        yield one


@pytest.mark.parametrize("stage", ["image", "asset"])
def test_every_draw_is_announced_in_the_step_before(stage: str, ranks: Ranks) -> None:
    source = Watched()
    run = trainer(recipe(steps=9), stage, ranks, source)
    for _ in range(9):
        run.train_step()
    first_step = 2
    assert source.announced == source.drawn[first_step:]


def test_sources_are_closed_whatever_happens(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Watched] = []

    def new(_: object) -> Watched:
        made.append(Watched())
        return made[-1]

    plan = recipe(steps=2)
    plan = replace(plan, stages=plan.stages[:2])
    watched = replace(work(), source=new, shown=new)
    habits = Habits(log_every=0, save_every=0, look_every=1)
    said: list[str] = []
    assert not run_stages(plan, tmp_path, watched, ranks, habits=habits, log=said.append, stop_at={"video": 1})
    # A source and two looks, a source and one look.
    assert [source.closed for source in made] == [1] * 5

    def fails(*_: object) -> None:
        raise NotFiniteError

    monkeypatch.setattr("training.curriculum.StageTrainer.train_step", fails)
    with pytest.raises(NotFiniteError):
        run_stages(plan, tmp_path, watched, ranks, habits=habits, log=said.append)
    assert [source.closed for source in made] == [1] * 6
