"""What comes with the package besides its modules: ``conf/`` and the files of the demo."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
# A wheel holds the folders inside of the package, a checkout and an editable install next to it.
_INSTALLED = (_PACKAGE / "conf").is_dir()
HOME = _PACKAGE if _INSTALLED else _PACKAGE.parent
CONF_DIR = HOME / "conf"
#: Where the pages of the documentation are written; None where there is only the package.
DOCS = None if _INSTALLED else HOME / "docs"
_ASSETS = "assets"


def shipped_path(path: str) -> str:
    """Where a path of the configuration leads.

    Args:
        path: as the configuration has it.

    Returns:
        The same, or for one in ``assets/`` that is not below the current folder, that of the file that came along.
    """
    if Path(path).parts[:1] == (_ASSETS,) and not os.path.lexists(path) and (HOME / path).exists():
        return str(HOME / path)
    return path
