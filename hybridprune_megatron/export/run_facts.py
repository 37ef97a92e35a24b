"""What a model card says about the run behind a checkpoint, as far as its folder tells."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hybridprune_megatron.config.checkpoint_folder import RUN_FILE, read_run_file
from hybridprune_megatron.engine.train_log import read_train_log

_LOSSES = 10


@dataclass(frozen=True)
class RunFacts:
    """Facts of a run; what is not known is None or empty.

    Attributes:
        step: optimizer steps.
        samples: packed sequences that these steps consumed.
        commit: of this project's code when the checkpoint was saved.
        versions: of packages, by name.
        loss: mean over the last ten steps up to the checkpoint, or over all if they are fewer.
        accuracy: share of right answers (0 to 1), by what was measured.
    """

    step: int | None = None
    samples: int | None = None
    commit: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    loss: float | None = None
    accuracy: Mapping[str, float] = field(default_factory=dict)


def read_facts(checkpoint: Path) -> RunFacts:
    """Reads ``run.json``, and the run's ``train_log.jsonl`` and ``report.json`` (of `make demo`) where they are.

    Args:
        checkpoint: a ``step_<n>`` folder of a run; for bare weights nothing is known.
    """
    if not (checkpoint / RUN_FILE).is_file():
        return RunFacts()
    header, run = read_run_file(checkpoint), checkpoint.parent.parent
    log, report = run / "train_log.jsonl", run / "report.json"
    rows = read_train_log(log) if log.is_file() else []
    losses = [row["loss"] for row in rows if row["step"] <= header["step"]][-_LOSSES:]
    found = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    return RunFacts(
        step=header["step"],
        samples=header.get("consumed_samples"),
        commit=header.get("commit"),
        versions=header.get("versions", {}),
        loss=sum(losses) / len(losses) if losses else None,
        # A report of other steps is of another checkpoint.
        accuracy=found.get("accuracy", {}) if found.get("steps") == header["step"] else {},
    )
