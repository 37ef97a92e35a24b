"""What holds for all tests: which run side by side under pytest-xdist, and in what order they start.

Ranks of a world wait for each other at every collective. A process that competes with them for a core makes each of
these waits as long as the kernel's time slice, and a test of two seconds one of twenty. So the tests of worlds run one
after another in one worker, and what runs beside them yields.
"""

from __future__ import annotations

import os
from typing import Any

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Tests run on the CPU, worlds over gloo, also on a machine with GPUs, unless those that need one are asked for."""
    wanted = config.getoption("markexpr")
    # Those over nccl are marked gpu too, so "not gpu" leaves them out.
    if not ("gpu" in wanted or "nccl" in wanted) or "not gpu" in wanted:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests on a cluster wait for minutes: they start first."""
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.scheduler import Scheduler

    # Files stay in the order in which they were collected.
    config.option.loadscopereorder = False
    return Scheduler(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A worker that has no world to run, or no more, yields to the one that has."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    from tests.scheduler import starts_worlds

    if not starts_worlds(item.nodeid.partition("::")[0]) and os.getpriority(os.PRIO_PROCESS, 0) == 0:
        os.nice(10)
