"""Tells slurm/finetune.sh which node a job should not come back to. Light: read before torch is imported.

The script names a file in the environment variable ``BAD_NODE_FILE``. Who finds a node at fault writes one line there,
"<node> <why it is known: hardware or silent> <reason>"; the first line counts. The script decides what follows.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

#: Names the file.
BAD_NODE_FILE = "BAD_NODE_FILE"
#: The node itself is known to be at fault.
HARDWARE = "hardware"
#: A process went without a word: killed, out of memory, or its node is gone; Slurm has to be asked about the node.
SILENT = "silent"
#: What the driver, CUDA and NCCL say of hardware that fails, and of nothing that a program can cause by itself.
_HARDWARE = re.compile(
    r"uncorrectable (ECC|NVLink)|\bXid\b|GPU is lost|fallen off the bus|unhandled system error|ncclSystemError"
    r"|hardware stack error|devices are busy or unavailable|no CUDA-capable device",
    re.IGNORECASE,
)


def is_hardware(reason: str) -> bool:
    """Whether an error's text is of failing hardware."""
    return _HARDWARE.search(reason) is not None


def own_node() -> str:
    """This machine as Slurm calls it, else by its short name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]


def blame(node: str, kind: str, reason: str) -> None:
    """Writes a node down, if the job's script asks for it and none is written yet.

    Args:
        node: as Slurm calls it.
        kind: ``HARDWARE`` or ``SILENT``.
        reason: in words.
    """
    path = os.environ.get(BAD_NODE_FILE)
    if not path:
        return
    try:
        with Path(path).open("x") as stream:
            stream.write(f"{node} {kind} {' '.join(reason.split())[:300]}\n")
    except OSError:
        # Somebody was first, or nobody can write there: then the job just ends.
        return
