"""Files and folders that come to be as a whole or not at all, with normal permissions, and errors that name them."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PART = ".part"
"""End of the name of what is not whole yet."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of errors that say that there is no room."""
UNWRITABLE = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""Numbers of errors that say that nothing can be written."""
NEARLY_NOTHING = 2**20
"""Free bytes below which a writer that does not say why it failed has found the disk full."""
IN_TORCH = ("inline_container.cc", "PytorchStreamWriter", "iostream error")
"""What a RuntimeError of `torch.save` that could not write says; it does not say why."""
IN_SQLITE = {"FULL": errno.ENOSPC, "READONLY": errno.EROFS, "CANTOPEN": errno.EACCES, "IOERR": errno.EIO}
"""What SQLite calls these."""


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write a file to, which takes the place of `path` once the block is through.

    What is no plain file, such as /dev/stdout, is written as it is, and a link stays one.

    Raises:
        OSError: it cannot be written; `path` is named.
    """
    if (path.exists() and not path.is_file()) or path.is_relative_to("/dev"):
        with naming(path):
            yield path
        return
    path = path.resolve() if path.is_symlink() else path
    # The process's number, so that two at once do not write into the same file.
    part = path.with_name(f"{path.name}.{os.getpid()}{PART}")
    try:
        with naming(path, part):
            with part.open("wb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            yield part
            part.chmod(mode)  # some writers put a file with other permissions there
            part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8, as `writing` does; lone surrogates, which it has no bytes for, as JSON escapes them."""
    with writing(path) as part:
        part.write_text(text, "utf-8", "backslashreplace")


def write_json(path: Path, facts: Any) -> None:
    """Write a JSON file, as `writing` does."""
    write_text(path, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def parse_json(text: str) -> Any:
    """Return what a JSON text says.

    Raises:
        json.JSONDecodeError: it is not JSON, or nested more deeply than anything that means something.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None


@contextmanager
def writing_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a folder beside `folder` to write to, which takes the place of `folder` once the block is through.

    What a killed process has left there is removed first. A folder that nothing can take the place of, such as a
    mounted volume, is filled as it is, and emptied again if that fails.

    Args:
        folder: to write; it must not hold anything yet.
        replace: it may hold something, which goes.

    Raises:
        ValueError: it holds something, or another process writes it.
        OSError: it cannot be written; it is named.
    """
    folder = folder.resolve() if folder.is_symlink() else folder
    if not replace:
        check_new(folder)
    with naming(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_dir() and (os.path.ismount(folder) or not os.access(folder.parent, os.W_OK)):
        try:
            clear(folder)
            with naming(folder):
                yield folder
                give_permissions(folder)
        except BaseException:
            clear(folder)
            raise
        return
    from .locks import claimed  # which loads a package that takes longer than all else that reading a video needs

    part = folder.with_name(f"{folder.name}{PART}")
    with naming(folder, part):
        part.mkdir(exist_ok=True)
    # The lock lies inside, so that nothing stays beside the folder.
    lock = part / ".lock"
    with claimed(lock, wait=False) as is_mine:
        if not is_mine:
            raise ValueError(f"{folder} is being written by another process; wait for it, or choose another folder")
        try:
            clear(part, but=lock)
            with naming(folder, part):
                if not replace:
                    check_new(folder)  # the other process may have finished it just now
                yield part
                give_permissions(part)
            if os.name != "nt":
                take_place(part, folder, replace=replace)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    if os.name == "nt":  # which moves no folder in which a file is open
        take_place(part, folder, replace=replace)
    (folder / lock.name).unlink(missing_ok=True)


def check_new(folder: Path) -> None:
    """Raise ValueError where a folder to write holds something, or cannot be written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty; choose another folder")
    check_place(folder)


def check_target(path: Path) -> None:
    """Raise ValueError where a file cannot be written, before the work that it is to hold."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file")
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")
    check_place(path)


def check_place(path: Path) -> None:
    """Raise ValueError where a file or folder can be neither written nor made."""
    nearest = next((each for each in (path, *path.absolute().parents) if each.exists()), path)
    if nearest != path and not nearest.is_dir():
        raise ValueError(f"{path} cannot be written: {nearest} is a file; choose another place")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"{path} cannot be written: you may not write in {nearest}; choose another place")


def clear(folder: Path, but: Path | None = None) -> None:
    """Remove what is in a folder, one file perhaps aside."""
    for each in folder.iterdir():
        if each != but:
            shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()


def clear_parts(folder: Path) -> None:
    """Remove what killed processes have left in a folder that no other process writes now."""
    for pattern in (f"*{PART}", ".tmp*"):  # safetensors names its own like this
        for each in folder.glob(pattern):
            if each.is_file():
                each.unlink(missing_ok=True)


def give_permissions(folder: Path) -> None:
    """Give files in a folder the permissions of any new file there: some writers keep theirs to the user."""
    new = folder / f".new{PART}"
    new.touch()
    mode = stat.S_IMODE(new.stat().st_mode)
    new.unlink()
    for each in folder.rglob("*"):
        if each.is_file() and not each.is_symlink():
            each.chmod(stat.S_IMODE(each.stat().st_mode) | mode)


def take_place(part: Path, folder: Path, *, replace: bool) -> None:
    """Move a folder to where another one may be: an empty one, or, with `replace`, any."""
    if replace and folder.is_dir():
        shutil.rmtree(folder)
    elif folder.is_dir():
        folder.rmdir()
    part.replace(folder)


@contextmanager
def naming(path: Path, part: Path | None = None) -> Iterator[None]:
    """Make what libraries raise where nothing can be written an OSError that names `path`.

    Args:
        path: what the block writes.
        part: what it is called meanwhile, which nobody but this module knows.

    Raises:
        OSError: as it says.
    """
    try:
        yield
    except OSError as error:
        is_of_part = part is not None and Path(str(error.filename)).is_relative_to(part)
        is_of_disk = error.errno in UNWRITABLE and error.filename in (None, str(path))
        if error.errno is None or not (is_of_part or is_of_disk):
            raise
        # Errors of PyAV are of classes of its own, which other processes could not hand over.
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except Exception as error:
        number = number_of(error, path)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def number_of(error: Exception, path: Path) -> int | None:
    """Return the number under which the system knows an error of safetensors, torch or SQLite; None: it knows none."""
    text = str(error)
    folder = next(each for each in (path, *path.parents) if each.is_dir())
    is_full = shutil.disk_usage(folder).free < NEARLY_NOTHING
    if isinstance(error, sqlite3.Error):
        name = getattr(error, "sqlite_errorname", "").removeprefix("SQLITE_").partition("_")[0]
        return errno.ENOSPC if name == "IOERR" and is_full else IN_SQLITE.get(name)
    if type(error).__name__ == "SafetensorError":
        found = re.search(r"\(os error (\d+)\)", text)
        return int(found[1]) if found else None
    if isinstance(error, RuntimeError) and any(word in text for word in IN_TORCH):
        return errno.ENOSPC if is_full else errno.EIO
    return None
