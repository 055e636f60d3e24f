"""Training records in the layouts that people have, read lazily: one sample for every answered turn.

LLaVA's (`conversations` of `from` and `value`) and ShareGPT's (`messages` of `role` and `content`), in JSON, JSONL or
the rows of a Hugging Face dataset. Only an index is kept in memory, tens of bytes a sample.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

from tqdm.auto import tqdm

from ..video import VideoError, with_bounds

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MEDIA = ("video", "image")
PLACEHOLDERS = {name: f"<{name}>" for name in MEDIA}
BOUNDS = {"video_start": "start_s", "video_end": "end_s"}
"""How parts of a turn name the bounds of their video, in seconds."""
OnBadRecord = Literal["stop", "skip"]
"""What a malformed record does: it is an error, or it is left out, counted and named."""

CHUNK = 2**20
"""Bytes of a JSON array that are looked at together."""
NEAR_END = 16
"""Characters before the end of a chunk in which a JSON error may mean that the rest is not read yet."""


@dataclass(frozen=True)
class Sample:
    """One answer to learn or to give.

    Attributes:
        messages: the conversation up to the question, as `{"role", "content"}`; its text holds the placeholders.
        answer: what the assistant says next; the loss is on this only.
        videos: files of the `<video>` placeholders, in reading order; `clip.mp4#t=5,12` is a part of one.
        images: files of the `<image>` placeholders, in reading order.
        metadata: every other field of the record.
        source: file and line, for error messages.
    """

    messages: tuple[dict[str, str], ...]
    answer: str
    videos: tuple[Path, ...] = ()
    images: tuple[Path, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class BadRecord:
    """A record that was left out.

    Attributes:
        number: its line, from 1, or its row, from 0.
        message: what is wrong with it; names it.
    """

    number: int
    message: str


class Records(Sequence[Sample], ABC):
    """The samples of one source; a record is read again when a sample of it is asked for.

    Only what tells samples apart is kept in memory, so that sorting and grouping them needs no further pass.

    Attributes:
        name: of the source, for error messages.
        root: folder that media paths start from.
        lengths: `int64[N]`, characters of text of every sample, its answer included.
        groups: `int64[N]`, which samples show the same videos and images: equal numbers.
        num_media: `{kind: int64[G]}`, how many videos and images the samples with each number in `groups` show.
        numbers: `int64[N]`, the record of every sample, counted from 0 over those that are not left out.
        num_records: records that are not left out.
        errors: records that were left out.
    """

    def __init__(self, name: str, root: Path, on_bad: OnBadRecord, listed: Collection[int] = ()) -> None:
        self.name, self.root = name, root
        self.lengths, self.groups, self.numbers = array("q"), array("q"), array("q")
        self.num_records = 0
        self.errors: list[BadRecord] = []
        self.num_media = {name: array("l") for name in MEDIA}
        self._turns, self._first = array("l"), array("q")
        # Digests, because the names themselves may take more memory than all else.
        known: dict[bytes, int] = {}
        for number, place, record in self._read_all():
            try:
                samples = parse_record(record, root, self._source(number))
            except ValueError as error:
                if on_bad == "stop" and number not in listed:
                    raise
                self.errors.append(BadRecord(number, str(error)))
                continue
            self._keep(number, place)
            for turn, sample in enumerate(samples):
                files = "\n".join(map(str, (*sample.videos, "", *sample.images))).encode()
                group = known.setdefault(hashlib.blake2b(files, digest_size=16).digest(), len(known))
                if group == len(self._first):
                    self._first.append(len(self.numbers))
                    self.num_media["video"].append(len(sample.videos))
                    self.num_media["image"].append(len(sample.images))
                self.groups.append(group)
                self.numbers.append(self.num_records)
                self._turns.append(turn)
                self.lengths.append(len(sample.answer) + sum(len(m["content"]) for m in sample.messages))
            self.num_records += 1
        if not self.num_records:
            left_out = (
                f" ({len(self.errors)} were left out; the first: {self.errors[0].message})" if self.errors else ""
            )
            raise ValueError(f"{name} holds no record with an answer{left_out}")

    @abstractmethod
    def _read_all(self) -> Iterator[tuple[int, Any, Any]]:
        """Yield the line or row of every record, where it lies, and itself, parsed or as text."""

    @abstractmethod
    def _keep(self, number: int, place: Any) -> None:
        """Remember where the next record lies."""

    @abstractmethod
    def _read(self, record: int) -> tuple[int, Any]:
        """Return the line or row of a kept record, and itself, parsed or as text."""

    @abstractmethod
    def _source(self, number: int) -> str:
        """Return what the record in this line or row is called in errors."""

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number, record = self._read(self.numbers[index])
        return parse_record(record, self.root, self._source(number))[self._turns[index]]

    def first_of_group(self, group: int) -> Sample:
        """Return the first sample with this number in `groups`."""
        return self[self._first[group]]

    @property
    def num_groups(self) -> int:
        """Different numbers in `groups`."""
        return len(self._first)

    @property
    def videos(self) -> list[Path]:
        """Files of all samples, each once, in the order in which they are first named."""
        return list(dict.fromkeys(video for g in range(self.num_groups) for video in self.first_of_group(g).videos))


class FileRecords(Records):
    """The samples of a file of JSON: an array of records, or one a line.

    Attributes:
        path: the file.
        lines: `int64[R]`, the line of every record, from 1.
    """

    def __init__(self, path: Path, root: Path, on_bad: OnBadRecord = "stop", listed: Collection[int] = ()) -> None:
        self.path = path
        self.lines = array("q")
        self._starts, self._ends = array("q"), array("q")
        super().__init__(str(path), root, on_bad, listed)

    def _read_all(self) -> Iterator[tuple[int, Any, Any]]:
        places: Iterable[tuple[int, int, int, Any]]
        places = iterate_lines(self.path) if is_jsonl(self.path) else iterate_array(self.path)
        size = self.path.stat().st_size
        with tqdm(total=size, unit="B", unit_scale=True, desc=f"reading {self.path.name}", delay=2) as bar:
            for start, end, line, record in places:
                bar.update(end - bar.n)
                yield line, (start, end), record

    def _keep(self, number: int, place: Any) -> None:
        for kept, value in zip((self.lines, self._starts, self._ends), (number, *place), strict=True):
            kept.append(value)

    def _read(self, record: int) -> tuple[int, Any]:
        with self.path.open("rb") as file:
            file.seek(self._starts[record])
            return self.lines[record], json_text(file.read(self._ends[record] - self._starts[record]))

    def _source(self, number: int) -> str:
        return f"{self.path}, line {number}"


class RowRecords(Records):
    """The samples of a table of records, such as a `datasets.Dataset`.

    Attributes:
        kept: `int64[R]`, the row of every record, from 0.

    Args:
        rows: the records; media are paths, or mappings with a `path` (`datasets.Video(decode=False)`).
        root: folder that media paths start from.
        name: for error messages and skip lists.
        on_bad: what a malformed row does.
        listed: rows that are left out, and no error, where they are malformed.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, Any]],
        root: Path,
        name: str = "rows",
        on_bad: OnBadRecord = "stop",
        listed: Collection[int] = (),
    ) -> None:
        self.rows = rows
        self.kept = array("q")
        super().__init__(name, root, on_bad, listed)

    def _read_all(self) -> Iterator[tuple[int, Any, Any]]:
        for number, row in enumerate(tqdm(self.rows, unit="row", desc=f"reading {self.name}", delay=2)):
            yield number, None, dict(row)

    def _keep(self, number: int, place: Any) -> None:
        self.kept.append(number)

    def _read(self, record: int) -> tuple[int, Any]:
        return self.kept[record], dict(self.rows[self.kept[record]])

    def _source(self, number: int) -> str:
        return f"{self.name}, row {number}"


def read_records(
    path: str | Path,
    root: str | Path | None = None,
    on_bad: OnBadRecord = "stop",
    listed: Collection[int] = (),
) -> FileRecords:
    """Open a file of records: `.jsonl` (a record a line) or `.json` (an array of records).

    Args:
        path: the file. A record has `conversations` (`from`, `value`) or `messages` (`role`, `content`, which is a text
            or a list of parts), and `video` or `image` (or `videos`, `images`): a path, or a list of them, for its
            `<video>` and `<image>` placeholders. A record of videos alone may call them `<image>`, as LLaVA-NeXT does.
            `clip.mp4#t=5,12` are the seconds 5 to 12 of a file.
        root: folder that media paths start from; None: the file's own.
        on_bad: what a malformed record does. A `.json` file that is no JSON is an error in any case.
        listed: lines whose records are left out, and no error, where they are malformed; `on_bad` is about all others.

    Raises:
        ValueError: the file is missing, is not JSON, or a record is malformed; file and line are named.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give a .json or .jsonl file of LLaVA-style records")
    return FileRecords(path, path.parent if root is None else Path(root), on_bad, listed)


# Where records lie in a file.


def is_jsonl(path: Path) -> bool:
    """Whether a record ends with its line."""
    return path.suffix.lower() != ".json"


def json_text(data: bytes) -> str:
    """Decode bytes read from a file of records, a byte order mark aside."""
    return data.decode("utf-8-sig")


def iterate_lines(path: Path) -> Iterator[tuple[int, int, int, str]]:
    """Yield where every line begins and ends, in bytes, its number from 1, and its text; empty ones are left out."""
    with path.open("rb") as file:
        offset = 0
        for line, data in enumerate(file, 1):
            if data.strip():
                try:
                    text = json_text(data)
                except UnicodeDecodeError as error:
                    raise ValueError(f"{path}, line {line}: not UTF-8: {error.reason}") from error
                yield offset, offset + len(data), line, text
            offset += len(data)


def iterate_array(path: Path) -> Iterator[tuple[int, int, int, Any]]:
    """Yield where every element of a JSON array begins and ends, in bytes, its line, and itself.

    Raises:
        ValueError: the file holds no array, or is not JSON.
    """
    decoder = json.JSONDecoder()
    with _Window(path) as window:
        if window.next() != "[":
            raise ValueError(f"{path} must be a JSON array of records; name a file of one record a line .jsonl")
        window.step(1)
        while (character := window.next()) != "]":
            if not character:
                raise ValueError(f"{path}, line {window.line}: the file ends inside the array; it was cut off")
            while True:
                try:
                    value, end = decoder.raw_decode(window.text, window.position)
                except json.JSONDecodeError as error:
                    is_open = error.msg.startswith("Unterminated") or error.pos > len(window.text) - NEAR_END
                    if is_open and window.grow():
                        continue
                    line = window.line + window.text.count("\n", window.position, error.pos)
                    raise ValueError(f"{path}, line {line}: not JSON: {error.msg}") from error
                except RecursionError:
                    raise ValueError(f"{path}, line {window.line}: not JSON: nested too deeply") from None
                break
            line, start = window.line, window.offset
            window.step(end - window.position)
            yield start, window.offset, line, value
            if window.next() == ",":
                window.step(1)
            elif window.next() not in ("]", ""):
                raise ValueError(f"{path}, line {line}: expected a comma or the array's end after this record")


class _Window:
    """A part of a text file that moves on and grows where it has to.

    Attributes:
        text: what is read and not yet dropped.
        position: in `text`.
        offset: byte of the file at `position`.
        line: at `position`, from 1.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._path = path
        self._rest = b""
        self.text, self.position, self.line = "", 0, 1
        self.offset = 3 if self._file.read(3) == b"\xef\xbb\xbf" else 0
        self._file.seek(self.offset)

    def __enter__(self) -> _Window:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def grow(self) -> bool:
        """Drop what lies behind and read as much again as is there; return whether there was more."""
        kept = self.text[self.position :]
        data = self._rest + self._file.read(max(CHUNK, len(kept)))
        # The last bytes may be a part of a character.
        try:
            more, self._rest = data.decode("utf-8"), b""
        except UnicodeDecodeError as error:
            if len(data) - error.start > 3:
                raise ValueError(f"{self._path}: not UTF-8: {error.reason} after byte {self.offset}") from error
            more, self._rest = data[: error.start].decode("utf-8"), data[error.start :]
        self.text, self.position = kept + more, 0
        return bool(more)

    def step(self, length: int) -> None:
        """Move on by characters that are there."""
        passed = self.text[self.position : self.position + length]
        self.offset += len(passed.encode("utf-8"))
        self.line += passed.count("\n")
        self.position += length

    def next(self) -> str:
        """Move on to the next character that is no space, and return it; "" at the end of the file."""
        while True:
            end = self.position
            while end < len(self.text) and self.text[end].isspace():
                end += 1
            self.step(end - self.position)
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.grow():
                return ""


# What a record says.


def parse_record(record: Any, root: Path, source: str) -> list[Sample]:
    """Return the samples of one record, parsed or as JSON text: one for every answered turn.

    Raises:
        ValueError: the record is malformed; `source` is named.
    """
    try:
        may_be_halved = not isinstance(record, str) or "\\ud" in record or "\\uD" in record
        if isinstance(record, str):
            record = json.loads(record)
        if may_be_halved and is_halved(record):
            raise ValueError(f"{source}: a text holds half of a character (a lone surrogate), which no file can")
        return samples_of(record, root, source)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: not JSON: {error.msg}") from error
    except RecursionError:
        raise ValueError(f"{source}: nested too deeply for a record") from None


def is_halved(value: Any) -> bool:
    """Whether a text in a JSON value holds a lone surrogate, which JSON can write and UTF-8 cannot."""
    if isinstance(value, str):
        return not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, Mapping):
        return any(is_halved(key) or is_halved(each) for key, each in value.items())
    return isinstance(value, list | tuple) and any(map(is_halved, value))


def samples_of(record: Any, root: Path, source: str) -> list[Sample]:
    """Return the samples of one parsed record; `parse_record` says more."""
    turns = record.get("conversations", record.get("messages")) if isinstance(record, dict) else None
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{source}: a record needs a list `conversations` of turns, or `messages`")
    inline: dict[str, list[str]] = {name: [] for name in MEDIA}
    messages = [parse_turn(turn, source, inline) for turn in turns]
    files = {name: parse_files(record, name, inline[name], root, source) for name in MEDIA}
    if files["video"] and not files["image"]:
        name_videos(messages, len(files["video"]))
    for name, paths in files.items():
        found = sum(message["content"].count(PLACEHOLDERS[name]) for message in messages)
        if paths and not found:
            first = next((m for m in messages if m["role"] == "user"), None)
            if first is not None:
                first["content"] = PLACEHOLDERS[name] * len(paths) + "\n" + first["content"]
        elif found != len(paths):
            raise ValueError(f"{source}: {found} {PLACEHOLDERS[name]} placeholders for {len(paths)} {name} files")
    used = {"conversations", "messages", *MEDIA, *(f"{name}s" for name in MEDIA)}
    metadata = {key: value for key, value in record.items() if key not in used}
    samples = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = messages[:index]
        if not before or before[-1]["role"] != "user":
            raise ValueError(f"{source}: turn {index + 1} answers no question of a human")
        seen = {
            name: sum(m["content"].count(PLACEHOLDERS[name]) for m in before if m["role"] == "user") for name in MEDIA
        }
        samples.append(
            Sample(
                messages=tuple(before),
                answer=message["content"],
                videos=tuple(files["video"][: seen["video"]]),
                images=tuple(files["image"][: seen["image"]]),
                metadata=metadata,
                source=source,
            )
        )
    if not samples:
        raise ValueError(f"{source}: no turn of the assistant (`gpt`), so there is nothing to learn")
    return samples


def parse_turn(turn: Any, source: str, inline: Mapping[str, list[str]]) -> dict[str, str]:
    """Return a turn as `{"role", "content"}`; files named in its parts are added to `inline`, by kind."""
    role = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
    text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
    if isinstance(text, list):
        text = "\n".join(parse_part(part, source, inline) for part in text)
    if role not in ROLES or not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"{source}: a turn needs `from` (one of {', '.join(ROLES)}) and a `value` with text, got {turn!r:.200}"
        )
    return {"role": ROLES[role], "content": text}


def parse_part(part: Any, source: str, inline: Mapping[str, list[str]]) -> str:
    """Return the text of one part of a turn: what it says, or the placeholder of its file."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind not in MEDIA:
        raise ValueError(f"{source}: a part needs a `type` (text, {', '.join(MEDIA)}) and its text, got {part!r:.200}")
    bounds = {BOUNDS[key]: part[key] for key in BOUNDS if part.get(key) is not None}
    unknown = [key for key, value in part.items() if value is not None and key not in {"type", "text", kind, *BOUNDS}]
    if unknown or (bounds and (kind != "video" or not isinstance(part.get(kind), str))):
        what = f"{unknown[0]!r} is no option of a part" if unknown else "bounds are those of a path"
        raise ValueError(f"{source}: {what}; a part has its `type` and `text`, or a path and {', '.join(BOUNDS)}")
    # Without a path, it is the next one of the record's own list.
    if part.get(kind) is not None:
        inline[kind].append(add_bounds(part[kind], bounds, source) if bounds else part[kind])
    return PLACEHOLDERS[kind]


def add_bounds(path: str, bounds: Mapping[str, Any], source: str) -> str:
    """Return the path of a part of a video.

    Raises:
        ValueError: the bounds are no numbers of seconds, or end before they start.
    """
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in bounds.values()):
        raise ValueError(f"{source}: the bounds of {path} are no numbers of seconds: {dict(bounds)}")
    try:
        return with_bounds(path, bounds.get("start_s"), bounds.get("end_s"))
    except VideoError as error:
        raise ValueError(f"{source}: {error}") from error


def name_videos(messages: Sequence[dict[str, str]], num_videos: int) -> None:
    """Call videos `<video>` where all of them are called `<image>`."""
    video, image = PLACEHOLDERS["video"], PLACEHOLDERS["image"]
    counts = [sum(message["content"].count(name) for message in messages) for name in (video, image)]
    if counts == [0, num_videos]:
        for message in messages:
            message["content"] = message["content"].replace(image, video)


def parse_files(record: Mapping[str, Any], name: str, inline: list[str], root: Path, source: str) -> list[Path]:
    """Return the record's media files of one kind."""
    given = [key for key in (name, f"{name}s") if record.get(key) not in (None, [], "")]
    if len(given) + bool(inline) > 1:
        places = [f"`{key}`" for key in given] + ["its parts"] * bool(inline)
        raise ValueError(f"{source}: {name} files are named in {' and in '.join(places)}; name them once")
    value = record[given[0]] if given else inline
    paths = [value] if isinstance(value, str | Mapping) else value
    found = (
        [path.get("path") if isinstance(path, Mapping) else path for path in paths] if isinstance(paths, list) else []
    )
    texts = [path for path in found if isinstance(path, str) and path]
    if not isinstance(paths, list) or len(texts) < len(paths):
        raise ValueError(f"{source}: `{name}` must be a path or a list of paths, got {value!r:.200}")
    return [root / path for path in texts]
