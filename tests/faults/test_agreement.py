"""Processes that were started differently are refused; clocks that differ are mentioned."""

from __future__ import annotations

import contextlib
import io
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.engine.job import tiny_job
from tests.worlds import run_world


def _agree(folder: Path, seeds: tuple[int, ...], clock_s: float, torch_versions: tuple[str, ...]) -> tuple[str, str]:
    """What the check raises and prints on this rank."""
    import torch.distributed as dist

    from hybridprune_megatron.engine import strategy as agreement

    rank = dist.get_rank()
    job = tiny_job(folder, seed=seeds[rank])
    now = time.time() + rank * clock_s
    # The module's name only: everything else keeps the true clock.
    agreement.time = SimpleNamespace(time=lambda: now)  # type: ignore[assignment]
    printed: Any = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            agreement.check_agreement(job, {"torch": torch_versions[rank]})
        except ValueError as error:
            return str(error), printed.getvalue()
    return "", printed.getvalue()


@pytest.mark.parametrize(
    ("seeds", "versions", "line"),
    [
        ((7, 8), ("2", "2"), "trainer.seed=8 on rank 1, 7 on rank 0: start every process with the same command and "),
        ((7, 7), ("2", "3"), "version of torch=3 on rank 1, 2 on rank 0: start every process with the same command "),
    ],
)
def test_rank_with_other_settings_is_refused_everywhere_in_one_line(
    tmp_path: Path, seeds: tuple[int, ...], versions: tuple[str, ...], line: str
) -> None:
    said = run_world(2, _agree, tmp_path, seeds, 0.0, versions)
    assert said[0] == said[1]
    assert said[0][0].startswith(line)
    assert "\n" not in said[0][0]


def test_clocks_that_differ_are_mentioned_once(tmp_path: Path) -> None:
    first, second = run_world(2, _agree, tmp_path, (7, 7), 300.0, ("2", "2"))
    assert first[1].startswith("clocks differ: rank 1 is ")
    assert first[1].count("\n") == 1
    assert (first[0], *second) == ("", "", "")
