"""How tests share two workers: `pytest -n 2` keeps a file together, and all that starts servers on one worker."""

from __future__ import annotations

from pathlib import Path

import pytest

WITH_SERVERS = ("system", "service", "deploy", "test_readme.py")
"""Parts of tests/ that start processes of the service: two of them at a time would wait for each other's processors."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Name the group of each test for `--dist loadgroup`."""
    root = Path(__file__).parent
    for item in items:
        part = item.path.relative_to(root).parts[0]
        item.add_marker(pytest.mark.xdist_group("servers" if part in WITH_SERVERS else item.path.name))
