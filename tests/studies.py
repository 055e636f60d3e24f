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
