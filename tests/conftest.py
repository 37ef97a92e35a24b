"""What holds for all tests."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests on a cluster wait for minutes: they start first, and the others run beside them."""
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)
