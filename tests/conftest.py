"""What holds for all tests: which run side by side under pytest-xdist, and in what order they start.

Ranks of a world wait for each other at every collective. A process that competes with them for a core makes each of
these waits as long as the kernel's time slice, and a test of two seconds one of twenty. So the tests of worlds run one
after another in one worker, and what runs beside them yields.
"""

from __future__ import annotations

import os

import pytest

#: Folders whose tests start worlds of several processes.
_WORLDS = ("engine", "faults", "models", "parallel")


def _group(item: pytest.Item) -> str:
    """Tests of a group run in one worker: all worlds, and of the others those of a file."""
    folder = item.path.parent.name
    return "worlds" if folder in _WORLDS else f"{folder}/{item.path.name}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests on a cluster wait for minutes: they start first; the worlds, the longest group, start beside them."""
    items.sort(key=lambda item: (item.get_closest_marker("slurm") is None, _group(item) != "worlds"))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group(item)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A worker that has no world to run, or no more, yields to the one that has."""
    beside_others = "PYTEST_XDIST_WORKER" in os.environ
    if beside_others and _group(item) != "worlds" and os.getpriority(os.PRIO_PROCESS, 0) == 0:
        os.nice(10)
