"""Where a result comes from: the commit of the code and the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any


def git_commit(folder: Path = Path(__file__).parent) -> str | None:
    """Return the commit of a source tree, with `-dirty` where it has changes; None outside of a repository.

    Changes in `docs` do not count: nothing there runs, and benchmarks write their results to it.

    Args:
        folder: inside the tree.
    """
    try:
        found = [
            subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for command in (
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)docs"],
            )
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    commit, changes = found
    return f"{commit}-dirty" if changes else commit


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
