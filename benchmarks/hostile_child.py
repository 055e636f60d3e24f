"""What the parts of `hostile.py` share: outcomes, and work in a child process within limits."""

from __future__ import annotations

import json
import os
import select
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GOOD = ("answered", "answered with a warning", "clear error")
BAD = ("wrong answer", "unclear error", "traceback", "signal", "hang", "memory")
"""Each of these is a fault."""
LONGEST_ERROR = 500
"""Characters of an error that is still clear."""


@dataclass(frozen=True)
class Limits:
    """What one file may take.

    Attributes:
        seconds: that it may take.
        megabytes: that it may add to the memory of the process.
    """

    seconds: float = 8.0
    megabytes: int = 1000


@dataclass(frozen=True)
class Outcome:
    """What became of an attack.

    Attributes:
        group: what was attacked, and by what kind.
        name: of the attack.
        result: one of `GOOD` and `BAD`.
        text: the error, or what is wrong.
        seconds: that it took.
        megabytes: that it added to the memory of the process; None: not measured.
    """

    group: str
    name: str
    result: str
    text: str = ""
    seconds: float = 0.0
    megabytes: float | None = None


def in_child(work: Callable[[], tuple[str, str]], group: str, name: str, limits: Limits) -> Outcome:
    """Do work in a forked process and return what became of it.

    Args:
        work: what is done; returns a result and a text. An exception that it does not handle is a traceback.
        group: of the outcome.
        name: of the outcome.
        limits: beyond which it is killed.
    """
    reader, writer = os.pipe()
    before, start = resident_mb(os.getpid()), time.perf_counter()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            found = work()
        except BaseException as error:
            found = ("traceback", f"{type(error).__name__}: {error} ({last_place(error)})")
        with os.fdopen(writer, "w") as pipe:
            json.dump(found, pipe)
        os._exit(0)
    os.close(writer)
    peak, killed = before, ""
    while True:
        readable, _, _ = select.select([reader], [], [], 0.01)
        peak = max(peak, resident_mb(child))
        if readable:
            break
        if time.perf_counter() - start > limits.seconds:
            killed = "hang"
        elif peak - before > 3 * limits.megabytes:
            killed = "memory"
        if killed:
            os.kill(child, signal.SIGKILL)
            break
    with os.fdopen(reader) as pipe:
        told = "" if killed else pipe.read()
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - start
    megabytes = round(max(peak, usage.ru_maxrss / 1024) - before, 1)
    if killed:
        return Outcome(group, name, killed, f"killed after {seconds:.0f} s", seconds, megabytes)
    if os.WIFSIGNALED(status) or not told:
        return Outcome(group, name, "signal", f"ended with status {status}", seconds, megabytes)
    result, text = json.loads(told)
    if megabytes > limits.megabytes:
        result, text = "memory", f"{megabytes:,.0f} MB; {result}: {text}"
    return Outcome(group, name, result, text, round(seconds, 3), megabytes)


def resident_mb(process: int) -> float:
    """Return the memory that a process holds, in MB; 0 for one that is gone."""
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text("ascii").split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def last_place(error: BaseException) -> str:
    """Return where an error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "nowhere"
