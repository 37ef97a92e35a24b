"""Ctrl-C and a lost terminal, as a process on a terminal gets them: both ask a run to stop, a second Ctrl-C ends it."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from hybridprune_megatron.config.one_line import INTERRUPTED
from tests.own_time import HANG_SECONDS

# A run of steps that nothing interrupts, and a line to the terminal after each, as the progress bar writes it.
_RUN = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from hybridprune_megatron.engine.preemption import STOPPED, hold_stop_signals, stop_requested
    hold_stop_signals()
    out = Path(sys.argv[1])
    (out / "ready").touch()
    for step in range(6000):
        time.sleep(0.01)
        print("step", step, file=sys.stderr, flush=True)
        if stop_requested() and not (out / "hold").exists():
            print("saved", flush=True)
            (out / "saved").touch()
            sys.exit(STOPPED)
    """
)


class Terminal:
    """The program on a terminal of its own, as the session's leader: what the terminal sends, it gets."""

    def __init__(self, folder: Path, before: str = "") -> None:
        self.folder = folder
        self.user, other = pty.openpty()
        command = [sys.executable, "-c", before + _RUN, str(folder)]
        self.process = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, start_new_session=True, preexec_fn=_own_terminal
        )
        os.close(other)
        self.wait_for("ready")

    def wait_for(self, name: str) -> None:
        """Until the program has made a file."""
        deadline = time.monotonic() + HANG_SECONDS
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, name
            time.sleep(0.01)

    def read_until(self, text: str) -> str:
        """What is on the terminal so far, once a text is there."""
        seen = ""
        while text not in seen:
            seen += os.read(self.user, 4096).decode()
        return seen

    def end(self) -> int:
        """The exit status."""
        return self.process.wait(HANG_SECONDS)


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    # Whoever started the tests may ignore them (nohup, a shell's background), and a program inherits that.
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_DFL)


def test_one_ctrl_c_saves_and_stops(tmp_path: Path) -> None:
    run = Terminal(tmp_path)
    os.write(run.user, b"\x03")
    seen = run.read_until("saved\r\n")
    assert run.end() == os.EX_TEMPFAIL
    # It may have stopped before it had to say how to stop it at once.
    assert seen.count("stops and saves after this step; Ctrl-C again stops at once") <= 1
    assert "Traceback" not in seen


def test_a_second_ctrl_c_ends_the_run_in_one_line(tmp_path: Path) -> None:
    # A step that takes long: what was asked for is not looked at.
    (tmp_path / "hold").touch()
    run = Terminal(tmp_path)
    os.write(run.user, b"\x03")
    run.read_until("Ctrl-C again")
    os.write(run.user, b"\x03")
    seen = run.read_until("stopped at once\r\n")
    assert run.end() == INTERRUPTED
    assert "Traceback" not in seen
    assert not (tmp_path / "saved").exists()


def test_a_lost_terminal_saves_and_stops(tmp_path: Path) -> None:
    run = Terminal(tmp_path)
    run.read_until("step 3")
    os.close(run.user)
    # Lines about steps that nobody can read do not end it before it has saved.
    assert run.end() == os.EX_TEMPFAIL
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("ignored", ["SIGHUP", "SIGINT"])
def test_what_is_ignored_from_the_start_stays_so(ignored: str, tmp_path: Path) -> None:
    """As nohup starts it, and as a script starts it in the background."""
    run = Terminal(tmp_path, f"import signal; signal.signal(signal.{ignored}, signal.SIG_IGN)\n")
    run.process.send_signal(signal.Signals[ignored])
    time.sleep(0.3)
    assert run.process.poll() is None
    run.process.terminate()
    assert run.end() == os.EX_TEMPFAIL
