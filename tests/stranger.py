"""What README's section on adding a score says, done: one .py, as it stands there, and one .yaml."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hybridprune_megatron.config import compose
from tests.tracked import ROOT

OPTION = """
defaults:
  - attention_only
  - _self_
budget: 0.5
score:
  name: my_scores.KeyNorm
  power: 2.0
"""


def write(folder: Path) -> None:
    """``my_scores.py`` from README and ``conf/reduction/mine.yaml``."""
    section = (ROOT / "README.md").read_text().partition("## Adding a score")[2]
    code = re.search(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert code is not None
    (folder / "my_scores.py").write_text(code[1])
    shutil.copytree(compose.CONF_DIR, folder / "conf")
    (folder / "conf" / "reduction" / "mine.yaml").write_text(OPTION)


def within(folder: str, fn: Callable[..., Any], *args: Any) -> Any:
    """Calls ``fn`` in a process of its own, which finds both."""
    sys.path.insert(0, folder)
    compose.CONF_DIR = Path(folder) / "conf"
    return fn(*args)
