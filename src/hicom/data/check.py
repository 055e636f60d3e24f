"""Does training data hold what it says? Records are parsed and media decoded before a long run finds out."""

from __future__ import annotations

import json
import random
import re
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm

from ..files import write_json, write_text
from ..processes import Workers
from ..video import VideoError, read_frames, split_bounds
from .mixture import Selection
from .records import FileRecords

MISSING = "there is no such file"
CRASHED = "decoding it ended the process that did"
T = TypeVar("T")


@dataclass(frozen=True)
class Media:
    """A file that samples show.

    Attributes:
        path: the file.
        kind: `video` or `image`.
        num_samples: samples that show it.
        source: a record that names it.
        problem: why it cannot be read; empty where it can.
        damage: what is missing of one that can be read.
    """

    path: str
    kind: str
    num_samples: int
    source: str
    problem: str = ""
    damage: str = ""


@dataclass
class Report:
    """What was found.

    Attributes:
        sources: name, chosen records and samples, and the bad records of every source.
        num_media: different files that the samples name.
        num_checked: files of these that were opened.
        bad: files that cannot be read.
        damaged: files of which a part can be read.
    """

    sources: list[dict[str, Any]] = field(default_factory=list)
    num_media: int = 0
    num_checked: int = 0
    bad: list[Media] = field(default_factory=list)
    damaged: list[Media] = field(default_factory=list)

    @property
    def num_bad_records(self) -> int:
        """Records that were left out, of all sources."""
        return sum(len(source["bad_records"]) for source in self.sources)

    @property
    def kinds_of_bad_records(self) -> Counter[str]:
        """How many records have which fault, whatever they say: names, numbers and what they hold are left out."""
        messages = (
            bad["message"].removeprefix(f"{source['name']}, ").partition(": ")[2]
            for source in self.sources
            for bad in source["bad_records"]
        )
        return Counter(re.sub(r"\d+", "N", message.partition(", got ")[0]) for message in messages)

    @property
    def is_good(self) -> bool:
        """Whether all records and checked files can be used."""
        return not self.bad and not self.num_bad_records

    def write(self, path: Path) -> None:
        """Write everything as JSON."""
        write_json(path, asdict(self))

    def write_skip_list(self, path: Path) -> None:
        """Write what training should leave out, for `hicom.data.mixture.read_skip_list`."""
        lines: list[dict[str, Any]] = []
        for source in self.sources:
            for bad in source["bad_records"]:
                if source["file"] is None:
                    place = {"dataset": source["name"], "row": bad["number"]}
                else:
                    place = {"file": str(Path(source["file"]).resolve()), "line": bad["number"]}
                lines.append(place | {"reason": bad["message"]})
        lines += [{"media": str(Path(bad.path).resolve()), "reason": bad.problem} for bad in self.bad]
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def check_data(
    sources: Sequence[Selection],
    *,
    num_media: int | None = None,
    num_frames: int | None = 32,
    num_workers: int = 2,
    seed: int = 0,
) -> Report:
    """Open the media of samples, and tell of bad records.

    Args:
        sources: of `read_sources(..., on_bad="skip")`.
        num_media: files that are drawn and opened; None: all.
        num_frames: frames that are decoded of a video, spread evenly, as in training; None: all of them.
        num_workers: processes that decode.
        seed: of what is drawn.
    """
    report = Report()
    found: dict[tuple[str, str], tuple[int, str]] = {}
    for source in sources:
        records = source.records
        report.sources.append(
            {
                "name": records.name,
                "file": str(records.path) if isinstance(records, FileRecords) else None,
                "records": len({records.numbers[index] for index in source.indices}),
                "samples": len(source),
                "bad_records": [asdict(error) for error in records.errors],
            }
        )
        for sample in tqdm(source, unit="sample", desc="listing media", delay=2):
            for kind, files in (("video", sample.videos), ("image", sample.images)):
                for file in files:
                    count, first = found.get((str(file), kind), (0, sample.source))
                    found[str(file), kind] = count + 1, first
    media = [Media(path, kind, count, first) for (path, kind), (count, first) in found.items()]
    report.num_media = len(media)
    if num_media is not None and num_media < len(media):
        places = sorted(random.Random(seed).sample(range(len(media)), num_media))
        media = [media[place] for place in places]
    report.num_checked = len(media)
    results = {}
    tasks = [(each.path, each.kind, num_frames) for each in media]
    with tqdm(total=len(media), unit="file", desc="decoding", delay=2) as bar:
        for number, result in run_apart(tasks, num_workers, try_media, (CRASHED, "")):
            results[number] = result
            bar.update()
    for number, each in enumerate(media):
        problem, damage = results[number]
        if problem or damage:
            where = report.bad if problem else report.damaged
            where.append(Media(each.path, each.kind, each.num_samples, each.source, problem, damage))
    return report


def try_media(path: str, kind: str, num_frames: int | None) -> tuple[str, str]:
    """Return why a file cannot be read, and what is missing where it can; both may be empty."""
    if not Path(split_bounds(path)[0]).exists():
        return MISSING, ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            count = 1 if kind == "image" else num_frames
            info = read_frames(path, num_frames=2**31 if count is None else count).info
    except (VideoError, OSError) as error:
        return " ".join(str(error).split()), ""
    return "", info.damage


def run_apart(
    tasks: Sequence[tuple[Any, ...]], num_workers: int, work: Callable[..., T], crashed: T
) -> Iterator[tuple[int, T]]:
    """Yield the number and the result of every task, in any order, done in other processes.

    A file that takes its process down with it costs nothing but itself: what was at work is tried again, one by one.

    Args:
        tasks: arguments of `work`.
        num_workers: processes.
        work: what is done; a function that can be imported.
        crashed: the result of a task that took its process down.
    """
    waiting, suspects = deque(range(len(tasks))), deque[int]()
    while waiting or suspects:
        if suspects:
            # One task at a time: whichever breaks is to blame.
            broken = yield from run_until_broken(work, tasks, suspects, 1, 1)
            yield from ((number, crashed) for number in broken)
        else:
            suspects.extend((yield from run_until_broken(work, tasks, waiting, num_workers, 4 * num_workers)))


def run_until_broken(
    work: Callable[..., T], tasks: Sequence[tuple[Any, ...]], numbers: deque[int], num_workers: int, most: int
) -> Generator[tuple[int, T], None, list[int]]:
    """Take numbers of tasks, yield their results, and return those that were at work when a process died.

    Args:
        work: what is done.
        tasks: all tasks.
        numbers: what is to be done.
        num_workers: processes.
        most: tasks that are given to them at a time.
    """
    running: dict[Future[T], int] = {}
    with Workers(num_workers) as pool:
        try:
            while numbers or running:
                while numbers and len(running) < most:
                    # Asked for before it is taken: a broken pool takes nothing.
                    running[pool.submit(work, *tasks[numbers[0]])] = numbers[0]
                    numbers.popleft()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    yield running.pop(future), result
        except BrokenProcessPool:
            return sorted(running.values())
    return []
