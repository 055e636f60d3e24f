"""Records of one's own as a benchmark: what was held out of training, in the layout that training reads.

Every answered turn is a sample. The model reads the turn as it is written, after the turns before it, with the record's
own answers in them. A turn with options is scored by the option chosen, where the record's answer names one; any other
turn is an open question, whose answer is compared with the record's word by word and, on request, by a judge.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.mixture import Selection, read_sources
from ..data.records import PLACEHOLDERS, FileRecords
from ..data.records import Sample as RecordSample
from ..model.instruction import answer_options, extract_instruction
from ..video import split_bounds
from .answers import chosen_option
from .benchmarks import TASKS
from .benchmarks.activitynet_qa import requests
from .samples import MAX_PROBLEMS, BenchmarkError, Found, Sample, Task

IDS = ("id", "question_id")
"""Fields of a record that may name it."""
CATEGORIES = ("category", "type", "family")
"""Fields of a record that scores may be split by; the first one with a text counts."""
TAKEN = ("lock", "results.md")
"""Names of files in a folder of results."""
MAX_NEW_TOKENS = 256
"""Longest open answer."""
_PLACEHOLDER = re.compile(r"(?<!\s)\s*(?:{0})\s*\Z|(?:{0})\s*".format("|".join(PLACEHOLDERS.values())))


@dataclass(frozen=True)
class Held:
    """Samples that are read already, as `Task.read`; a class, because tasks travel to other processes."""

    samples: tuple[Sample, ...]
    bad: tuple[str, ...] = ()

    def __call__(self, _: Path) -> Found[Sample]:
        """Return the samples, and the bad records."""
        return Found(list(self.samples), list(self.bad))


@dataclass(frozen=True)
class Turn:
    """An answered turn of a record, and where it stands.

    Attributes:
        sample: the turn, with those before it.
        root: folder that its media paths start from.
        place: of its record, unique in the file or mixture.
        number: among the answered turns of its record, from 1.
        is_alone: the record has no other answered turn.
    """

    sample: RecordSample
    root: Path
    place: str
    number: int
    is_alone: bool

    def named(self, record: object) -> str:
        """Return the name of the turn, from that of its record."""
        return str(record) if self.is_alone else f"{record}-{self.number}"


def record_tasks(path: str | Path, root: str | Path | None = None) -> list[Task]:
    """Return the benchmarks that a file of records, or a mixture of them, is: one, or two.

    Those with options are the task `STEM` (the file's name without suffix), open questions `STEM_open`; a file that has
    open questions alone is `STEM`, too. Of a mixture every chosen sample counts once, whatever its weight.

    Args:
        path: `.json` or `.jsonl` file of records, or `.yaml` mixture.
        root: folder that media paths start from; None: the file's own. A mixture has its own.

    Raises:
        ValueError: see `hicom.data.mixture.read_sources`.
        BenchmarkError: no turn can be asked: each shows anything but one video, or asks nothing.
    """
    path = Path(path)
    found = read_samples(path, root)
    bad = tuple(found.bad)
    choices = tuple(sample for sample in found.items if sample.options)
    open_ones = tuple(sample for sample in found.items if not sample.options)
    is_both = bool(choices and open_ones)
    tasks = []
    if choices:
        tasks.append(
            Task(
                name=path.stem,
                title=f"{path.stem}, options" if is_both else path.stem,
                files=str(path),
                read=Held(choices, bad),
                prompt=prompt,
                groups=group_names(choices),
            )
        )
    if open_ones:
        tasks.append(
            Task(
                name=f"{path.stem}_open" if is_both else path.stem,
                title=f"{path.stem}, open questions" if is_both else path.stem,
                files=str(path),
                read=Held(open_ones, () if choices else bad),
                prompt=prompt,
                max_new_tokens=MAX_NEW_TOKENS,
                groups=group_names(open_ones),
                judge=requests,
                text_scores=True,
                aspects=("accuracy",),
            )
        )
    return tasks


def read_all_records(paths: Sequence[str | Path], root: str | Path | None = None) -> list[Task]:
    """Return the benchmarks of several files, each of which has a folder of results by its name.

    Raises:
        ValueError: two have the same name, or one that is taken; or what `record_tasks` raises.
    """
    files = {name: "a task of hicom eval" for name in TASKS} | {name: "a file of results" for name in TAKEN}
    tasks = []
    for path in map(Path, paths):
        for task in record_tasks(path, root):
            if task.name in files:
                raise BenchmarkError(
                    f"{path}: its results would be called {task.name!r}, as is {files[task.name]}; rename the file"
                )
            files[task.name] = f"that of {path}"
            tasks.append(task)
    return tasks


def prompt(sample: Sample, _: Sequence[str]) -> str:
    """Return what the model reads after the video: the turn as it is written."""
    return sample.text


def group_names(samples: Sequence[Sample]) -> tuple[str, ...]:
    """Return the names of the groups that some of the samples are in."""
    return tuple(dict.fromkeys(name for sample in samples for name in sample.groups))


def read_samples(path: Path, root: str | Path | None = None) -> Found[Sample]:
    """Return a sample for every answered turn of a file of records or a mixture. Arguments as in `record_tasks`."""
    sources = read_sources([path], root, on_bad="skip")
    turns = [
        turn
        for number, source in enumerate(sources, 1)
        for turn in turns_of(source, f"{number}:" if len(sources) > 1 else "")
    ]
    roots = list(dict.fromkeys(turn.root for turn in turns))
    found: Found[Sample] = Found([], [error.message for source in sources for error in source.records.errors])
    for turn, name in zip(turns, sample_ids(turns), strict=True):
        try:
            # The same path below another root is another video.
            place = f"{roots.index(turn.root) + 1}:" if len(roots) > 1 else ""
            found.items.append(convert(turn, name, place))
        except ValueError as error:
            where = turn.sample.source if turn.is_alone else f"{turn.sample.source}, answer {turn.number}"
            found.bad.append(f"{where}: {error}")
    if not found.items:
        named = "".join(f"\n  {line}" for line in found.bad[:MAX_PROBLEMS])
        more = f"\n  ... and {len(found.bad) - MAX_PROBLEMS} more" if len(found.bad) > MAX_PROBLEMS else ""
        raise BenchmarkError(
            f"{path}: none of {len(turns)} answered turns can be asked:{named}{more};\n"
            f"each must ask something about one video and no image"
        )
    return found


def turns_of(source: Selection, prefix: str) -> Iterator[Turn]:
    """Yield every answered turn of a source once; `prefix` tells places in it from those in others."""
    records = source.records
    numbers: Sequence[int] = range(records.num_records)
    if isinstance(records, FileRecords) and len(set(records.lines)) == records.num_records:
        numbers = records.lines
    count = Counter(records.numbers)
    first: dict[int, int] = {}
    for index, record in enumerate(records.numbers):
        first.setdefault(record, index)
    for index in dict.fromkeys(source.indices):
        record = records.numbers[index]
        place = f"{prefix}{numbers[record]}"
        yield Turn(records[index], records.root, place, index - first[record] + 1, count[record] == 1)


def sample_ids(turns: Sequence[Turn]) -> list[str]:
    """Return what turns are called: by a field of their records that all have and that tells all apart, else by place.

    Turns of a record that has several end with their number.
    """
    for field in IDS:
        values = [turn.sample.metadata.get(field) for turn in turns]
        names = [turn.named(value) for turn, value in zip(turns, values, strict=True) if _is_name(value)]
        if len(set(names)) == len(turns):
            return names
    return [turn.named(turn.place) for turn in turns]


def _is_name(value: Any) -> bool:
    return (isinstance(value, str) and bool(value.strip())) or (isinstance(value, int) and not isinstance(value, bool))


def convert(turn: Turn, name: str, place: str = "") -> Sample:
    """Return the sample of a turn.

    Args:
        turn: the turn.
        name: the sample's id.
        place: what stands before the video's path in its id.

    Raises:
        ValueError: the turn shows anything but one video, or asks nothing.
    """
    sample = turn.sample
    if len(sample.videos) != 1 or sample.images:
        raise ValueError(f"shows {len(sample.videos)} videos and {len(sample.images)} images")
    (video,) = sample.videos
    file, bounds = split_bounds(video)
    *before, question = ({"role": m["role"], "content": without_placeholders(m["content"])} for m in sample.messages)
    if not question["content"].strip():
        raise ValueError("asks nothing")
    options = answer_options(question["content"])
    chosen = chosen_option(sample.answer, options) if options else None
    return Sample(
        id=name,
        video=file,
        video_id=place + str(file.relative_to(turn.root) if file.is_relative_to(turn.root) else file),
        question=extract_instruction(question["content"]),
        options=() if chosen is None else options,
        answer=sample.answer if chosen is None else chosen,
        groups=groups_of(sample.metadata),
        text=question["content"],
        history=tuple(before),
        start_s=bounds.get("start_s"),
        end_s=bounds.get("end_s"),
    )


def without_placeholders(text: str) -> str:
    """Return a turn without placeholders of media, and without the blanks that keep them apart from the text."""
    return _PLACEHOLDER.sub("", text)


def groups_of(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the category that a record says it is in, if any."""
    texts = (metadata.get(field) for field in CATEGORIES)
    found = next((" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()), None)
    return {} if found is None else {"category": found}
