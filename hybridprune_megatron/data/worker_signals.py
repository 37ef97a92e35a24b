"""SIGTERM in loader processes whose parent holds it back (``engine.preemption``)."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable


def obey_parent_only(init: Callable[[int], None] | None, worker_id: int) -> None:
    """Initializes a loader process; to be given to a DataLoader as ``partial(obey_parent_only, its_worker_init_fn)``.

    Slurm sends SIGTERM to all processes of a job, and a loader that dies of it takes its rank along before that can
    save. The parent too ends its loaders by SIGTERM, and waits for them. So where the signal is blocked, a thread takes
    it and looks at the sender.

    Args:
        init: what the loader would call otherwise.
    """
    if signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        threading.Thread(target=_wait_for_parent, daemon=True).start()
    if init is not None:
        init(worker_id)


def _wait_for_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
