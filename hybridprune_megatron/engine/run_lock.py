"""One run writes a run folder at a time: a lock that its process holds while it lives, whatever ends it.

``<output_dir>/run.lock`` is locked by ``flock``, which the kernel gives up with the process, and holds a note of who
has it: host, process, Slurm job, start. The note is for the line that another run is refused with, and decides where a
file system does not carry locks from one machine to another. Light: used before torch is imported.

What reads the folder, or writes a part of its own into it (an export into ``<run>/hf``), takes no lock.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

_NOTE_BYTES = 1024
#: How long a requeued job waits for a lock that its own former start still seems to hold: a file server gives the locks
#: of a machine that died up only after a while.
_OWN_WAIT_SECONDS = 180.0
_SQUEUE_SECONDS = 10.0
_SETTLE_SECONDS = 1.0
#: What a file system says that knows no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
#: File systems whose locks, as mounted, do not reach other machines.
_LOCAL_TYPES = ("fuse", "beegfs", "9p", "virtiofs")
_LOCAL_OPTIONS = {"localflock", "noflock", "nolock", "nobrl", "local_lock=flock", "local_lock=all"}

_MOUNTS = Path("/proc/self/mounts")

#: Lock files that this process holds, and their descriptors.
_held: dict[Path, int] = {}


@dataclass(frozen=True)
class Holder:
    """Who has a lock.

    Attributes:
        host: its machine.
        process: its number there.
        began: when the process began, in ticks of its machine's clock; tells it from a later one of the same number.
        job: number of its Slurm job; empty: none.
        restart: how often Slurm had started the job again.
        since: when it took the lock, for people.
    """

    host: str = ""
    process: int = 0
    began: int = 0
    job: str = ""
    restart: int = 0
    since: str = ""

    @staticmethod
    def here() -> Holder:
        """This process."""
        restart = os.environ.get("SLURM_RESTART_COUNT", "")
        return Holder(
            socket.gethostname(),
            os.getpid(),
            _began(os.getpid()) or 0,
            os.environ.get("SLURM_JOB_ID", ""),
            int(restart) if restart.isdecimal() else 0,
            time.strftime("%Y-%m-%d %H:%M:%S %z"),
        )

    def __str__(self) -> str:
        if not self.host:
            return "another process"
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.process} on {self.host}{job}, since {self.since}"

    def is_earlier_start_of(self, other: Holder) -> bool:
        """Whether Slurm has ended this one and started the other in its place."""
        return self.job != "" and self.job == other.job and self.restart < other.restart

    def has_ended(self) -> bool | None:
        """Whether it runs no more, as far as it can be known from here; None: it cannot."""
        if self.host == socket.gethostname():
            return _began(self.process) != self.began
        return _job_has_ended(self.job)


def hold_folder(folder: Path, what: str = "run") -> None:
    """Makes this process the only one of its kind that writes a folder, until it ends. Repeatable; made if missing.

    Args:
        folder: the run's folder.
        what: the kind: "run" for training.

    Raises:
        ValueError: another process has it, or the folder cannot be written; one line that names the holder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder.resolve() / f"{what}.lock"
        if path not in _held:
            _held[path] = _locked(path, folder)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"output_dir={folder}: cannot be written ({reason}); give another output_dir") from None


def release_folder(folder: Path, what: str = "run") -> None:
    """Gives up what ``hold_folder`` took."""
    descriptor = _held.pop(folder.resolve() / f"{what}.lock", None)
    if descriptor is not None:
        # An empty note: nobody has it, wherever the lock itself does not reach.
        os.ftruncate(descriptor, 0)
        os.close(descriptor)


def _locked(path: Path, folder: Path) -> int:
    """Descriptor of a lock file that is ours now.

    Raises:
        ValueError: it is another's.
    """
    # Programs that are started do not inherit it; forked children close it (below).
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _take(descriptor, path, folder)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _take(descriptor: int, path: Path, folder: Path) -> None:
    """Locks an open lock file and writes our note; errors as for ``_locked``."""
    own, locks = Holder.here(), _flock(descriptor)
    holder = _read(descriptor)
    waited_until = time.monotonic() + _OWN_WAIT_SECONDS
    while locks is False and holder.is_earlier_start_of(own) and time.monotonic() < waited_until:
        time.sleep(_SETTLE_SECONDS)
        locks, holder = _flock(descriptor), _read(descriptor)
    taken = f"output_dir={folder}: {holder} writes this folder"
    if locks is False:
        raise ValueError(f"{taken}; wait for its end, or give name=<name> for a run of its own")
    # A lock that reaches all machines says by itself that nobody has the folder; so does an empty note.
    free = locks and (holder.host == own.host or not _is_local_lock(path))
    if not (free or holder == Holder() or holder.is_earlier_start_of(own) or holder.has_ended()):
        raise ValueError(f"{taken}, as far as is known here; if it has ended, delete {path}; or give name=<name>")
    _write(descriptor, own)
    if locks is None:
        # Another may have come at the same moment: the later note stays, and its writer.
        time.sleep(_SETTLE_SECONDS)
        if (holder := _read(descriptor)) != own:
            raise ValueError(f"output_dir={folder}: {holder} writes this folder; give name=<name> for another run")


def _flock(descriptor: int) -> bool | None:
    """Whether the lock was free and is ours; None: the file system knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _write(descriptor: int, holder: Holder) -> None:
    """Puts the note; of one length, so that nobody reads half of it."""
    os.pwrite(descriptor, json.dumps(asdict(holder)).ljust(_NOTE_BYTES - 1).encode() + b"\n", 0)
    os.fsync(descriptor)


def _read(descriptor: int) -> Holder:
    """The note of who has the lock, or had it and was killed; nobody where there is none that can be read."""
    try:
        values = json.loads(os.pread(descriptor, _NOTE_BYTES, 0))
        own = asdict(Holder())
        return Holder(**{name: values[name] for name in own if type(values[name]) is type(own[name])})
    except (ValueError, KeyError, TypeError, RecursionError):
        return Holder()


def _began(process: int) -> int | None:
    """When a process of this machine began, in clock ticks; None: there is none, or it only waits to be reaped."""
    try:
        # What comes before is the program's name, which may hold anything.
        fields = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _job_has_ended(job: str) -> bool | None:
    """Whether Slurm says that a job runs no more; None: it cannot be asked."""
    if not job.isdecimal():
        return None
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SQUEUE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        # Slurm forgets a job some minutes after its end.
        return True if "Invalid job id" in done.stderr else None
    return done.stdout.strip() in ("", "PENDING")


def _is_local_lock(path: Path) -> bool:
    """Whether locks on a file reach this machine's processes only, as far as the mounted file system tells."""
    place, kind, options = "", "", set[str]()
    with contextlib.suppress(OSError):
        for line in _MOUNTS.read_text(errors="replace").splitlines():
            fields = line.split(" ")
            if len(fields) < 4:
                continue
            # Spaces and the like are written as octal numbers.
            mounted = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[1])
            if str(path).startswith(mounted.rstrip("/") + "/") and len(mounted) >= len(place):
                place, kind, options = mounted, fields[2], set(fields[3].split(","))
    return kind.startswith(_LOCAL_TYPES) or not options.isdisjoint(_LOCAL_OPTIONS)


def _close_in_child() -> None:
    """A loader or writer process that outlives its run must not hold the lock."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


def _release_all() -> None:
    for path in list(_held):
        release_folder(path.parent, path.name.removesuffix(".lock"))


os.register_at_fork(after_in_child=_close_in_child)
atexit.register(_release_all)
