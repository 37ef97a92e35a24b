"""The tests of the method are of its plain torch; tests/kernels compares the native operators with it."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDPRUNE_KERNELS", "0")
