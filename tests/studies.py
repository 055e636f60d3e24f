"""Benchmarks as modules: scripts that import each other by name."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name: str) -> ModuleType:
    """Import a benchmark."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return __import__(name)


def unload() -> None:
    """Leave no benchmark behind in other tests' modules."""
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def forbid_work(study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a benchmark train and answer nothing any more: whatever it needs is there."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("this was done before")

    for name in ("answers_of", "run"):
        monkeypatch.setattr(study, name, refuse)
