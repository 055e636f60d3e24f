"""Locks between processes of one machine; the system gives them back even after `kill -9`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


class _Lock(FileLock):
    """A class of our own: inside of lmms-eval, plain ones of one path are one lock, which two threads may then hold."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; wait for another holder."""
    with claimed(path, wait=True):
        yield


@contextmanager
def claimed(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold an exclusive lock if no other process does, or wait for it; yield whether it is held."""
    lock = _Lock(path, thread_local=False)  # a generator that holds it may be closed by another thread
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextmanager
def owned(out: Path, *, leaves_files: bool = True) -> Iterator[None]:
    """Hold a folder that only one process may write for this one.

    Args:
        out: the folder, which is there.
        leaves_files: whether the two files stay in it that say who holds it.

    Raises:
        ValueError: another process holds it.
    """
    # Not in the lock's own file: Windows lets nobody read that, and who asks for a lock may empty it.
    name = out / "lock.pid"
    with claimed(out / "lock", wait=False) as is_mine:
        if not is_mine:
            holder = name.read_text("utf-8").strip() if name.is_file() else ""
            who = f"process {holder}" if holder else "another process"  # one that has only just begun
            raise ValueError(f"the folder {out} is in use by {who}; stop it, or choose another out")
        try:
            name.write_text(str(os.getpid()), "utf-8")
        except OSError as error:  # it was made, but there is no room for what it says
            raise OSError(error.errno, os.strerror(error.errno or 0), str(name)) from error
        try:
            yield
        finally:
            if not leaves_files:
                for each in (name, out / "lock"):
                    with suppress(OSError):  # Windows removes no file that is open
                        each.unlink()
