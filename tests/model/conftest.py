"""Fixtures of the model's tests."""

import pytest

from model import Tokenizer
from tests.model.samples import small_tokenizer


@pytest.fixture(scope="session")
def continuous() -> Tokenizer:
    return small_tokenizer()


@pytest.fixture(scope="session")
def discrete() -> Tokenizer:
    return small_tokenizer("fsq")
