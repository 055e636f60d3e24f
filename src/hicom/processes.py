"""Processes that work for another one, and never outlive it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

SPAWN = multiprocessing.get_context("spawn")
"""Forking a process that has used torch's threads can hang, and CUDA does not survive it."""


class Workers(ProcessPoolExecutor):
    """A pool of processes, as a context: an error inside ends them at once, whatever they are at.

    They also end with the process that made the pool, even where that is killed: each waits for the end of a pipe
    whose other end only that process holds. Ctrl-C, which a terminal sends to all of them, is for that process alone.

    Args:
        num_workers: processes.

    Raises:
        ValueError: one of them was killed, and the block has not taken care of that.
    """

    def __init__(self, num_workers: int) -> None:
        self._followed, self._leash = SPAWN.Pipe(duplex=False)
        super().__init__(num_workers, mp_context=SPAWN, initializer=follow, initargs=(self._followed,))

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have a function called, perhaps by a process that is started for it."""
        with uninterrupted():
            return super().submit(fn, *args, **kwargs)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if kind is not None:
            self._leash.close()
        try:
            result = super().__exit__(kind, error, trace)
        finally:
            self._leash.close()
            self._followed.close()
        if isinstance(error, BrokenProcessPool):
            raise ValueError(
                "a process ended before it was done (out of memory?); a new run goes on from there"
            ) from None
        return result


def follow(leash: Connection) -> None:
    """End this process as soon as nobody holds the other end of a pipe any more, and leave Ctrl-C to who does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_after, args=(leash,), daemon=True).start()


def _end_after(leash: Connection) -> None:
    with suppress(EOFError, OSError):
        leash.recv_bytes()  # nothing ever comes
    os._exit(1)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach, not even before their first line of Python: it would be a traceback.

    This process gets it all the same, after the block at the latest.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
