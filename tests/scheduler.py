"""Which worker of pytest-xdist runs which file, and in what order."""

from __future__ import annotations

from typing import Any

from xdist.scheduler import LoadScopeScheduling

#: Folders whose tests start worlds of several processes.
WORLDS = ("engine", "faults", "models", "parallel")


def starts_worlds(path: str) -> bool:
    """Whether a file of tests, from the root with slashes, starts worlds."""
    return path.split("/")[-2] in WORLDS


class Scheduler(LoadScopeScheduling):
    """A file is run by one worker, and the worlds one file after another by the last worker.

    Either takes what is the other's once its own is done, so both end at about the same time. By the names of tests and
    not by xdist's groups: those are lost without a word under a pytest that does not know them.
    """

    def _split_scope(self, nodeid: str) -> str:
        return nodeid.partition("::")[0]

    def _assign_work_unit(self, node: Any) -> None:
        self.workqueue.move_to_end(self._next_file(node), last=False)
        super()._assign_work_unit(node)

    def _next_file(self, node: Any) -> str:
        worlds = [path for path in self.workqueue if starts_worlds(path)]
        others = [path for path in self.workqueue if not starts_worlds(path)]
        own, rest = (worlds, others) if node is self.nodes[-1] else (others, worlds)
        return own[0] if own else rest[-1]
