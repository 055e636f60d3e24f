"""What benchmarks are made of: samples, tasks, and the reading of official files."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from ..files import parse_json

T = TypeVar("T")

VIDEO_SUFFIXES = (".mp4", ".webm", ".avi", ".mov", ".mkv", ".mpg", ".mpeg", ".gif")
MAX_PROBLEMS = 10
"""Of bad records that an error lists."""


class BenchmarkError(ValueError):
    """Files of a benchmark are missing or are not in the official layout."""


@dataclass(frozen=True)
class Sample:
    """A question about a video.

    Attributes:
        id: of the sample, unique in its task.
        video: the file, or the folder of frames.
        video_id: samples that share it are not independent: intervals are clustered by it.
        question: the bare question, which steers the compressor.
        options: texts of the options, without letters; empty for open questions.
        answer: the right option's index, the right answer of an open question, or None where it is not public.
        start_s: first second that counts; None: the start.
        end_s: last second that counts; None: the end.
        source_fps: frames a second of a folder of frames.
        groups: what scores are split by, for example `{"duration": "short"}`.
        subtitles: file of subtitles; None where there are none.
        text: what the model reads after the video, where the sample brings it along; empty: the task writes a prompt.
        history: turns before the question, as `{"role", "content"}`.
    """

    id: str
    video: Path
    video_id: str
    question: str
    options: tuple[str, ...] = ()
    answer: int | str | None = None
    start_s: float | None = None
    end_s: float | None = None
    source_fps: float | None = None
    groups: Mapping[str, str] = field(default_factory=dict)
    subtitles: Path | None = None
    text: str = ""
    history: tuple[Mapping[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise ValueError("the question is empty")
        if len(self.options) == 1 or len(self.options) > 26:
            raise ValueError(f"{len(self.options)} options")
        if isinstance(self.answer, int) and not 0 <= self.answer < len(self.options):
            raise ValueError(f"the answer is option {self.answer} of {len(self.options)}, counted from 0")


@dataclass(frozen=True)
class Found(Generic[T]):
    """What files hold: what could be read, and what could not.

    Attributes:
        items: what was read.
        bad: a line for each record that was left out: file, record and reason.
    """

    items: list[T] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    def __add__(self, other: Self) -> Found[T]:
        return Found(self.items + other.items, self.bad + other.bad)


@dataclass(frozen=True)
class JudgeRequest:
    """What a judge is asked.

    Attributes:
        id: of the request, unique in its task and aspect.
        aspect: what is judged.
        video_id: as of the samples.
        fields: what goes into the aspect's prompt: `question`, `answer` (the right one) and `prediction`, and for
            consistency the second of both.
    """

    id: str
    aspect: str
    video_id: str
    fields: Mapping[str, str]


@dataclass(frozen=True)
class Task:
    """A benchmark: how its files are read, what the model is asked, how answers are scored.

    Attributes:
        name: as lmms-eval calls it, where it has it.
        title: for tables.
        files: what the data root must hold.
        read: returns all samples from the data root, and what is wrong with other records.
        prompt: returns what the model reads after the video, from a sample and lines of subtitles.
        max_new_tokens: longest answer.
        groups: names of `Sample.groups` that results are split by, in order.
        macro: group over whose values the score is an unweighted mean; empty: over samples.
        judge: returns what the judge is asked, from samples and responses by id; None: options are compared.
        text_scores: open answers are also compared with the right ones word by word, so that a judge is optional.
        aspects: what the judge says of each request, in order.
        submission: writes the file that a server scores, from the option chosen by sample id; None: scored here.
    """

    name: str
    title: str
    files: str
    read: Callable[[Path], Found[Sample]]
    prompt: Callable[[Sample, Sequence[str]], str]
    max_new_tokens: int = 16
    groups: tuple[str, ...] = ()
    macro: str = ""
    judge: Callable[[Sequence[Sample], Mapping[str, str]], Iterable[JudgeRequest]] | None = None
    text_scores: bool = False
    aspects: tuple[str, ...] = ()
    submission: Callable[[Path, Mapping[str, int | None]], Path] | None = None

    def samples(self, root: Path) -> Found[Sample]:
        """Return all samples, and the records that are bad.

        Raises:
            BenchmarkError: a file is missing or in another layout, or there is no sample.
        """
        found = self.read(root)
        first: dict[str, int] = {}
        bad = list(found.bad)
        for number, sample in enumerate(found.items):
            if first.setdefault(sample.id, number) != number:
                bad.append(
                    f"{self.name}: sample {number + 1} has the id {sample.id!r} of sample {first[sample.id] + 1}"
                )
        if not first:
            raise BenchmarkError(f"{self.name}: no samples in {root}; it needs {self.files}")
        return Found([found.items[number] for number in first.values()], bad)


def letter(index: int) -> str:
    """Return A for 0, B for 1 and so on."""
    return chr(ord("A") + index)


def lettered(options: Sequence[str], form: str = "({}) {}") -> str:
    """Return one line an option, each after its letter."""
    return "\n".join(form.format(letter(index), option) for index, option in enumerate(options))


class Record(dict[str, Any]):
    """A record of a file; a key that it lacks is told along with those that it has."""

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"no {key!r}; it has {', '.join(self) or 'nothing'}")

    def text(self, key: str) -> str:
        """Return a string or number as a string."""
        value = self[key]
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise ValueError(f"{key!r} is {value!r}, not text")
        return str(value)

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of strings."""
        value = self[key]
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise ValueError(f"{key!r} is {value!r}, not a list")
        return tuple(map(str, value))

    def index(self, key: str) -> int:
        """Return a whole number."""
        value = self.number(key)
        if not value.is_integer():
            raise ValueError(f"{key!r} is {self[key]!r}, not a whole number")
        return int(value)

    def number(self, key: str) -> float:
        """Return a number."""
        value = self[key]
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{key!r} is {value!r}, not a number") from None


def answer_index(options: Sequence[str], answer: str) -> int:
    """Return which option an answer is, given by its text.

    Raises:
        ValueError: it is none of them, or more than one.
    """
    found = [index for index, option in enumerate(options) if option == answer]
    if len(found) != 1:
        raise ValueError(f"the answer {answer!r} is {len(found)} of the options {list(options)}")
    return found[0]


def read_rows(path: Path) -> Iterator[Any]:
    """Yield the records of a .json (a list), .jsonl, .csv or .parquet file; a line that is no JSON as its ValueError.

    Raises:
        BenchmarkError: there is no such file, or it cannot be read.
        ImportError: .parquet needs pyarrow.
    """
    if not path.is_file():
        raise BenchmarkError(f"{path}: no such file; --data-root is the folder that holds the benchmarks' own folders")
    try:
        if path.suffix == ".parquet":
            yield from _parquet_rows(path)
            return
        text = path.read_text("utf-8-sig")
        if path.suffix == ".csv":
            yield from csv.DictReader(text.splitlines())
            return
        rows = map(_json_line, filter(str.strip, text.splitlines())) if path.suffix == ".jsonl" else parse_json(text)
        if not isinstance(rows, list | map):
            raise ValueError("not a list of records")
    except (ValueError, OSError) as error:
        raise BenchmarkError(f"{path}: cannot be read: {error}") from error
    yield from rows


def _json_line(line: str) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        return error


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        for batch in ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise ValueError(str(error)) from error


def convert_records(path: Path, convert: Callable[[Record, int], T]) -> Found[T]:
    """Return `convert(record, number)` of all records of a file; those for which it raises ValueError are bad.

    Raises:
        BenchmarkError: the file cannot be read, or every record is bad: it is in another layout.
    """
    found: Found[T] = Found()
    for number, row in enumerate(read_rows(path)):
        try:
            if isinstance(row, ValueError):
                raise row
            if not isinstance(row, dict):
                raise ValueError(f"a record is {row!r:.100}, not an object")
            found.items.append(convert(Record(row), number))
        except ValueError as error:
            found.bad.append(f"{path}: record {number + 1}: {error}")
    if found.bad and not found.items:
        more = f"\n... and {len(found.bad) - MAX_PROBLEMS} more" if len(found.bad) > MAX_PROBLEMS else ""
        raise BenchmarkError("\n".join(found.bad[:MAX_PROBLEMS]) + more)
    return found


class VideoFolder:
    """Finds videos of a folder by name, with or without suffix.

    Args:
        folder: where they are; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Path] = {}
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            if file.suffix.lower() in VIDEO_SUFFIXES:
                self._files.setdefault(file.stem, file)

    def find(self, name: str) -> Path:
        """Return the video `name`; where there is none, the path where it should be."""
        path = self.folder / name
        return path if path.suffix.lower() in VIDEO_SUFFIXES else self._files.get(name, self.folder / f"{name}.mp4")
