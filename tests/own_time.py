"""How long a command takes by itself, on machines that other work shares."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

#: Ends a command that hangs; far above what any takes on a busy machine.
HANG_SECONDS = 300


def run_timed(
    command: Sequence[str], cwd: Path, limit_s: float, tries: int = 3
) -> tuple[subprocess.CompletedProcess[str], float]:
    """Runs a single-threaded command, again if it took too long, and gives its last result and its shortest time.

    One thread that waits more than it works waits for other processes or for the machine's host: that says nothing
    about the command, so its own processor time counts then instead of the wall clock.
    """
    seconds: list[float] = []
    while len(seconds) < tries and (not seconds or seconds[-1] >= limit_s):
        began, before = time.perf_counter(), os.times()
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=HANG_SECONDS)
        wall, after = time.perf_counter() - began, os.times()
        own = after.children_user + after.children_system - before.children_user - before.children_system
        seconds.append(own if wall > 2 * own else wall)
    return done, min(seconds)
