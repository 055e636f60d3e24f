"""Locks between processes: exclusive, given back however the holder ends, and named after the holder."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hicom.locks import claimed, locked, owned

HOLD = """
import os, sys
from pathlib import Path
from hicom.locks import locked, owned
with {0}(Path(sys.argv[1])):
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(how: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a process that holds `path` until it is stopped."""
    command = [sys.executable, "-c", HOLD.format(how), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{process.pid}\n"
        yield process
        process.kill()


def test_one_process_holds_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder("locked", path) as other:
        for _ in range(2):  # a refusal changes nothing
            with claimed(path, wait=False) as is_mine:
                assert not is_mine
        other.send_signal(signal.SIGKILL)
        other.wait()
        with claimed(path, wait=False) as is_mine:
            assert is_mine, "the system gives back what a killed process held"


def test_who_waits_gets_it_after_the_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holder("locked", path) as other:
        threading.Timer(0.3, other.kill).start()
        with locked(path):
            assert other.wait(1) == -signal.SIGKILL


def test_two_threads_exclude_each_other(tmp_path: Path) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        for _ in range(5):
            with locked(tmp_path / "lock"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.002)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 15


def test_an_error_inside_gives_it_back(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path / "lock"):
        raise KeyError
    with claimed(tmp_path / "lock", wait=False) as is_mine:
        assert is_mine


def test_a_generator_that_ends_in_another_thread_gives_it_back(tmp_path: Path) -> None:
    def hold() -> Iterator[None]:
        with locked(tmp_path / "lock"):
            yield

    generator = hold()
    next(generator)
    thread = threading.Thread(target=generator.close)
    thread.start()
    thread.join()
    with claimed(tmp_path / "lock", wait=False) as is_mine:
        assert is_mine


def test_a_run_folder_tells_who_holds_it(tmp_path: Path) -> None:
    with holder("owned", tmp_path) as other:
        for _ in range(2):  # asking does not wipe the name
            with pytest.raises(ValueError, match=f"in use by process {other.pid}; stop it, or choose"), owned(tmp_path):
                pass
        other.kill()
        other.wait()
        with owned(tmp_path):
            with pytest.raises(ValueError, match=f"in use by process {os.getpid()};"), owned(tmp_path):
                pass
            (tmp_path / "lock.pid").unlink()  # as before its holder has written it
            with pytest.raises(ValueError, match="in use by another process;"), owned(tmp_path):
                pass
