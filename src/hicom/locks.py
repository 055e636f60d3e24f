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
    """Hold a run folder, made here if it is not there, for this process.

    Raises:
        ValueError: another process holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"the run folder {out} is in use by process {file.read().strip()}; stop it, or choose another out"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
