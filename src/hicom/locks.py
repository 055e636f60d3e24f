"""Locks between processes of one machine; the system gives them back even after `kill -9`."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; wait for another holder."""
    with claimed(path, wait=True):
        yield


@contextmanager
def claimed(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold an exclusive lock if no other process does, or wait for it; yield whether it is held."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def owned(out: Path) -> Iterator[None]:
    """Hold a run folder for this process.

    Raises:
        ValueError: another process holds it.
    """
    path = out / "lock"
    with claimed(path, wait=False) as is_mine:
        if not is_mine:
            holder = path.read_text("utf-8").strip()
            raise ValueError(f"the run folder {out} is in use by process {holder}; stop it, or choose another out")
        path.write_text(str(os.getpid()), "utf-8")
        yield
