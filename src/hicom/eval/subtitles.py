"""Subtitles at the times of the frames that the model sees."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_TIME = r"(?:(\d+):)?(\d{1,2}):(\d{1,2})[,.](\d{1,3})"
_CUE = re.compile(rf"^[^\S\n]*{_TIME}\s*-->\s*{_TIME}.*$", re.MULTILINE)
_MARKUP = re.compile(r"<|\{\\")


@dataclass(frozen=True)
class Cue:
    """A line of subtitles on screen from `start_s` until `end_s`."""

    start_s: float
    end_s: float
    text: str


def read_subtitles(path: Path) -> list[Cue]:
    """Return the cues of an .srt or .vtt file in the order of their start; markup is removed.

    Raises:
        ValueError: the file holds no cue.
    """
    content = path.read_text("utf-8-sig", errors="replace").replace("\r\n", "\n").replace("\r", "\n")
    marks = list(_CUE.finditer(content))
    if not marks:
        raise ValueError(f"{path}: no subtitles in it; an .srt file has lines like 00:00:01,000 --> 00:00:02,500")
    cues = []
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        text = content[mark.end() : len(content) if following is None else following.start()]
        # The next cue's number, on a line of its own, belongs to the next cue.
        before, line_break, last = text.rstrip().rpartition("\n")
        if following is not None and line_break and last.strip().isdecimal():
            text = before
        text = " ".join(_without_markup(text).split())
        groups = mark.groups()
        if text:
            cues.append(Cue(_seconds(groups[:4]), _seconds(groups[4:]), text))
    return sorted(cues, key=lambda cue: cue.start_s)


def _without_markup(text: str) -> str:
    r"""Return a text without `<...>` and `{\\...}`; what is not closed stays."""
    parts, place, begin = [], 0, 0
    ends = {"<": ">", "{\\": "}"}
    while (mark := _MARKUP.search(text, begin)) is not None:
        begin = mark.end()
        end = text.find(ends[mark[0]], begin) if mark[0] in ends else -1
        if end < 0:
            ends.pop(mark[0], None)  # nor is any later one closed
            continue
        parts.append(text[place : mark.start()])
        place = begin = end + 1
    return "".join(parts) + text[place:]


def _seconds(parts: Sequence[str | None]) -> float:
    hours, minutes, seconds, fraction = (part or "0" for part in parts)
    return int(hours) * 3600 + int(minutes) * 60 + int(seconds) + int(fraction) / 10 ** len(fraction)


def subtitles_at(cues: Sequence[Cue], timestamps_s: Sequence[float]) -> list[str]:
    """Return the text on screen at each time: the first cue that covers it; a cue that several share comes once.

    The rule of Video-MME: a model that sees 10 frames reads the subtitles of these 10 frames.
    """
    chosen: list[Cue] = []
    for time in timestamps_s:
        cue = next((cue for cue in cues if cue.start_s <= time < cue.end_s), None)
        if cue is not None and cue not in chosen:
            chosen.append(cue)
    return [cue.text for cue in chosen]
