"""Real disks for tests: one that is soon full, and one that is only to be read."""

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

FULL = r"(No space left on device|File too large)"
"""What the system says of a small disk."""
READ_ONLY = r"(Read-only file system|Permission denied)"
"""What it says where nothing may be written."""


def mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


@contextmanager
def small(folder: Path, kilobytes: int) -> Iterator[Callable[[], None]]:
    """Leave room for so much in a folder, and yield what makes more of it.

    As root that is a file system of its own; otherwise a limit on the size of every file that this process writes.
    """
    folder.mkdir(exist_ok=True)
    if os.geteuid() == 0 and mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)):
        try:
            yield lambda: subprocess.run(["mount", "-o", "remount,size=512m", str(folder)], check=True) and None
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kilobytes, before[1]))
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Let nothing in a folder be written: as root by a mount, which stops root, too; otherwise by permissions."""
    folder.mkdir(exist_ok=True)
    if os.geteuid() == 0:
        if not mount("--bind", str(folder), str(folder)):
            pytest.skip("this root may mount nothing, and nothing else stops it")
        try:
            subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
            yield
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        return
    everything = [folder, *folder.rglob("*")]
    modes = {path: path.stat().st_mode for path in everything}
    for path in everything:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
