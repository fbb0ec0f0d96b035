import pickle

import pytest

from media.errors import STATUS, MediaError
from media.limits import Limits


def test_carries_everything_through_a_pickle() -> None:
    error = MediaError("too_many_tokens", "40 tokens", limit=30, actual=40)
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, MediaError)
    assert (copy.code, copy.detail, copy.limit, copy.actual) == ("too_many_tokens", "40 tokens", 30, 40)
    assert copy.status == 413
    assert str(copy) == "40 tokens"
    assert "too_many_tokens" in repr(copy)


def test_refuses_a_code_that_is_not_in_the_table() -> None:
    with pytest.raises(ValueError, match="no_such_code"):
        MediaError("no_such_code", "x")


def test_every_status_is_an_error() -> None:
    assert all(status in (413, 415, 422, 429, 500, 503) for status in STATUS.values())


def test_limits_refuse_zero() -> None:
    with pytest.raises(ValueError, match="item_tokens"):
        Limits(item_tokens=0)


def test_local_limits_are_wider() -> None:
    assert Limits.local().item_tokens > Limits().item_tokens
