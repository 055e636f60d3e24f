"""Reads a published data set, writes the records that training reads, and tells what became of all others."""

from __future__ import annotations

import fnmatch
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from ...files import write_json, writing
from ..records import parse_record
from .clean import clean
from .layout import REPORT, Draft, Layout, LeftOut, Media, parsed

MAX_EXAMPLES = 5
"""Of every kind that a report shows."""
MAX_KNOWN = 2**17
"""Files whose place is remembered; records of one video mostly follow each other."""
MISSING = "a video or image is not there"


@dataclass
class Tally:
    """How often something happened, and where first.

    Attributes:
        count: how often.
        examples: the first few places, with what was there.
    """

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, example: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(example)


@dataclass
class Report:
    """What became of a data set.

    Attributes:
        name: of the layout.
        src: the folder as downloaded.
        dst: the file that was written.
        media: folder that media paths of the written records start from: `root` of a mixture.
        is_checked: whether videos and images were looked up.
        files: what was read, with the number of records in it.
        not_read: files of the layout that were not asked for.
        read: records that were read.
        written: records that were written.
        turns: answered turns of these: samples.
        left_out: records that were left out, by reason.
        turns_left_out: turns of written records that were left out, by reason.
        changed: written records that are not as they were, by what was done to them.
        missing: different videos and images that are not there.
        repeated: written records that say what an earlier one said.
    """

    name: str
    src: str
    dst: str
    media: str
    is_checked: bool
    files: dict[str, int] = field(default_factory=dict)
    not_read: list[str] = field(default_factory=list)
    read: int = 0
    written: int = 0
    turns: int = 0
    left_out: dict[str, Tally] = field(default_factory=dict)
    turns_left_out: dict[str, Tally] = field(default_factory=dict)
    changed: dict[str, Tally] = field(default_factory=dict)
    missing: Tally = field(default_factory=Tally)
    repeated: int = 0

    @property
    def path(self) -> Path:
        """File that the report is written to, beside the records."""
        return Path(self.dst).with_suffix(REPORT)


def convert(
    layout: type[Layout],
    src: Path,
    dst: Path,
    *,
    media: Path | None = None,
    check_media: bool = True,
    only: Sequence[str] = (),
    limit: int | None = None,
) -> Report:
    """Write the records of a data set to a JSONL file, and a report beside it. The same input makes the same files.

    A record is held in memory at a time, whatever the size of the files. Both files come to be only once all is done.

    Args:
        layout: how the data set is published.
        src: the folder as downloaded, or one file of it.
        dst: the file to write.
        media: folder of videos and images; None: `src`.
        check_media: look up every video and image, and leave out records of those that are not there.
        only: glob patterns of the files to read, from `src`; none: those that the layout reads by itself.
        limit: records to read at most.

    Raises:
        ValueError: `src` is no such data set, a file is not JSON, or nothing of it can be used.
    """
    if dst.suffix.lower() != ".jsonl":
        raise ValueError(f"{dst} must end with .jsonl: a record a line")
    if not src.exists():
        raise ValueError(f"there is no {src}; give the folder of {layout.title} as downloaded")
    home = src if src.is_dir() else src.parent
    reader = layout(home)
    files, others = choose_files(reader, src, only)
    if dst.resolve() in {file.resolve() for file in files}:
        raise ValueError(f"{dst} is what is read; write to another file")
    root = home if media is None else media
    if check_media and not root.is_dir():
        raise ValueError(f"there is no folder {root} with videos and images; name it with --media")
    report = Report(layout.name, str(src), str(dst), str(root), check_media, not_read=others)
    dst.parent.mkdir(parents=True, exist_ok=True)
    digests = array("q")
    with writing(dst) as part:
        with part.open("wb") as out:
            for line in convert_rows(reader, files, root, report, limit):
                out.write(line)
                digests.append(hash(line))
        if not report.written:
            raise ValueError(nothing_left(report))
        report.repeated = len(digests) - len(np.unique(np.asarray(digests)))
    write_json(report.path, asdict(report))
    return report


def choose_files(layout: Layout, src: Path, only: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Return the files to read, and the names of those that are not.

    Raises:
        ValueError: there are none.
    """
    if src.is_file():
        if only:
            raise ValueError(f"{src} is one file; a choice of files is for folders")
        return [src], []
    known = layout.files()
    names = {file: file.relative_to(layout.src).as_posix() for file in known}
    if not known:
        raise ValueError(f"{src} holds no {layout.title}: expected {' or '.join(layout.patterns)} in it")
    if not only:
        chosen = list(layout.default(known))
    else:
        chosen = [file for file in known if any(fnmatch.fnmatchcase(names[file], pattern) for pattern in only)]
        if not chosen:
            some = ", ".join(list(names.values())[:10])
            raise ValueError(f"no file of {src} is called {' or '.join(only)}; there are {some}")
    return chosen, [names[file] for file in known if file not in chosen]


def convert_rows(
    layout: Layout, files: Sequence[Path], root: Path, report: Report, limit: int | None
) -> Iterator[bytes]:
    """Yield every record that can be used, as a line, and keep count of all in `report`."""

    @lru_cache(MAX_KNOWN)
    def place_of(media: Media) -> str | None:
        if not report.is_checked:
            return media.places[0]
        return next((place for place in media.places if (root / place).exists()), None)

    def find(media: Media) -> str:
        place = place_of(media)
        if place is None:
            if (key := hash(media.places)) not in missing:
                missing.add(key)
                report.missing.add(media.places[0])
            raise LeftOut(MISSING, media.places[0])
        return place

    missing: set[int] = set()
    with tqdm(desc=f"converting {layout.name}", unit="record", delay=2) as bar:
        for file in files:
            name = file.relative_to(layout.src).as_posix()
            folder = "." if file == layout.src else file.parent.relative_to(layout.src).as_posix()
            report.files[name] = 0
            for place, row in layout.rows(file):
                if limit is not None and report.read == limit:
                    return
                report.read += 1
                report.files[name] += 1
                bar.update()
                where = f"{name}, {place}"
                try:
                    line = convert_row(layout.draft(parsed(row), folder), find, root, where, report)
                except LeftOut as error:
                    report.left_out.setdefault(error.reason, Tally()).add(
                        ": ".join(filter(None, (where, error.detail)))
                    )
                    continue
                report.written += 1
                yield line


def convert_row(draft: Draft, find: Callable[[Media], str], root: Path, where: str, report: Report) -> bytes:
    """Return the line of a record, and count what was done to it.

    Raises:
        LeftOut: nothing of it can be used.
    """
    record, found = clean(draft, find)
    # What training does with it, so that every written record can be read.
    try:
        samples = parse_record(record, root, where)
    except ValueError as error:
        raise LeftOut("hicom cannot read it", str(error)) from error
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    report.turns += len(samples)
    for reason in found.dropped:
        report.turns_left_out.setdefault(reason, Tally()).add(where)
    for change in dict.fromkeys(found.changes):
        report.changed.setdefault(change, Tally()).add(where)
    return line


def nothing_left(report: Report) -> str:
    """Return what to say where no record is left."""
    most = max(report.left_out, key=lambda reason: report.left_out[reason].count, default="")
    if not most:
        return f"{report.src} holds no record"
    first = report.left_out[most].examples[0]
    hint = f"; they are looked for in {report.media}: name another folder with --media, or take them as they are with "
    hint = f"{hint}--no-media-check" if most == MISSING else ""
    return f"none of {report.read:,} records of {report.src} can be used; most often: {most} (first {first}){hint}"
