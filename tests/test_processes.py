"""No worker outlives the process that made it, however that ends, and none writes a traceback."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import as_completed
from pathlib import Path

import pytest

from hicom.processes import Workers
from jobs import fail, nap

# Two processes are at work, or asleep between two tasks. SIGTERM is a matter of the command line.
SCRIPT = """
import sys, time
from pathlib import Path
from hicom import cli
from hicom.processes import Workers

def work(folder, seconds):
    import os
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(seconds)

def command(args):
    with Workers(2) as pool:
        jobs = [pool.submit(work, sys.argv[1], float(sys.argv[2])) for _ in range(2)]
        for job in jobs:
            job.result()
        time.sleep(60)

if __name__ == "__main__":
    cli.dispatch = command
    sys.exit(cli.main([]))
"""
ENDS = [
    *((signal.SIGTERM, False, 143), (signal.SIGTERM, True, 143), (signal.SIGKILL, False, -9)),
    *((signal.SIGINT, True, 130), (signal.SIGINT, False, 130)),
]


def alive(group: int) -> list[str]:
    """Return the command lines of the processes of a group."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(status[2]) == group and status[0] != "Z":
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("seconds", [60.0, 0.0], ids=["at work", "idle"])
@pytest.mark.parametrize(("number", "to_all", "code"), ENDS)
def test_workers_end_with_their_maker(
    tmp_path: Path, number: signal.Signals, to_all: bool, code: int, seconds: float
) -> None:
    script, began = tmp_path / "script.py", tmp_path / "began"
    script.write_text(SCRIPT)
    began.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(script), str(began), str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while len(list(began.iterdir())) < (2 if seconds else 1):
        assert process.poll() is None
        time.sleep(0.02)
    (os.killpg if to_all else os.kill)(process.pid, number)
    # Workers that stay hold these pipes open, so that this would not return.
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (code, "")
    if number != signal.SIGKILL:  # after which Python's own tracker counts what nobody closed
        assert err == ""
    assert "Traceback" not in err
    end = time.monotonic() + 10
    while left := alive(process.pid):
        assert time.monotonic() < end, left
        time.sleep(0.02)


def test_results_come_back() -> None:
    with Workers(2) as pool:
        assert [job.result() for job in [pool.submit(nap, 0.01), pool.submit(nap, 0.02)]] == [0.01, 0.02]
        assert list(pool.map(nap, [0.0, 0.01])) == [0.0, 0.01]
    assert not multiprocessing.active_children()


def test_an_error_does_not_wait_for_what_others_are_at() -> None:
    start = time.monotonic()

    def work() -> None:
        with Workers(2) as pool:
            jobs = [pool.submit(nap, 60), pool.submit(fail, "bad"), *(pool.submit(nap, 60) for _ in range(4))]
            for job in as_completed(jobs):
                job.result()

    with pytest.raises(ValueError, match="bad"):
        work()
    assert time.monotonic() - start < 20
    assert not multiprocessing.active_children()


def test_a_worker_that_is_killed_is_one_clear_error() -> None:
    def work() -> None:
        with Workers(1) as pool:
            pool.submit(os._exit, 3).result()

    with pytest.raises(ValueError, match=r"a process ended before it was done \(out of memory\?\); a new run goes on"):
        work()


@pytest.fixture
def no_children() -> Iterator[None]:
    yield
    assert not multiprocessing.active_children()


@pytest.mark.usefixtures("no_children")
def test_a_generator_that_is_left_ends_its_workers() -> None:
    def results() -> Iterator[float]:
        with Workers(2) as pool:
            for job in as_completed([pool.submit(nap, seconds) for seconds in (0.0, 60.0)]):
                yield job.result()

    some = results()
    assert next(some) == 0.0
    some.close()
