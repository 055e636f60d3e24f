"""Where a result comes from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hicom.provenance import git_commit, short_commit


def git(folder: Path, *command: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", *who, *command], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_a_tree_with_changes_is_marked_unless_only_docs_changed(tmp_path: Path) -> None:
    assert git_commit(tmp_path) is None
    for name in ("src/code.py", "docs/results/page.md"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("as committed", "utf-8")
    git(tmp_path, "init", "-q")
    assert git_commit(tmp_path) is None, "nothing is committed yet"
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    assert git_commit(tmp_path / "src") == commit
    (tmp_path / "docs/results/page.md").write_text("new numbers", "utf-8")
    (tmp_path / "notes.txt").write_text("of nobody", "utf-8")
    assert git_commit(tmp_path / "src") == commit
    (tmp_path / "src/code.py").write_text("other code", "utf-8")
    assert git_commit(tmp_path / "src") == f"{commit}-dirty"
    assert short_commit(git_commit(tmp_path)) == f"{commit[:12]}-dirty"


def test_no_git_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None
