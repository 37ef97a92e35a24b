"""What slurm/finetune.sh looks at on every node before its ranks start. Light: torch only for the all-reduce.

    srun --ntasks-per-node=1 ... python -m hybridprune_megatron.engine.preflight [override ...]
    srun ... python -m hybridprune_megatron.engine.preflight --all-reduce

The first form has one process per node: the GPUs that Slurm gave are there, clocks agree, there is room in output_dir
and in TMPDIR, and output_dir is one folder that all nodes can write to. The first node gathers what the others find and
prints it, a line for each check. The second form has one process per rank of the job and sums numbers over all of them.

Exit status: 0; 2 what a user can change; 3 a node is at fault, which is also written down (``engine.bad_node``).
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hybridprune_megatron.config.compose import compose_config
from hybridprune_megatron.config.one_line import USER_ERROR, one_line_errors
from hybridprune_megatron.config.sweep import OPTIONS, chosen, sweep_runs
from hybridprune_megatron.engine.bad_node import HARDWARE, blame, own_node
from hybridprune_megatron.engine.gpus import check_gpus, given_gpus, torch_cuda
from hybridprune_megatron.engine.launch import Launch, read_launch
from hybridprune_megatron.engine.slurm import env_int, step_hosts

NODE_AT_FAULT = 3
GIB = 2**30
#: Below this a run cannot even write its logs.
_LEAST_GIB = 1.0
#: Logs of nodes whose clocks differ by more are hard to read together; nothing else depends on it.
_MOST_CLOCK_SECONDS = 60.0
#: How long nodes wait for each other; a container may have to be fetched first.
_PATIENCE = "PREFLIGHT_SECONDS"
_PATIENCE_SECONDS = 120
#: A file server may show a new file to other nodes with a delay.
_SEEN_SECONDS = 20.0
#: float32 numbers of the all-reduce.
_NUMBERS = 64 * 2**20


@dataclass
class Found:
    """What one node found.

    Attributes:
        node: its name.
        now: its clock when it reported, seconds since 1970.
        gpus: that can be used.
        free: GiB by place.
        fault: what is wrong with the node; "": nothing.
        refused: what is wrong and a user's to change; "": nothing.
    """

    node: str
    now: float = 0.0
    gpus: int = 0
    free: dict[str, float] = field(default_factory=dict)
    fault: str = ""
    refused: str = ""


def output_dir(overrides: list[str]) -> Path:
    """Where the job writes; in a sweep the run of this task, and the current folder where it has none."""
    swept = [each for each in overrides if not each.startswith("-")]
    if any(option in overrides for option in OPTIONS):
        task = os.environ.get("SLURM_ARRAY_TASK_ID", "")
        if not task.isdecimal():
            return Path()
        swept = list(chosen(sweep_runs(swept), int(task)).overrides)
    return Path(compose_config(swept).output_dir)


def look(folder: Path, token: str | None) -> Found:
    """This node's part.

    Args:
        folder: the job's output_dir.
        token: what the first node wrote there; None: this is the first node, which has just done so.
    """
    found = Found(own_node())
    try:
        found.gpus = check_gpus()
        # Hidden on purpose, they are not missed.
        given = env_int("SLURM_GPUS_ON_NODE") if given_gpus() else None
        if found.gpus < (given or 0):
            found.fault = f"Slurm gave GPUs (SLURM_GPUS_ON_NODE={given}), but {found.gpus} of them can be used"
    except ValueError as error:
        # What is installed is no fault of a node.
        which = "fault" if torch_cuda() else "refused"
        setattr(found, which, str(error))
    if token is not None and not _seen(folder, token):
        found.refused = f"output_dir={folder} is another folder here than on the first node; give one that all share"
    temporary = Path(tempfile.gettempdir())
    for what, place in (("output_dir", folder), ("TMPDIR", temporary)):
        try:
            with tempfile.TemporaryFile(dir=place):
                found.free[f"{what} {place}"] = free = shutil.disk_usage(place).free / GIB
        except OSError as error:
            found.refused = found.refused or f"{what}={place} cannot be written to ({error.strerror})"
            continue
        if free < _LEAST_GIB:
            lacks = f"{free:.2f} GiB free in {what}={place}, at least {_LEAST_GIB:g} are needed"
            if what == "TMPDIR":
                found.fault = found.fault or lacks
            else:
                found.refused = found.refused or lacks
    found.now = time.time()
    return found


def _token_file(folder: Path) -> Path:
    return folder / f".preflight_{os.environ.get('SLURM_JOB_ID', 'job')}"


def _seen(folder: Path, token: str) -> bool:
    deadline = time.monotonic() + _SEEN_SECONDS
    while time.monotonic() < deadline:
        try:
            if _token_file(folder).read_text() == token:
                return True
        except OSError:
            pass
        time.sleep(0.5)
    return False


def _patience() -> int:
    return env_int(_PATIENCE) or _PATIENCE_SECONDS


def gather(launch: Launch, folder: Path) -> int:
    """The first node: listens to the others, prints, and returns the exit status."""
    token = f"{time.time_ns()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _token_file(folder).write_text(token)
    except OSError as error:
        raise ValueError(f"output_dir={folder} cannot be written to ({error.strerror}); give another folder") from None
    try:
        reports = {0: look(folder, None)}
        offsets = {0: 0.0}
        if launch.world_size > 1:
            _hear(launch, token, reports, offsets)
    finally:
        _token_file(folder).unlink(missing_ok=True)
    return judge(launch.world_size, reports, offsets)


def _hear(launch: Launch, token: str, reports: dict[int, Found], offsets: dict[int, float]) -> None:
    """Takes the others' reports, and how far their clocks are ahead, until all are there or patience ends."""
    deadline = time.monotonic() + _patience()
    server = socket.create_server(("", launch.main_port), backlog=launch.world_size)
    connections: list[socket.socket] = []
    while len(connections) < launch.world_size - 1 and time.monotonic() < deadline:
        server.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
            connection, _ = server.accept()
        except TimeoutError:
            break
        connection.sendall(f"{token}\n".encode())
        connections.append(connection)
    for connection in connections:
        connection.settimeout(max(deadline - time.monotonic(), 0.01) + _SEEN_SECONDS)
        try:
            message: dict[str, Any] = json.loads(connection.makefile().readline())
            rank, report = message.pop("rank"), Found(**message)
            connection.sendall(b"heard\n")
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            # Cut off, or somebody else's connection.
            continue
        reports[rank], offsets[rank] = report, report.now - time.time()
    server.close()


def tell(launch: Launch, folder: Path) -> int:
    """Every other node: reports to the first one."""
    deadline = time.monotonic() + _patience()
    while True:
        try:
            connection = socket.create_connection((launch.main_address, launch.main_port), timeout=5)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                first = next(iter(step_hosts()), launch.main_address)
                reason = f"did not answer at {launch.main_address}:{launch.main_port} ({error})"
                blame(first, HARDWARE, reason)
                print(f"preflight: {first}: {reason}", file=sys.stderr)
                return NODE_AT_FAULT
            time.sleep(0.5)
    connection.settimeout(_patience() + _SEEN_SECONDS)
    lines = connection.makefile()
    found = look(folder, lines.readline().strip())
    found.now = time.time()
    connection.sendall(f"{json.dumps({'rank': launch.rank, **asdict(found)})}\n".encode())
    lines.readline()
    return 0


def judge(num_nodes: int, reports: dict[int, Found], offsets: dict[int, float]) -> int:
    """Prints what the nodes found, names who is at fault, and returns the exit status.

    Args:
        num_nodes: that should have reported.
        reports: by node, from 0.
        offsets: seconds that a node's clock is ahead of the first one's.
    """
    names = dict(enumerate(step_hosts()))
    for node in range(num_nodes):
        if node not in reports:
            fault = f"did not report within {_patience()} s"
            reports[node] = Found(names.get(node, f"node {node} of {num_nodes}"), fault=fault)
    found = [reports[node] for node in sorted(reports)]
    counts = sorted({each.gpus for each in found})
    say([f"GPUs: {' or '.join(map(str, counts))} on each of {num_nodes} nodes"])
    spread = max(offsets.values()) - min(offsets.values())
    say([f"clocks: within {max(spread, 0.1):.1f} s"])
    least: dict[str, tuple[float, str]] = {}
    for each in found:
        for place, free in each.free.items():
            least[place] = min(least.get(place, (free, each.node)), (free, each.node))
    say([f"free space: {', '.join(f'{free:.0f} GiB in {place} ({node})' for place, (free, node) in least.items())}"])
    if spread > _MOST_CLOCK_SECONDS:
        latest = max(offsets, key=lambda node: offsets[node])
        say([f"{reports[latest].node}: its clock is {spread:.0f} s ahead; the run does not depend on it, its logs do"])
    refused = [f"{each.node}: {each.refused}" for each in found if each.refused]
    faults = [each for each in found if each.fault]
    say(refused or ([] if faults else ["output_dir: one folder on all nodes, writable"]))
    say(f"{each.node}: {each.fault}" for each in faults)
    if faults and len(faults) < max(num_nodes, 2):
        # A node whose name nobody knows cannot be left out.
        if " " not in faults[0].node:
            blame(faults[0].node, HARDWARE, faults[0].fault)
        return NODE_AT_FAULT
    # What is the same on every node of several is no fault of theirs.
    refused += [each.fault for each in faults]
    return USER_ERROR if refused else 0


def say(lines: Iterable[str]) -> None:
    """One line each."""
    for line in lines:
        print(f"preflight: {line}", flush=True)


def all_reduce(launch: Launch) -> int:
    """Sums numbers over all ranks of the job, twice; the watch names a rank that fails."""
    import torch
    import torch.distributed as dist

    from hybridprune_megatron.engine.parallel import init_distributed, shut_down
    from hybridprune_megatron.engine.watch import start_watch

    device = init_distributed(launch, timeout_minutes=_patience() / 60)
    try:
        start_watch(launch)
        numbers = torch.full((_NUMBERS if device.type == "cuda" else 2**10,), float(launch.rank + 1), device=device)
        seconds = 0.0
        for _ in range(2):
            values = numbers.clone()
            start = time.perf_counter()
            dist.all_reduce(values)
            wrong = int((values != launch.world_size * (launch.world_size + 1) / 2).sum())
            seconds = time.perf_counter() - start
            if wrong:
                raise RuntimeError(f"{wrong} of {values.numel()} sums of an all-reduce are wrong")
        if launch.rank == 0:
            size, ranks = numbers.numel() * 4, launch.world_size
            rate = 2 * (ranks - 1) / ranks * size / seconds / 1e9
            say(
                [f"all-reduce: {size / 2**20:g} MiB over {ranks} ranks in {1e3 * seconds:.1f} ms, {rate:.1f} GB/s each"]
            )
    finally:
        shut_down()
    return 0


@one_line_errors("preflight")
def main(argv: list[str] | None = None) -> None:
    """Looks, and ends the process with the status of above.

    Args:
        argv: the job's options and overrides, or --all-reduce; None: those of the process.
    """
    arguments = sys.argv[1:] if argv is None else argv
    launch = read_launch()
    if arguments == ["--all-reduce"]:
        sys.exit(all_reduce(launch))
    try:
        folder = output_dir(arguments)
    except ValueError:
        if launch.rank:
            # The first node says it.
            sys.exit(USER_ERROR)
        raise
    sys.exit(gather(launch, folder) if launch.rank == 0 else tell(launch, folder))


if __name__ == "__main__":
    main()
