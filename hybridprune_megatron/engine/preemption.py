"""How a cluster asks a job to stop, and how the job answers. Light: no torch.

Slurm says that a job must end soon by a signal: SIGUSR1 a while before the time limit (``--signal``, forwarded by
``slurm/finetune.sh``), SIGTERM to every process of the job when it is preempted. Both reach loader and writer processes
too, and at a moment that differs from rank to rank. So they are blocked, not handled: a blocked signal stays pending,
interrupts nothing, and the mask is inherited by every thread and child. Between two steps the ranks look for it
(:class:`~hybridprune_megatron.engine.callbacks.StopOnSignal`), save, and exit with ``STOPPED``.
"""

from __future__ import annotations

import os
import signal
from multiprocessing import resource_tracker

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
#: Exit status of a job that was asked to stop and is to be started again: EX_TEMPFAIL, 75. slurm/finetune.sh knows it.
STOPPED = os.EX_TEMPFAIL


def hold_stop_signals() -> None:
    """Keeps ``STOP_SIGNALS`` pending in this process and its children. Call it before any thread is started."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    # Starting Python's resource tracker unblocks SIGTERM here: it is started now, and not again, for it inherits that
    # SIGUSR1 is blocked and ignores SIGTERM.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def stop_requested() -> bool:
    """Whether a held signal has arrived; stays true from then on."""
    return not signal.sigpending().isdisjoint(STOP_SIGNALS)
