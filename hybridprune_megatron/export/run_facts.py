"""What a model card says about the run behind a checkpoint, as far as its folder tells."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybridprune_megatron.config.checkpoint_folder import RUN_FILE, read_run_file
from hybridprune_megatron.config.json_text import read_json
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
    step = header.get("step")
    log, report = run / "train_log.jsonl", run / "report.json"
    rows = read_train_log(log) if log.is_file() and _is_number(step) else []
    losses = [row["loss"] for row in rows if _is_number(row.get("loss")) and row.get("step", math.inf) <= step]
    found = read_json(report) if report.is_file() else {}
    # A report of other steps is of another checkpoint.
    same = isinstance(found, dict) and step is not None and found.get("steps") == step
    return RunFacts(
        step=step if _is_number(step) else None,
        samples=header["consumed_samples"] if _is_number(header.get("consumed_samples")) else None,
        commit=header["commit"] if isinstance(header.get("commit"), str) else None,
        versions={name: str(version) for name, version in _group(header, "versions")},
        loss=sum(losses[-_LOSSES:]) / len(losses[-_LOSSES:]) if losses else None,
        accuracy={name: share for name, share in _group(found if same else {}, "accuracy") if _is_number(share)},
    )


def _group(values: Mapping[str, Any], name: str) -> Iterable[tuple[str, Any]]:
    """The entries of a group; none where it is something else: a card says what is known."""
    group = values.get(name)
    return group.items() if isinstance(group, dict) else ()


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
