"""Ends the whole job with one line that names the rank and the reason, as soon as one process of it is gone.

A collective only knows that nobody answers: NCCL waits for ``trainer.timeout_minutes``, gloo says "connection closed by
peer". So every rank keeps a connection to rank 0, which the kernel closes the moment a process dies, whatever killed
it. Rank 0 gathers what is said within a second, decides who was first, and tells the others, which end without a
traceback of their own.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from hybridprune_megatron.engine.bad_node import HARDWARE, SILENT, blame, is_hardware, own_node
from hybridprune_megatron.engine.launch import Launch

#: After the first sign of a failure, for what other ranks have to say about it.
_GATHER_SECONDS = 1.0
#: For rank 0's verdict, in a rank that has lost a peer.
_VERDICT_SECONDS = 10.0
#: For the other ranks to leave, in rank 0, whose end would look like a death to them.
_LEAVE_SECONDS = 60.0
#: What a collective says when another rank is gone or stuck.
_LOST = ("closed by peer", "reset by peer", "broken pipe", "timed out", "timeout", "nccl", "connection refused")
_SILENT = "died without an error message (killed, out of memory, or its machine is gone)"

_current: Watch | None = None


def start_watch(launch: Launch) -> None:
    """Connects this process; every rank calls it, after torch.distributed runs. Nothing to do for a single process."""
    global _current
    if launch.world_size > 1 and _current is None:
        _current = Watch(launch)


def report_failure(error: BaseException) -> None:
    """Tells the others why this rank ends; if another rank is the cause, that ends the process.

    A SystemExit is not a failure: all ranks have agreed on it.
    """
    if isinstance(error, SystemExit):
        return
    if _current is not None:
        _current.fail(error)
    elif is_hardware(str(error)):
        blame(own_node(), HARDWARE, str(error))


def end_watch() -> None:
    """Leaves in order, or with the exception under way."""
    global _current
    error = sys.exception()
    if error is not None:
        report_failure(error)
    if _current is not None:
        _current.leave()
    _current = None


@dataclass
class _Peer:
    """What rank 0 knows of a rank.

    ``node``: its machine, as Slurm calls it; ``reason``: what it said, or that it is gone; ``lost``: it only misses
    others.
    """

    name: str
    node: str
    connection: socket.socket
    left: bool = False
    reason: str | None = None
    lost: bool = False


@dataclass
class _Ledger:
    """Rank 0's book of peers by rank."""

    peers: dict[int, _Peer] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)


class Watch:
    """This process' end of the connection; rank 0 serves itself like the others."""

    def __init__(self, launch: Launch) -> None:
        self._rank, self._size = launch.rank, launch.world_size
        self._over = threading.Event()
        self._lost_others = False
        self._book = _Ledger()
        self._sockets: list[socket.socket] = []
        # A loader or writer process that lives on must not hold the connection of a dead rank open.
        os.register_at_fork(after_in_child=self._close)
        where: list[Any] = [None, own_node()]
        if self._rank == 0:
            server = socket.create_server(("", 0), backlog=self._size)
            where[0] = server.getsockname()[1]
            threading.Thread(target=self._serve, args=(server,), daemon=True).start()
        dist.broadcast_object_list(where, src=0)
        self._first_node = where[1]
        self._connection = socket.create_connection((launch.main_address, where[0]), timeout=60)
        self._connection.settimeout(None)
        self._keep(self._connection)
        name = f"rank {self._rank} ({socket.gethostname()}, process {os.getpid()})"
        self._say(rank=self._rank, name=name, node=own_node())
        threading.Thread(target=self._listen, daemon=True).start()
        # Nobody starts before all are connected.
        dist.barrier()

    def leave(self) -> None:
        """Says that this rank is done; rank 0 stays until the others are."""
        if not self._over.is_set():
            self._over.set()
            self._say(left=True)
        if self._rank == 0:
            with self._book.changed:
                self._book.changed.wait_for(self._all_ended, _LEAVE_SECONDS)

    def _all_ended(self) -> bool:
        peers = self._book.peers.values()
        # One that connected a moment ago may not be in the book yet.
        return len(peers) == self._size and all(peer.left or peer.reason for peer in peers)

    def fail(self, error: BaseException) -> None:
        """Says why this rank ends; one that only lost another waits for rank 0's word, which ends the process."""
        text = " ".join(f"{type(error).__name__}: {error}".split())
        self._lost_others = isinstance(error, RuntimeError) and any(word in text.lower() for word in _LOST)
        self._say(reason=text[:500], lost=self._lost_others)
        if self._lost_others:
            self._over.wait(_VERDICT_SECONDS)
        self._over.set()

    def _say(self, **message: Any) -> None:
        try:
            _send(self._connection, message)
        except OSError:
            # Rank 0 is gone; the listener knows it too.
            return

    def _listen(self) -> None:
        """Waits for rank 0's verdict; its end without one is a verdict too."""
        told = next(_messages(self._connection), None)
        if self._over.is_set():
            return
        verdict = told or {"rank": 0, "line": f"rank 0 {_SILENT}"}
        if verdict["rank"] == self._rank and not self._lost_others:
            self._over.set()
            return
        if told is None:
            blame(self._first_node, SILENT, verdict["line"])
        if self._rank == 0 or told is None:
            message = f"job ended: {verdict['line']}; the same command continues from the last checkpoint\n"
            os.write(2, message.encode())
        os._exit(1)

    def _serve(self, server: socket.socket) -> None:
        """Rank 0: takes everybody's word, and gives the verdict at the first failure."""
        book = self._book
        threading.Thread(target=self._judge, args=(book,), daemon=True).start()
        for _ in range(self._size):
            connection, _ = server.accept()
            self._keep(connection)
            threading.Thread(target=_hear, args=(connection, book), daemon=True).start()
        server.close()

    def _keep(self, connection: socket.socket) -> None:
        """A machine that vanishes sends nothing: it is asked after 10 s of silence, and given up 15 s later."""
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3)):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._sockets.append(connection)

    def _close(self) -> None:
        for connection in self._sockets:
            connection.close()

    def _judge(self, book: _Ledger) -> None:
        with book.changed:
            book.changed.wait_for(lambda: any(peer.reason for peer in book.peers.values()))
        time.sleep(_GATHER_SECONDS)
        with book.changed:
            verdict = _verdict(book.peers)
            _blame_node(verdict, book.peers)
            for peer in book.peers.values():
                try:
                    _send(peer.connection, verdict)
                except OSError:
                    continue


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall((json.dumps(message) + "\n").encode())


def _messages(connection: socket.socket) -> Iterator[dict[str, Any]]:
    """What the other end says, until the connection ends."""
    rest = b""
    while True:
        try:
            read = connection.recv(4096)
        except OSError:
            return
        if not read:
            return
        *lines, rest = (rest + read).split(b"\n")
        yield from map(json.loads, lines)


def _hear(connection: socket.socket, book: _Ledger) -> None:
    """Rank 0: writes down what one rank says, until its connection ends."""
    peer = None
    for message in _messages(connection):
        with book.changed:
            if peer is None:
                peer = book.peers[message["rank"]] = _Peer(message["name"], message["node"], connection)
            elif "left" in message:
                peer.left = True
            elif peer.reason is None:
                peer.reason, peer.lost = message["reason"], message["lost"]
            book.changed.notify_all()
    if peer is not None and not peer.left and peer.reason is None:
        with book.changed:
            peer.reason = _SILENT
            book.changed.notify_all()


def _blame_node(verdict: dict[str, Any], peers: dict[int, _Peer]) -> None:
    """Writes down the machine of a rank that died, or that failed of its hardware."""
    peer = peers.get(verdict["rank"])
    if peer is None or peer.reason is None:
        return
    if peer.reason == _SILENT:
        blame(peer.node, SILENT, verdict["line"])
    elif is_hardware(peer.reason):
        blame(peer.node, HARDWARE, verdict["line"])


def _verdict(peers: dict[int, _Peer]) -> dict[str, Any]:
    """Who ended the job: one that died, else one that failed by itself, else those that nobody heard of."""
    failed = {rank: peer for rank, peer in peers.items() if peer.reason}
    order = sorted(failed, key=lambda rank: (failed[rank].lost, failed[rank].reason != _SILENT, rank))
    first = failed[order[0]]
    if not first.lost:
        return {"rank": order[0], "line": f"{first.name} {first.reason}"}
    quiet = [peer.name for rank, peer in sorted(peers.items()) if rank not in failed and not peer.left]
    stuck = f"; nothing heard from {', '.join(quiet[:4])}" if quiet else ""
    return {"rank": -1, "line": f"{first.name} timed out waiting for the others ({first.reason}){stuck}"}
