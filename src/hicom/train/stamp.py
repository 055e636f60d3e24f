"""What a run folder says of its run, and what may change in a run that goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..data.mixture import SkipList, read_skip_list
from ..files import write_text
from ..provenance import git_commit, hardware
from .config import TrainConfig

COMPLETE = "complete"
"""Empty file that a checkpoint gets last: without it the write was interrupted."""
PACKAGES = ("accelerate", "av", "hicom", "numpy", "peft", "torch", "transformers")
MAY_CHANGE = ("data.on_bad_video", "data.skip_list")
"""What a run that goes on may have otherwise: neither changes the order of samples or the number of steps."""
SKIP_LISTS = "skip_lists"
"""Folder of a run with copies of the lists of what it leaves out."""


def is_main() -> bool:
    """Whether this process writes the files of the run."""
    return int(os.environ.get("RANK", "0")) == 0


def num_processes() -> int:
    """Return how many processes train together (torchrun sets it)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(whole, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """Return the steps that were taken before a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def steps_done(out: Path) -> int:
    """Return the steps that a run goes on from."""
    checkpoint = last_checkpoint(out / "checkpoints")
    return 0 if checkpoint is None else step_of(checkpoint)


def is_finished(out: Path) -> bool:
    """Whether a run folder is of a run that has come to its end."""
    path = out / "run.json"
    return path.is_file() and json.loads(path.read_text("utf-8"))["status"] == "finished"


def open_stamp(out: Path, config: TrainConfig) -> dict[str, Any]:
    """Return the run's `run.json`, made now or by the interrupted run that goes on.

    Raises:
        ValueError: the folder is of another configuration.
    """
    configuration = json.loads(json.dumps(dataclasses.asdict(config)))
    path = out / "run.json"
    if path.exists():
        stamp: dict[str, Any] = json.loads(path.read_text("utf-8"))
        go_on(stamp, configuration, out)
        return stamp
    return {
        "configuration": configuration,
        "status": "running",
        "command": sys.argv,
        "seed": config.seed,
        "commit": git_commit(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "hardware": hardware() | {"processes": num_processes()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "wall_s": 0.0,
        "changes": [],
        "skip_lists": [],
    }


def go_on(stamp: dict[str, Any], configuration: dict[str, Any], out: Path) -> None:
    """Take what may have changed into the stamp of a run.

    Raises:
        ValueError: something else has changed.
    """
    # A run may be moved, and go on from where it lies.
    old, new = (flat({**each, "out": None}) for each in (stamp["configuration"], configuration))
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    is_finished = stamp["status"] == "finished"
    may_change = () if is_finished else tuple(name for name in MAY_CHANGE if new.get(name) is not None)
    refused = [name for name in changed if name not in may_change]
    if refused:
        were = ", ".join(f"{name}={old.get(name)!r}" for name in refused)
        raise ValueError(
            f"{out} holds a run of another configuration ({', '.join(refused)} differ); it has {were:.300}; choose "
            "another out, or remove the folder"
        )
    before = stamp["hardware"]["processes"]
    if not is_finished and before != num_processes():
        raise ValueError(
            f"the run in {out} was started with {before} processes and cannot go on exactly with "
            f"{num_processes()}, which would take other batches; start as many, or choose another out"
        )
    if changed:
        change = {name: [old.get(name), new[name]] for name in changed}
        stamp.setdefault("changes", []).append({"step": steps_done(out)} | change)
        stamp["configuration"] = configuration
    stamp.pop("stopped", None)


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return what is set in a configuration by its whole name: an older `run.json` lacks switches that came later."""
    found: dict[str, Any] = {}
    for name, each in value.items():
        if isinstance(each, Mapping):
            found |= flat(each, f"{prefix}{name}.") or {prefix + name: {}}
        elif each is not None and each is not False:
            found[prefix + name] = each
    return found


def write_stamp(out: Path, stamp: dict[str, Any]) -> None:
    """Write `run.json` as a whole or not at all."""
    if is_main():
        write_text(out / "run.json", json.dumps(stamp, indent=1) + "\n")


@dataclasses.dataclass(frozen=True)
class Skips:
    """What a run leaves out.

    Attributes:
        start: named before its first step: these samples take no part in the order of the others.
        later: named since: these keep their places, and are left out of the batches in which they would come.
    """

    start: SkipList = dataclasses.field(default_factory=SkipList)
    later: SkipList = dataclasses.field(default_factory=SkipList)


def take_skips(out: Path, config: TrainConfig, stamp: dict[str, Any]) -> Skips:
    """Return what a run leaves out by all lists that it was ever given, and note a new one in its stamp.

    A list is copied into the run folder: what the user makes of the file afterwards changes nothing in silence.

    Raises:
        ValueError: a list is missing or malformed.
    """
    path = config.data.skip_list
    if "skip_lists" not in stamp:  # of a version that had no more than one list, which came before the first step
        stamp["skip_lists"], step = [], 0
    else:
        step = steps_done(out)
    entries: list[dict[str, Any]] = stamp["skip_lists"]
    lists = [(entry["step"], read_skip_list(out / entry["copy"])) for entry in entries]
    if path is not None:
        given = read_skip_list(path)
        if not is_within(given, [known for _, known in lists]):
            copy = f"{SKIP_LISTS}/{len(entries) + 1}.jsonl"
            if is_main():
                write_skip_list(given, out / copy)
            entries.append({"step": step, "list": path, "copy": copy})
            lists.append((step, given))
    start, later = (union([known for at, known in lists if (at == 0) == is_start]) for is_start in (True, False))
    return Skips(start, later)


def union(lists: list[SkipList]) -> SkipList:
    """Return all that lists name."""
    lines = frozenset(line for each in lists for line in each.lines)
    return SkipList(lines, frozenset(file for each in lists for file in each.media))


def is_within(given: SkipList, lists: list[SkipList]) -> bool:
    """Whether lists name all that another one does."""
    known = union(lists)
    return given.lines <= known.lines and given.media <= known.media


def write_skip_list(skip: SkipList, path: Path) -> None:
    """Write a list that `read_skip_list` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in skip.entries()))
