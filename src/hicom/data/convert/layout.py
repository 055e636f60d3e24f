"""What a published data set looks like on disk: which files hold its records, and what one of them says."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from ...files import parse_json
from ..records import iterate_array, iterate_lines

Kind = Literal["video", "image"]
REPORT = ".report.json"
"""Suffix of what a conversion reports, in place of that of the records."""


class LeftOut(ValueError):
    """A record that cannot be used.

    Attributes:
        reason: one of few texts, so that records can be counted by it.
        detail: what is particular about this one.
    """

    def __init__(self, reason: str, detail: object = "") -> None:
        self.reason, self.detail = reason, "" if detail == "" else f"{detail!r:.200}"
        super().__init__(f"{reason}: {self.detail}" if self.detail else reason)


@dataclass(frozen=True)
class Media:
    """A video or an image that a record shows.

    Attributes:
        kind: `video` or `image`.
        places: where it may lie, from the folder of media; the first one counts where nothing is looked up.
        bounds: `start_s` and `end_s` of the part that counts; empty: all of it.
    """

    kind: Kind
    places: tuple[str, ...]
    bounds: tuple[float | None, float | None] = (None, None)


@dataclass
class Draft:
    """A record as its data set has it, in our words.

    Attributes:
        turns: role and value of every turn, in order; values may be anything that JSON holds.
        media: what is shown, in the order of the placeholders.
        fields: what else is kept of it.
        changes: what was done to it that can change what a model learns, in words that can be counted.
    """

    turns: list[tuple[Any, Any]]
    media: tuple[Media, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)


class Layout(ABC):
    """How one data set is published.

    A subclass says in its docstring what is known of the layout, and from where.

    Attributes:
        name: of `hicom data convert NAME`.
        title: one line for people.
        patterns: glob patterns of the files with records, from the folder as downloaded.

    Args:
        src: the folder as downloaded.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    patterns: ClassVar[tuple[str, ...]]

    def __init__(self, src: Path) -> None:
        self.src = src

    def files(self) -> list[Path]:
        """Return what holds records, in order."""
        return list(dict.fromkeys(file for pattern in self.patterns for file in sorted(self.src.glob(pattern))))

    def default(self, files: Sequence[Path]) -> Sequence[Path]:
        """Return those that are read unless others are asked for."""
        return files

    def rows(self, file: Path) -> Iterator[tuple[str, Any]]:
        """Yield where every record stands in a file, and what it is: JSON, parsed or as text.

        Raises:
            ValueError: the file is not JSON.
        """
        if is_array(file):
            # Arrays often stand in one line.
            yield from ((f"record {i}", row) for i, (_, _, _, row) in enumerate(iterate_array(file), 1))
        else:
            yield from ((f"line {line}", text.strip()) for _, _, line, text in iterate_lines(file))

    @abstractmethod
    def draft(self, row: Any, folder: str) -> Draft:
        """Return a record.

        Args:
            row: what `rows` yielded, parsed.
            folder: of its file, from the folder as downloaded; "." is that one itself.

        Raises:
            LeftOut: it cannot be used.
        """


def is_array(file: Path) -> bool:
    """Whether a file is one JSON array, whatever its suffix says: public files are called either way."""
    with file.open("rb") as opened:
        return opened.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def parsed(row: Any) -> Any:
    """Return a row, parsed where it is text.

    Raises:
        LeftOut: it is not JSON.
    """
    if not isinstance(row, str):
        return row
    try:
        return parse_json(row)
    except json.JSONDecodeError as error:
        raise LeftOut("a line is not JSON", row) from error


def an_object(row: Any) -> dict[str, Any]:
    """Return a row that has fields.

    Raises:
        LeftOut: it has none.
    """
    if not isinstance(row, dict):
        raise LeftOut("a record is no object", row)
    return row


def paths_of(value: Any) -> list[str]:
    """Return the paths of a field that holds one, or a list of them.

    Raises:
        LeftOut: it holds anything else.
    """
    paths = value if isinstance(value, list) else [value]
    if not paths or not all(isinstance(path, str) and path.strip() for path in paths):
        raise LeftOut("a path of a video or image is missing or no text", value)
    return paths
