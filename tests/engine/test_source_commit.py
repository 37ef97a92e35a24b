"""The commit that a checkpoint's run.json names."""

from __future__ import annotations

import subprocess

from hybridprune_megatron.engine import strategy as module
from hybridprune_megatron.engine.strategy import source_commit


def test_the_commit_of_a_checkout_and_whether_files_differ(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "_ROOT", tmp_path)
    assert source_commit() is None

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init")
    assert source_commit() is None
    (tmp_path / "code.py").write_text("1\n")
    git("add", "code.py")
    git("commit", "-m", "one")
    # A tag changes nothing.
    git("tag", "v1")
    commit = git("rev-parse", "--short=12", "HEAD")
    assert source_commit() == commit
    (tmp_path / "code.py").write_text("2\n")
    assert source_commit() == commit + "+"
