"""Which worker runs which file."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.scheduler import Scheduler


class _Worker:
    """Keeps what it is sent."""

    gateway = SimpleNamespace(id="gw")
    shutting_down = False

    def __init__(self) -> None:
        self.indices: list[int] = []

    def send_runtest_some(self, indices: list[int]) -> None:
        self.indices += indices

    def shutdown(self) -> None:
        self.shutting_down = True


def _files_by_worker(files: list[str], quick: int) -> list[list[str]]:
    """What each of two workers runs of files with three tests each, if one ends all its tests before the other."""
    names = [f"tests/{path}::test_{number}[a::b]" for path in files for number in range(3)]
    options = SimpleNamespace(loadscopereorder=False)
    config: Any = SimpleNamespace(option=options, getvalue={"tx": ["2*popen"]}.__getitem__)
    scheduler, workers = Scheduler(config), [_Worker(), _Worker()]
    for worker in workers:
        scheduler.add_node(worker)
    for worker in workers:
        scheduler.add_node_collection(worker, names)
    scheduler.schedule()
    for worker in (workers[quick], workers[1 - quick]):
        # Ending a test may bring more of them.
        for index in worker.indices:
            scheduler.mark_test_complete(worker, index)
    assert all(worker.shutting_down for worker in workers)
    assert sorted(workers[0].indices + workers[1].indices) == list(range(len(names)))
    return [[names[index].partition("::")[0].removeprefix("tests/") for index in worker.indices] for worker in workers]


FILES = ["slurm/test_a.py", "ops/test_b.py", "engine/test_c.py", "method/test_d.py", "models/test_e.py", "test_f.py"]


def _thrice(*files: str) -> list[str]:
    return [path for path in files for _ in range(3)]


def test_a_file_stays_together_and_each_worker_begins_with_its_own_kind() -> None:
    waiting, worlds = _files_by_worker(FILES, quick=0)
    assert waiting == _thrice("slurm/test_a.py", "ops/test_b.py", "method/test_d.py", "test_f.py", "models/test_e.py")
    assert worlds == _thrice("engine/test_c.py")


def test_a_worker_whose_own_are_done_takes_the_others_last() -> None:
    waiting, worlds = _files_by_worker(FILES, quick=1)
    assert waiting == _thrice("slurm/test_a.py")
    assert worlds == _thrice("engine/test_c.py", "models/test_e.py", "test_f.py", "method/test_d.py", "ops/test_b.py")


def test_xdist_asks_for_it(pytestconfig: pytest.Config) -> None:
    config: Any = SimpleNamespace(option=SimpleNamespace(), getvalue={"tx": ["2*popen"]}.__getitem__)
    made = pytestconfig.hook.pytest_xdist_make_scheduler(config=config, log=None)
    assert isinstance(made, Scheduler)
