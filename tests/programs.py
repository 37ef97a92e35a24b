"""Checks that need a fresh process: a module is run as a program, and each of its checks becomes a test.

    python -m tests.models.te_path FOLDER [CHECK ...]

What may not be imported before (megatron without its GPU packages), and what a forked process may not have (a GPU in
use), is why.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_checks(checks: Sequence[Callable[[], None]]) -> None:
    """Runs them all, or those that the command line names, in a world of one process.

    Their tracebacks go to FOLDER/results.json, null where there is none.
    """
    import torch

    from hybridprune_megatron.engine.launch import Launch
    from hybridprune_megatron.engine.parallel import init_distributed, init_model_parallel

    torch.set_num_threads(1)
    init_distributed(Launch(0, 1, 0, 1))
    init_model_parallel(seed=1)
    results: dict[str, str | None] = {}
    for check in checks:
        if sys.argv[2:] and check.__name__ not in sys.argv[2:]:
            continue
        try:
            check()
            results[check.__name__] = None
        except Exception:
            results[check.__name__] = traceback.format_exc(chain=False)
    (Path(sys.argv[1]) / "results.json").write_text(json.dumps(results, indent=1))


def results_of(module: str, folder: Path) -> dict[str, str | None]:
    """Tracebacks of all checks of a module, run in a process of its own.

    Args:
        module: with a ``main`` that calls ``run_checks``.
        folder: for its files.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())
