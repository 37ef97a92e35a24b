"""Stages are done once, and again when what they depend on changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from studies.demo.stages import Stages, differences


class _Job:
    def __init__(self, folder: Path) -> None:
        self.folder, self.runs, self.lines = folder, 0, list[str]()

    def work(self) -> dict[str, Any]:
        self.runs += 1
        (self.folder / "product").write_text("made")
        return {"numbers": (1, 0.1 + 0.2), "runs": self.runs}

    def run(self, inputs: Any) -> dict[str, Any]:
        stages = Stages(self.folder / "stages", self.lines.append)
        result = stages.run("work", "the work", self.work, inputs, [self.folder / "product"])
        assert set(stages.seconds) == {"work"}
        return result


def test_a_stage_runs_once_and_again_for_other_inputs_or_a_missing_product(tmp_path):
    job = _Job(tmp_path)
    first = job.run({"budget": 0.25})
    assert first == {"numbers": [1, 0.1 + 0.2], "runs": 1}
    assert job.lines[0] == "the work ..."
    assert job.lines[1].endswith(" s")
    assert job.run({"budget": 0.25}) == first
    assert job.lines[-1].endswith("done before")
    assert job.run({"budget": 0.35})["runs"] == 2
    (tmp_path / "product").unlink()
    assert job.run({"budget": 0.35})["runs"] == 3


def test_a_stage_that_fails_leaves_no_result(tmp_path):
    def fails() -> dict[str, Any]:
        raise RuntimeError("no disk")

    with pytest.raises(RuntimeError, match="no disk"):
        Stages(tmp_path, lambda _: None).run("work", "the work", fails, 1)
    assert list(tmp_path.iterdir()) == []


def test_differences_name_the_keys():
    old = {"reduction": {"budget": 0.25, "layers": "all"}, "name": "demo"}
    new = {"reduction": {"budget": 0.35, "layers": "all"}, "name": "demo"}
    assert differences(old, new) == ["reduction.budget=0.35 (was 0.25)"]
    assert differences(old, old) == []
