"""Small configurations by the hundred: Hydra and the checks of a command line take a third of a second for each.

What a test changes is set in a configuration that was composed once, and what a rank of a world composed is left to
the ranks of the next worlds.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import pickle
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from hybridprune_megatron.config import compose
from hybridprune_megatron.config.explain import GROUPS
from hybridprune_megatron.config.schema import Config
from hybridprune_megatron.layers.kinds import KINDS

#: Names a folder that lives as long as the tests; where it is not set, nothing is left. ``tests.worlds`` sets it.
FOLDER = "HYBRIDPRUNE_COMPOSED"
_OURS = "hybridprune_megatron."


def composed(fixed: Sequence[str], changes: Sequence[str]) -> Config:
    """``load_config`` of two lists of overrides, of which the first is the same for many calls."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        return _changed(fixed, changes)
    # What else is looked at: other files, kinds of layers or paths make another configuration.
    known = (*fixed, *changes, str(compose.CONF_DIR), *sorted(KINDS), os.getcwd())
    path = Path(folder, hashlib.sha256(repr(known).encode()).hexdigest())
    with path.with_suffix(".lock").open("w") as lock:
        # Ranks of a world ask at once: the others wait for the first.
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            return pickle.loads(path.read_bytes())
        cfg = _changed(fixed, changes)
        parts = (cfg.reduction.score, cfg.reduction.schedule, cfg.reduction.front)
        # Somebody else's class must be looked up, which makes it known.
        if all(type(part).__module__.startswith(_OURS) for part in parts):
            whole = path.with_suffix(".part")
            whole.write_bytes(pickle.dumps(cfg))
            whole.rename(path)
        return cfg


def _changed(fixed: Sequence[str], changes: Sequence[str]) -> Config:
    groups = [text for text in changes if text.partition("=")[0] in GROUPS]
    values = [text for text in changes if text not in groups]
    found: Any = deepcopy(_base((*fixed, *groups), compose.CONF_DIR, tuple(KINDS)))
    compose.set_keys(found, values)
    compose.import_named(values)
    return compose.to_config(found)


@functools.cache
def _base(overrides: tuple[str, ...], conf: Path, kinds: tuple[str, ...]) -> DictConfig:
    """Composed for the files and the kinds of layers of now, which some defaults name."""
    assert (conf, kinds) == (compose.CONF_DIR, tuple(KINDS))
    return compose.compose_config(overrides)
