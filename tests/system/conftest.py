from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.system.deployment import Atoken


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Atoken]:
    """`atoken serve` with nothing else said, but a free port."""
    with Atoken(tmp_path_factory.mktemp("served"), "serve", "serve", "--port", "0") as atoken:
        yield atoken.wait_ready()


@pytest.fixture(scope="module")
def client(served: Atoken) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url(), timeout=120.0, trust_env=False) as client:
        yield client


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path
