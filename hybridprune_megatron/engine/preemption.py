"""How a cluster or a user asks a job to stop, and how the job answers. Light: no torch.

Slurm says that a job must end soon by a signal: SIGUSR1 a while before the time limit (``--signal``, forwarded by
``slurm/finetune.sh``), SIGTERM to every process of the job when it is preempted. Ctrl-C is SIGINT, a terminal that is
gone SIGHUP. All reach loader and writer processes too, and at a moment that differs from rank to rank. So they are
blocked, not handled: a blocked signal stays pending, interrupts nothing, and the mask is inherited by every thread and
child. Between two steps the ranks look for it (:class:`~hybridprune_megatron.engine.callbacks.StopOnSignal`), save, and
exit with ``STOPPED``.

Pending signals are not counted, and a second Ctrl-C must not wait for a step. So one thread takes SIGINT and SIGHUP.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from multiprocessing import resource_tracker
from typing import Any, TextIO

from hybridprune_megatron.config.one_line import INTERRUPTED

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGHUP)
#: Exit status of a job that was asked to stop and is to be started again: EX_TEMPFAIL, 75. slurm/finetune.sh knows it.
STOPPED = os.EX_TEMPFAIL

_asked = threading.Event()


def hold_stop_signals(say: bool = True) -> None:
    """Keeps stop signals pending in this process and its children. Call it before any thread is started.

    Args:
        say: tell the user what the first and the second Ctrl-C do (one rank does).
    """
    # nohup, and a shell that starts something in the background, ignore signals: then they are to be ignored here.
    terminal = {which for which in TERMINAL_SIGNALS if signal.getsignal(which) is not signal.SIG_IGN}
    held = {*STOP_SIGNALS, *terminal}
    signal.pthread_sigmask(signal.SIG_BLOCK, held)
    # Starting Python's resource tracker unblocks SIGINT and SIGTERM here: it is started now, and not again, for it
    # inherits that SIGUSR1 and SIGHUP are blocked and ignores the other two.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, held)
    if terminal:
        screens = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        sys.stdout, sys.stderr = _Screen(sys.stdout), _Screen(sys.stderr)
        threading.Thread(target=_listen, args=(terminal, screens, say), daemon=True).start()


def stop_requested() -> bool:
    """Whether a held signal has arrived; stays true from then on."""
    return _asked.is_set() or not signal.sigpending().isdisjoint({*STOP_SIGNALS, *TERMINAL_SIGNALS})


class _Screen:
    """A stream that swallows what is written to a terminal that is gone: a line about a step must not end the run.

    The signal that says so comes a moment later than the first error.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As ``TextIO``."""
        with _lost_terminal():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As ``TextIO``."""
        with _lost_terminal():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _lost_terminal() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise


def _listen(signals: Iterable[signal.Signals], screens: Iterable[int], say: bool) -> None:
    """Takes the signals of a terminal for as long as the process lives; a second Ctrl-C ends it.

    Args:
        signals: that are blocked.
        screens: open descriptors that are terminals.
        say: see ``hold_stop_signals``.
    """
    interrupts = 0
    while True:
        if signal.sigwaitinfo(signals).si_signo == signal.SIGHUP:
            # For what is not written through Python's streams.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for screen in screens:
                os.dup2(nowhere, screen)
            os.close(nowhere)
        else:
            interrupts += 1
            if say:
                words = ("stops and saves after this step; Ctrl-C again stops at once", "stopped at once")
                with contextlib.suppress(OSError):
                    os.write(2, f"\n{words[min(interrupts, 2) - 1]}\n".encode())
            if interrupts > 1:
                os._exit(INTERRUPTED)
        _asked.set()
