from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.queue.jobs import Job, Lease
from service.worker.batcher import pack


def lease(
    name: str, cost: int = 100, *, age: float = 0.0, tries: int = 0, pool: str = "m@1", tenant: str = "a", lane: int = 0
) -> Lease:
    """age: seconds that the job has waited; the oldest has the largest."""
    job = Job(id=name, op="encode", pool=pool, cost=cost, deadline=2e9, tenant=tenant, lane=lane)
    return Lease(job=job, fence=1, tries=tries, payload_bytes=0, enqueued=1e9 - age, stream_id="1-1", api="x")


def ids(leases: list[Lease]) -> list[str]:
    return [each.job.id for each in leases]


def test_nothing_waits() -> None:
    assert pack([], budget_tokens=1000, max_items=10) == []


def test_what_fits_goes_together_oldest_first() -> None:
    waiting = [lease("new", 300, age=1), lease("old", 300, age=3), lease("middle", 300, age=2)]
    assert ids(pack(waiting, budget_tokens=1000, max_items=10)) == ["old", "middle", "new"]


def test_a_job_that_does_not_fit_is_passed_over_by_smaller_ones() -> None:
    waiting = [lease("old", 600, age=3), lease("large", 500, age=2), lease("small", 400, age=1)]
    assert ids(pack(waiting, budget_tokens=1000, max_items=10)) == ["old", "small"]


def test_a_tried_job_runs_alone_and_does_not_starve() -> None:
    waiting = [lease("tried", age=5, tries=1), lease("fresh", age=1), lease("second", age=0)]
    assert ids(pack(waiting, budget_tokens=1000, max_items=10)) == ["tried"]
    younger = [lease("tried", age=0, tries=1), lease("fresh", age=5), lease("second", age=1)]
    assert ids(pack(younger, budget_tokens=1000, max_items=10)) == ["fresh", "second"]


def test_an_item_over_the_budget_runs_alone() -> None:
    waiting = [lease("huge", 5000, age=5), lease("small", age=1)]
    assert ids(pack(waiting, budget_tokens=1000, max_items=10)) == ["huge"]


def test_a_batch_is_of_one_model() -> None:
    waiting = [lease("a", age=3), lease("b", age=2, pool="other@1"), lease("c", age=1)]
    assert ids(pack(waiting, budget_tokens=1000, max_items=10)) == ["a", "c"]


def test_tenants_share_a_batch_however_early_one_of_them_came() -> None:
    flood = [lease(f"flood{i}", 100, age=100 - i, tenant="flood") for i in range(20)]
    waiting = [*flood, *(lease(f"late{i}", 100, age=1 - i / 10, tenant="late") for i in range(5))]
    batch = pack(waiting, budget_tokens=1000, max_items=100)
    assert len(batch) == 10
    assert sum(each.job.tenant == "late" for each in batch) == 5


def test_bulk_work_keeps_an_eighth_of_the_budget() -> None:
    waiting = [lease(f"live{i}", 100, age=50 + i) for i in range(20)]
    waiting += [lease(f"bulk{i}", 100, age=i, lane=1) for i in range(5)]
    batch = pack(waiting, budget_tokens=1600, max_items=100)
    assert sum(each.job.lane == 1 for each in batch) == 2
    assert len(batch) == 16


def test_bulk_work_fills_what_is_free() -> None:
    waiting = [lease("live", 100, age=9), *(lease(f"bulk{i}", 100, age=i, lane=1) for i in range(5))]
    assert len(pack(waiting, budget_tokens=1600, max_items=100)) == 6


leases = st.lists(
    st.builds(
        lambda cost, age, tries, pool, tenant, lane: (cost, age, tries, pool, tenant, lane),
        st.integers(1, 3000),
        st.floats(0, 100),
        st.sampled_from([0, 0, 0, 1, 2]),
        st.sampled_from(["m@1", "n@1"]),
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from([0, 1]),
    ),
    min_size=1,
    max_size=40,
)


@given(leases, st.integers(256, 4096), st.integers(1, 16))
def test_no_batch_breaks_a_limit_and_all_work_is_done(
    made: list[tuple[int, float, int, str, str, int]], budget: int, most: int
) -> None:
    waiting = [
        lease(f"j{i}", cost, age=age, tries=tries, pool=pool, tenant=tenant, lane=lane)
        for i, (cost, age, tries, pool, tenant, lane) in enumerate(made)
    ]
    done: list[str] = []
    while waiting:
        oldest = min(waiting, key=lambda each: (each.enqueued, each.job.id))
        batch = pack(waiting, budget_tokens=budget, max_items=most)
        assert oldest in batch, "the oldest job must never be passed over"
        assert len(batch) == 1 or sum(each.job.cost for each in batch) <= budget
        assert len(batch) <= most
        assert len(batch) == 1 or not any(each.alone for each in batch)
        assert len({each.job.pool for each in batch}) == 1
        taken = ids(batch)
        waiting = [each for each in waiting if each.job.id not in taken]
        done += taken
    assert sorted(done) == sorted(f"j{i}" for i in range(len(made)))
