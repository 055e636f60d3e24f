"""Features of videos that were encoded before, on disk: bounded, checked, shared by processes."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import PART, writing
from ..locks import locked

NUM_LOCKS = 64
"""Entries share these lock files, so that their number does not grow with the number of videos."""
LEFT_S = 3600.0
"""Seconds after which what is not whole has been left by a process that was killed."""


class CacheWarning(UserWarning):
    """An entry was damaged and is made anew, or could not be kept."""


@dataclass(frozen=True)
class Entry:
    """What is kept of one video.

    Attributes:
        tensors: by name.
        facts: JSON values.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class FeatureCache:
    """A folder of entries, one file each, named after a digest of all that they depend on.

    An entry is written beside its place and then renamed, so that no reader sees half of one; checksums of its tensors
    tell when a file was damaged later. Once all together exceed `max_bytes`, those not used for longest go. A folder
    that this process may only read gives what it holds.

    Args:
        folder: made if it is not there.
        max_bytes: of all entries together.

    Raises:
        ValueError: `max_bytes` is not positive, or `folder` is a file.
    """

    def __init__(self, folder: str | Path, max_bytes: int = 20 * 10**9) -> None:
        if max_bytes <= 0:
            raise ValueError(f"max_bytes={max_bytes} of a feature cache must be positive")
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; a feature cache needs a folder")
        with suppress(OSError):  # what is there can be read all the same, and `write` says that nothing is kept
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)

    def path(self, key: dict[str, Any]) -> Path:
        """Return the file of an entry."""
        return self.folder / f"{_digest(key)}.safetensors"

    @contextmanager
    def building(self, key: dict[str, Any]) -> Iterator[None]:
        """Hold the lock of an entry: of two processes that need the same one, the second waits and then finds it.

        Where no lock can be had, because the folder is only to be read or the disk is full, both may make it.
        """
        number = int(_digest(key)[:8], 16) % NUM_LOCKS
        with ExitStack() as stack:
            with suppress(OSError):
                stack.enter_context(locked(self.folder / "locks" / f"{number:02}"))
            yield

    def read(self, key: dict[str, Any], device: torch.device | str = "cpu") -> Entry | None:
        """Return an entry, or None where there is none; a damaged one is removed.

        Warns:
            CacheWarning: the entry was damaged.
        """
        path = self.path(key)
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["facts"])
                sums = json.loads(file.metadata()["checksums"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
            is_sound = sums == {name: _checksum(x) for name, x in tensors.items()}
        except FileNotFoundError:
            return None
        except (SafetensorError, KeyError, TypeError, ValueError, OSError):
            is_sound = False
        if not is_sound:
            warnings.warn(f"{path} is damaged; its video is encoded again", CacheWarning, stacklevel=2)
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            path.touch()  # used last
        return Entry({name: x.to(device) for name, x in tensors.items()}, facts)

    def write(self, key: dict[str, Any], entry: Entry) -> None:
        """Keep an entry, and let go of others where they become too many.

        Warns:
            CacheWarning: it cannot be kept, because it is larger than the whole cache may be, the disk is full or the
                folder is only to be read.
        """
        size = sum(x.numel() * x.element_size() for x in entry.tensors.values())
        if size > self.max_bytes:
            text = f"{size / 1e9:.2f} GB of features exceed the whole cache ({self.max_bytes / 1e9:.2f} GB)"
            warnings.warn(f"{text}, so they are not kept; raise max_bytes", CacheWarning, stacklevel=2)
            return
        tensors = {name: x.detach().cpu().contiguous() for name, x in entry.tensors.items()}
        sums = {name: _checksum(x) for name, x in tensors.items()}
        path = self.path(key)
        metadata = {"facts": json.dumps(entry.facts), "checksums": json.dumps(sums), "key": json.dumps(key)}
        try:
            with writing(path) as part:
                save_file(tensors, part, metadata=metadata)
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            warnings.warn(f"{path} cannot be written, so features are not kept: {reason}", CacheWarning, stacklevel=2)
            return
        with suppress(OSError):  # another process lets go of what this one may not
            self._trim(path)

    def _trim(self, newest: Path) -> None:
        with locked(self.folder / "locks" / "trim"):
            for pattern in (f"*{PART}", ".tmp*"):  # of killed processes
                for path in self.folder.glob(pattern):
                    with suppress(FileNotFoundError):
                        if time.time() - path.stat().st_mtime > LEFT_S:
                            path.unlink()
            found = []
            for path in self.folder.glob("*.safetensors"):
                try:
                    status = path.stat()
                except FileNotFoundError:  # damaged, and removed by another process
                    continue
                found.append((path == newest, status.st_mtime_ns, status.st_size, path))
            excess = sum(size for _, _, size, _ in found) - self.max_bytes
            for is_newest, _, size, path in sorted(found):
                # Headers may lift the only entry over the limit that its tensors stay below.
                if excess <= 0 or is_newest:
                    return
                path.unlink(missing_ok=True)
                excess -= size


def content_digest(source: Any) -> str | None:
    """Return a digest of a file's or of given bytes; None for all else, which is not cached."""
    if isinstance(source, bytes):
        return hashlib.blake2b(source, digest_size=20).hexdigest()
    if not isinstance(source, str | os.PathLike) or not Path(source).is_file():
        return None
    with Path(source).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).hexdigest()


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def _checksum(x: Tensor) -> int:
    return zlib.crc32(x.contiguous().reshape(-1).view(torch.uint8).numpy().data)
