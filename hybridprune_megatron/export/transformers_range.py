"""Which versions of transformers the code of an export runs under, and the check of the installed one."""

from __future__ import annotations

import warnings

import transformers
from packaging.specifiers import InvalidSpecifier, SpecifierSet

#: Written into ``config.json``. ``tests/export`` passes under the first and the last version of it.
TRANSFORMERS_RANGE = ">=5.23,<5.25"


def check_transformers(supported: str) -> None:
    """Compares the installed version with the range: older ones are refused, newer ones get a warning.

    Args:
        supported: ``transformers_range`` of a ``config.json``, as pip writes it.

    Raises:
        ValueError: an older version, or something that is not a range.
    """
    try:
        allowed = SpecifierSet(supported)
    except (InvalidSpecifier, TypeError, AttributeError):
        raise ValueError(
            f"transformers_range={supported!r:.60} in config.json: must be versions as pip writes them; set it to "
            f"{TRANSFORMERS_RANGE}"
        ) from None
    installed = transformers.__version__
    if allowed.contains(installed, prereleases=True):
        return
    above = SpecifierSet(",".join(str(bound) for bound in allowed if not bound.operator.startswith("<")))
    told = f"transformers {installed} is installed and this model's code was tested under {supported} (config.json)"
    if not above.contains(installed, prereleases=True):
        raise ValueError(f"{told}: pip install 'transformers{supported}'")
    warnings.warn(f"{told}: if something fails, pip install 'transformers{supported}'", stacklevel=1)
