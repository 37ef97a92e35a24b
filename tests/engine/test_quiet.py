"""Libraries are quiet unless somebody asks to hear them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_PROGRAM = """
from hybridprune_megatron.engine.quiet import quiet_libraries
quiet_libraries()
import logging, warnings
logging.getLogger("megatron").info("bucket sizes")
code = compile("import warnings; warnings.warn('no apex')", "x.py", "exec")
exec(code, {"__name__": "megatron.core"})
"""


@pytest.mark.parametrize(("asked", "silent"), [(None, True), ("ignore", True), ("default", False)])
def test_what_libraries_say(asked: str | None, silent: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    environment |= {} if asked is None else {"PYTHONWARNINGS": asked}
    done = subprocess.run([sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert ("no apex" not in done.stderr) is silent
    # With "ignore", whose levels were not touched before, everything was heard but the warnings.
    program = _PROGRAM + "print(logging.getLogger('megatron').level)"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout.strip() == "30") is silent
