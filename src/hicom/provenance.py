"""Where a result comes from: the commit of the code and the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any


def git_commit() -> str | None:
    """Return the commit of the source tree, marked where it has changes; None outside of a repository."""
    folder = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def short_commit(commit: str | None) -> str:
    """Return the first digits of a commit, with its mark where the tree had changes."""
    digits, dash, mark = str(commit).partition("-")
    return digits[:12] + dash + mark


def hardware() -> dict[str, Any]:
    """Return what this process runs on."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }
