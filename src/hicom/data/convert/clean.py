"""From a draft to a record that training reads: turns in pairs, placeholders as many as files, nothing in silence."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...video import VideoError, with_bounds
from ..records import MEDIA, PLACEHOLDERS, ROLES
from .layout import Draft, LeftOut, Media

NUMBER = "a number of an answer or question is written as text"
MOVED = "placeholders are not as many as files; all stand in front of the first question"
KEPT_OUT = ("conversations", "messages", *MEDIA, *(f"{kind}s" for kind in MEDIA))
"""Fields with a meaning of their own in a record."""


@dataclass
class Cleaned:
    """Turns that are left.

    Attributes:
        turns: roles `human`, `gpt` and at first perhaps `system`, with their texts, questions and answers in turn.
        dropped: reasons of turns that were left out.
        changes: see `Draft`.
    """

    turns: list[tuple[str, str]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)


def clean(draft: Draft, find: Callable[[Media], str]) -> tuple[dict[str, Any], Cleaned]:
    """Return the record of a draft, and what was done to it.

    Args:
        draft: as its layout reads it.
        find: returns where a video or image is, from the folder of media; raises LeftOut where it is not.

    Raises:
        LeftOut: nothing of it can be used.
    """
    found = pair_turns(draft)
    place_media(found, draft.media)
    record: dict[str, Any] = {key: value for key, value in draft.fields.items() if key not in KEPT_OUT}
    for kind in MEDIA:
        paths = [bounded(find(media), media) for media in draft.media if media.kind == kind]
        if paths:
            record[kind] = paths[0] if len(paths) == 1 else paths
    record["conversations"] = [{"from": role, "value": text} for role, text in found.turns]
    return record, found


def bounded(path: str, media: Media) -> str:
    """Return the path of the part that counts."""
    try:
        return with_bounds(path, *media.bounds)
    except VideoError as error:
        raise LeftOut("bounds that are no part of a video", media.bounds) from error


def pair_turns(draft: Draft) -> Cleaned:
    """Return the questions that have an answer, with it.

    Raises:
        LeftOut: there is none; or a turn is of nobody.
    """
    found = Cleaned(changes=list(draft.changes))
    question: str | None = None
    for number, (role, value) in enumerate(draft.turns):
        who = ROLES.get(role) if isinstance(role, str) else None
        if who is None:
            raise LeftOut("a turn is of nobody known", role)
        name = {"user": "question", "assistant": "answer"}.get(who, "system turn")
        text = as_text(value, name, found)
        if who == "system":
            if number:
                raise LeftOut("a system turn stands between others")
            found.turns += [("system", text)] if text is not None else []
        elif who == "user":
            if question is not None:
                found.dropped.append("a question without an answer")
            question = text
        elif question is None:
            # Of a question that was left out itself, the answer goes without saying.
            if number == 0 or ROLES.get(draft.turns[number - 1][0]) != "user":
                found.dropped.append("an answer without a question")
        elif text is not None:
            found.turns += [("human", question), ("gpt", text)]
            question = None
        else:
            question = None
    if question is not None:
        found.dropped.append("a question without an answer")
    if not any(role == "gpt" for role, _ in found.turns):
        raise LeftOut(f"no answered question: {found.dropped[0] if found.dropped else 'no turn'}")
    return found


def as_text(value: Any, name: str, found: Cleaned) -> str | None:
    """Return what a turn says; None where it is left out, with the reason noted."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        found.changes.append(NUMBER)
        return str(value)
    if not isinstance(value, str):
        found.dropped.append(f"{'an' if name == 'answer' else 'a'} {name} that is no text")
        return None
    text = value
    for placeholder in PLACEHOLDERS.values():
        text = text.replace(placeholder, "")
    if not text.strip():
        found.dropped.append(f"an empty {name}")
        return None
    if name != "question" and text != value:
        raise LeftOut("a placeholder of a video or image stands in an answer", value)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise LeftOut("a text is not Unicode", value) from error
    return value


def place_media(found: Cleaned, media: Sequence[Media]) -> None:
    """Make placeholders as many as files: called as they should be, or all in front of the first question."""
    counts = {kind: sum(each.kind == kind for each in media) for kind in MEDIA}
    if counts["video"] and not counts["image"]:
        rename(found, PLACEHOLDERS["image"], PLACEHOLDERS["video"])
    first = next(i for i, (role, _) in enumerate(found.turns) if role == "human")
    for kind, placeholder in PLACEHOLDERS.items():
        number = sum(text.count(placeholder) for role, text in found.turns if role == "human")
        if number == counts[kind]:
            continue
        if not counts[kind]:
            raise LeftOut(f"a text says {placeholder}, and no {kind} is shown")
        if number:
            found.changes.append(MOVED)
            rename(found, placeholder, "")
        role, text = found.turns[first]
        found.turns[first] = role, f"{placeholder * counts[kind]}\n{text}"


def rename(found: Cleaned, old: str, new: str) -> None:
    """Put other placeholders, or none, in place of those in questions."""
    for number, (role, text) in enumerate(found.turns):
        if role == "human" and old in text:
            if not new:
                text = text.replace(f"{old}\n", "").replace(f"\n{old}", "").replace(old, "").strip()
            found.turns[number] = role, text.replace(old, new) if new else text
