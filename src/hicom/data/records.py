"""Training records in the LLaVA layout, JSON or JSONL, read lazily: one sample for every answered turn."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MEDIA = ("video", "image")
PLACEHOLDERS = {name: f"<{name}>" for name in MEDIA}


@dataclass(frozen=True)
class Sample:
    """One answer to learn or to give.

    Attributes:
        messages: the conversation up to the question, as `{"role", "content"}`; its text holds the placeholders.
        answer: what the assistant says next; the loss is on this only.
        videos: files of the `<video>` placeholders, in reading order.
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


class Records(Sequence[Sample]):
    """The samples of one file; a line is parsed again when it is asked for.

    Only what tells samples apart is kept in memory, so that sorting and grouping them needs no further pass.

    Attributes:
        lengths: characters of text of every sample, its answer included.
        videos: files of all samples, each once, in the order in which they are first named.
    """

    def __init__(self, path: Path, root: Path) -> None:
        self.path = path
        self.root = root
        self.lengths = array("q")
        self._group_of = array("q")
        groups: dict[tuple[Path, ...], int] = {}
        self._offsets = array("q")
        self._lines = array("q")
        self._turns = array("q")
        for offset, line, text in iterate_records(path):
            for turn, sample in enumerate(parse_record(text, root, f"{path}, line {line}")):
                self._offsets.append(offset)
                self._lines.append(line)
                self._turns.append(turn)
                self.lengths.append(len(sample.answer) + sum(len(m["content"]) for m in sample.messages))
                self._group_of.append(groups.setdefault(sample.videos, len(groups)))
        if not self._offsets:
            raise ValueError(f"{path} holds no record with an answer")
        self._groups = list(groups)
        self.videos = list(dict.fromkeys(video for group in groups for video in group))

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            text = json_text(file.readline() if is_jsonl(self.path) else file.read())
        return parse_record(text, self.root, f"{self.path}, line {self._lines[index]}")[self._turns[index]]

    def videos_of(self, index: int) -> tuple[Path, ...]:
        """Return the videos of a sample without reading it."""
        return self._groups[self._group_of[index]]


def read_records(path: str | Path, root: str | Path | None = None) -> Records:
    """Open a LLaVA-style file: `.jsonl` (a record a line) or `.json` (an array of records).

    Args:
        path: the file. A record has `conversations` (`from`, `value`) or `messages` (`role`, `content`), and `video` or
            `image`: a path, or a list of them, for its `<video>` and `<image>` placeholders.
        root: folder that media paths start from; None: the file's own.

    Raises:
        ValueError: the file is missing, is not JSON, or a record is malformed; file and line are named.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give a .json or .jsonl file of LLaVA-style records")
    return Records(path, path.parent if root is None else Path(root))


def is_jsonl(path: Path) -> bool:
    """Whether a record ends with its line."""
    return path.suffix.lower() != ".json"


def iterate_records(path: Path) -> Iterator[tuple[int, int, str]]:
    """Yield the byte offset, the line (from 1) and the text of every record of `path`."""
    if is_jsonl(path):
        with path.open("rb") as file:
            offset = 0
            for line, data in enumerate(file, 1):
                if data.strip():
                    yield offset, line, json_text(data)
                offset += len(data)
        return
    text = path.read_text("utf-8")
    position, decoder = skip(text, 0), json.JSONDecoder()
    if text[position : position + 1] != "[":
        raise ValueError(f"{path} must be a JSON array of records; name a file of one record a line .jsonl")
    position = skip(text, position + 1)
    # Both count on from the last record, so that a file is read through once.
    line, offset, counted = 1, 0, 0
    while text[position : position + 1] != "]":
        line += text.count("\n", counted, position)
        offset += len(text[counted:position].encode())
        counted = position
        try:
            _, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
        yield offset, line, text[position:end]
        position = skip(text, end)
        if text[position : position + 1] == ",":
            position = skip(text, position + 1)
        elif text[position : position + 1] != "]":
            raise ValueError(f"{path}, line {line}: expected a comma or the array's end after this record")


def skip(text: str, position: int) -> int:
    """Return the place of the next character that is no space."""
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def json_text(data: bytes) -> str:
    """Decode bytes read from a file of records, a byte order mark aside."""
    return data.decode("utf-8-sig")


def parse_record(text: str, root: Path, source: str) -> list[Sample]:
    """Return the samples of one record (the JSON value that `text` starts with), one for every answered turn.

    Raises:
        ValueError: the record is malformed; `source` is named.
    """
    try:
        record, _ = json.JSONDecoder().raw_decode(text.lstrip())
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: not JSON: {error.msg}") from error
    turns = record.get("conversations", record.get("messages")) if isinstance(record, dict) else None
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{source}: a record needs a list `conversations` of turns")
    messages = [parse_turn(turn, source) for turn in turns]
    files = {name: parse_files(record, name, root, source) for name in MEDIA}
    for name, paths in files.items():
        found = sum(message["content"].count(PLACEHOLDERS[name]) for message in messages)
        if paths and not found:
            first = next((m for m in messages if m["role"] == "user"), None)
            if first is not None:
                first["content"] = PLACEHOLDERS[name] * len(paths) + "\n" + first["content"]
        elif found != len(paths):
            raise ValueError(f"{source}: {found} {PLACEHOLDERS[name]} placeholders for {len(paths)} {name} files")
    metadata = {key: value for key, value in record.items() if key not in {"conversations", "messages", *MEDIA}}
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


def parse_turn(turn: Any, source: str) -> dict[str, str]:
    """Return a turn as `{"role", "content"}`."""
    role = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
    text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
    if role not in ROLES or not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"{source}: a turn needs `from` (one of {', '.join(ROLES)}) and a `value` with text, got {turn!r:.200}"
        )
    return {"role": ROLES[role], "content": text}


def parse_files(record: dict[str, Any], name: str, root: Path, source: str) -> list[Path]:
    """Return the record's media files of one kind."""
    value = record.get(name, [])
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f"{source}: `{name}` must be a path or a list of paths, got {value!r:.200}")
    return [root / path for path in paths]
