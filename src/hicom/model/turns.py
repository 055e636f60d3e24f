"""The last user turn of a rendered prompt, for every chat template.

What a template writes around a user's words is read off the template itself: small conversations of made-up words are
rendered, and what stands between the words are its marks. No family of models is known by name.

A prompt is then read from its start, turn after turn: what the user writes ends at the next mark that may follow it,
everything else ends at the next mark that opens a user turn. So a user may write "[INST]", and an answer "[/INST]".
It is read twice: with the marks letter by letter, as the template writes them; and, where these do not account for it,
with marks that may have lost or gained blanks, as they do on their way through some tokenizers and in prompts written
by hand.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from .dual_encoder import InstructionWarning
from .instruction import PLACEHOLDERS

# Words that no template writes by itself.
_SYSTEM, _USER, _USER_2, _ANSWER, _RESULT = ("Qsysz", "Quserz", "Qaskz", "Qansz", "Qtoolz")
# The look of marks of any template, for prompts that have none of their own template's.
_FOREIGN = re.compile(
    r"<[|\uff5c][^\s|\uff5c<>]{1,40}[|\uff5c]>|\[/?INST\]|<\w+_of_turn>|\b(?:ASSISTANT|Assistant)\s?:\s*\Z"
)


class UserTurns:
    """Finds what the user says last in prompts that a chat template wrote; made by `UserTurns.of`.

    Args:
        tokenizer: whose template it is.
        chat_template: the template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str) -> None:
        self.chat_template = chat_template
        specials = {token.content for token in tokenizer.added_tokens_decoder.values()} - {*PLACEHOLDERS}
        self._specials = {token for token in specials if re.search(r"\W", token)}
        bos, eos = str(tokenizer.bos_token or ""), str(tokenizer.eos_token or "")
        self._marks = _derive(_Renderer(tokenizer, chat_template), bos, eos, self._specials)
        # What a tokenizer puts around any text, or in place of what it does not know, marks nothing.
        self._around = {bos, eos, str(tokenizer.pad_token or ""), str(tokenizer.unk_token or "")} - {""}

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> UserTurns:
        """Return the finder of a template, which is read once.

        Args:
            tokenizer: the LLM's.
            chat_template: in place of the tokenizer's own.

        Raises:
            ValueError: there is no template.
        """
        if not (chat_template or tokenizer.chat_template):
            raise ValueError("the tokenizer has no chat template, which tells where a user's turn stands")
        template = str(tokenizer.get_chat_template(chat_template))  # by name, where there are several
        known = _KNOWN.setdefault(tokenizer, {})
        key = (template, str(tokenizer.bos_token), str(tokenizer.eos_token))
        if key not in known:
            known[key] = cls(tokenizer, template)
        return known[key]

    @property
    def are_marked(self) -> bool:
        """Whether the template marks the turns of the user at all."""
        return self._marks is not None

    def has_marks(self, prompt: str) -> bool:
        """Return whether anything in a prompt is of a template; else it is plain text."""
        text, marks = _without(prompt, PLACEHOLDERS).strip(), self._marks
        text = re.sub(rf"\A(?:{'|'.join(map(re.escape, self._around))}|\s)+", "", text) if self._around else text
        text = _without(text, (token for token in self._around if marks is None or token not in marks.own))
        found = marks is not None and (marks.loose.closers.search(text) or marks.loose.first.match(text.lstrip()))
        return bool(found) or any(token in text for token in self._specials)

    def last(self, prompt: str, remedy: str) -> str:
        """Return what the user says last.

        Args:
            prompt: the whole prompt. Blanks may have changed on the way through a tokenizer.
            remedy: how to state an instruction, for the error and the warning.

        Raises:
            ValueError: no user turn is found.

        Warns:
            InstructionWarning: where the turn begins or ends is not certain.
        """
        marks = self._marks
        turn = None if marks is None else marks.last(prompt)
        if marks is None or turn is None:
            reason = (
                "the chat template does not mark them" if marks is None else "it is not as the chat template has it"
            )
            raise ValueError(f"no user turn is found in the prompt {prompt[-200:]!r}: {reason}; {remedy}")
        words = prompt[turn.start : turn.end]
        if turn.is_doubtful:
            warnings.warn(
                f"the user's turn {words[:200]!r} contains what the chat template marks turns with, so where it begins "
                f"is not certain; {remedy}",
                InstructionWarning,
                stacklevel=3,
            )
        if marks.hides_system(words, is_first=turn.number == 1):
            warnings.warn(
                "the chat template puts a system prompt before the user's words and marks no end of it, so where there "
                f"is one it steers, too: {words[:200]!r}; {remedy}",
                InstructionWarning,
                stacklevel=3,
            )
        return words.strip()


_KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[str, str, str], UserTurns]] = WeakKeyDictionary()


def last_turn_or_text(prompt: str, finders: Sequence[UserTurns], remedy: str) -> str:
    """Return what the user says last in a prompt, or the prompt itself where it is plain text.

    Args:
        prompt: the whole prompt.
        finders: of the templates that may have written it, the likeliest first.
        remedy: how to state an instruction, for errors and warnings.

    Raises:
        ValueError: a template wrote the prompt, and no user turn is found.

    Warns:
        InstructionWarning: what the user says last is not certain, or the prompt looks as if another template wrote it.
    """
    errors = []
    for finder in finders:
        if finder.has_marks(prompt):
            try:
                return finder.last(prompt, remedy)
            except ValueError as error:
                errors.append(error)
    if errors:
        raise errors[0]
    reason = ""
    foreign = _FOREIGN.search(_without(prompt, PLACEHOLDERS))
    if foreign is not None:
        reason = f"the prompt looks as if another chat template than the tokenizer's wrote it ({foreign[0]!r})"
    elif not all(finder.are_marked for finder in finders):
        reason = "the chat template does not mark the user's turns"
    if reason:
        warnings.warn(
            f"{reason}, so all of the prompt steers the compressor; {remedy}", InstructionWarning, stacklevel=3
        )
    return prompt


@dataclass(frozen=True)
class _Turn:
    """A user turn: characters `start` to `end`, the `number`-th of its prompt, its mark behind it up to `closed`."""

    start: int
    end: int
    closed: int
    number: int
    is_doubtful: bool = False


class _Alternatives:
    """Marks as one regular expression, the longest first; each is said to open a user turn or not.

    Args:
        marks: those, and whether a user turn begins behind them.
        write: a mark as a regular expression.
        flags: of it.
    """

    def __init__(
        self, marks: Mapping[str, bool], write: Callable[[str], str], flags: int = 0, ends: Iterable[str] = ()
    ) -> None:
        ordered = sorted((mark for mark in marks if mark.strip()), key=len, reverse=True)
        self._opens = [marks[mark] for mark in ordered]
        patterns = [f"({write(mark)})" for mark in ordered]
        self._num_marks = len(ordered)
        for end in ends:  # at the end of the prompt only
            if end.strip():
                patterns.append(rf"({write(end)}\s*\Z)")
                self._opens.append(False)
        self._pattern = re.compile("|".join(patterns) or r"(?!)", flags)

    def search(self, text: str, start: int = 0) -> re.Match[str] | None:
        return self._pattern.search(text, start)

    def match(self, text: str) -> re.Match[str] | None:
        return self._pattern.match(text)

    def opens(self, match: re.Match[str]) -> bool:
        assert match.lastindex is not None
        return self._opens[match.lastindex - 1]

    def last(self, text: str, start: int) -> re.Match[str] | None:
        found = None
        for each in self._pattern.finditer(text, start):
            if each.lastindex is not None and each.lastindex <= self._num_marks:
                found = each
        return found


@dataclass(frozen=True)
class _Reader:
    """Reads a prompt turn after turn.

    Attributes:
        first: marks at the very start.
        before: what opens the first user turn behind other text.
        openers: what opens later ones.
        closers: what ends a user turn.
        barriers: what stands in no user turn, for ends that are not certain.
    """

    first: _Alternatives
    before: _Alternatives
    openers: _Alternatives
    closers: _Alternatives
    barriers: tuple[str, ...]

    def last(self, prompt: str) -> _Turn | None:
        """Return the last user turn."""
        found = self.first.match(prompt)
        place, start = (0, None) if found is None else (found.end(), found.end() if self.first.opens(found) else None)
        turn, number = None, 0
        while True:
            marks = self.closers if start is not None else self.openers if number else self.before
            found = marks.search(prompt, place)
            if start is not None:
                number += 1
                end, closed = (len(prompt), len(prompt)) if found is None else found.span()
                turn = _Turn(start, end, closed, number)
            if found is None:
                return None if turn is None else self._whole(prompt, turn)
            place = found.end()
            start = place if marks.opens(found) else None

    def _whole(self, prompt: str, turn: _Turn) -> _Turn:
        """Return the last turn up to the mark that ends the prompt, if there may be one in the user's own words."""
        final = self.closers.last(prompt, turn.closed)
        if final is None or prompt[final.end() :].strip():
            return turn
        between = prompt[turn.closed : final.start()]
        ends = ["".join(each.split()).lower() for each in (prompt[turn.end : turn.closed], final[0])]
        is_same_mark = ends[0].startswith(ends[1]) or ends[1].startswith(ends[0])
        if not is_same_mark or any(barrier in between for barrier in self.barriers):
            return turn
        return _Turn(turn.start, final.start(), final.end(), turn.number)


@dataclass(frozen=True)
class _Marks:
    """The marks of a template.

    Attributes:
        strict: reads prompts exactly as the template writes them.
        loose: reads prompts whose blanks have changed.
        header: what opens a user turn at the least.
        system_end: what stands between a system prompt inside a user turn and the user's words, where nothing tells
            that there is one; None: there is no such place.
        system_turn: the user turn that it is put into: "first" or "last".
        own: all that stands around the user's words.
        is_special: whether what opens a user turn has a token of its own.
    """

    strict: _Reader
    loose: _Reader
    header: _Alternatives
    system_end: str | None
    system_turn: str
    own: str
    is_special: bool

    def last(self, prompt: str) -> _Turn | None:
        """Return the last user turn."""
        turn = self.strict.last(prompt)
        if turn is not None and turn.closed > turn.end and not self.header.search(prompt, turn.closed):
            words = prompt[turn.start : turn.end]
            closer = self.loose.closers.search(words)
            is_doubtful = closer is not None and self.header.search(words, closer.end()) is not None
            return replace(turn, is_doubtful=is_doubtful)
        loose = self.loose.last(prompt)
        if loose is None:
            return turn
        if loose.closed == loose.end and self.header.search(prompt, loose.start):
            return None  # something ends that turn, and is not known
        # In plain text, words that open a turn elsewhere open none.
        is_open = loose.closed == loose.end and loose.number == 1 and self.loose.first.match(prompt) is None
        return turn if is_open and not self.is_special else loose

    def hides_system(self, words: str, *, is_first: bool) -> bool:
        """Return whether a system prompt may be among the words of a turn."""
        if self.system_end is None or (self.system_turn == "first" and not is_first):
            return False
        return self.system_end in _without(words, PLACEHOLDERS).strip()


class _Renderer:
    """Renders conversations of made-up words.

    Args:
        tokenizer: whose template it is.
        chat_template: the template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str) -> None:
        self._tokenizer, self._template = tokenizer, chat_template
        self._in_parts = False
        text = self.render("u")
        if text is None or _USER not in text:  # some templates take a content in parts alone
            self._in_parts = True

    def render(self, roles: str, is_prompt: bool = False, **kwargs: Any) -> str | None:
        """Return a conversation as the template writes it; None where it does not.

        Args:
            roles: of the turns: s, u, U (another user turn), a, c (a call of a tool), t (its result).
            is_prompt: an answer is to follow.
            **kwargs: for the template.
        """
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [self._message(role) for role in roles],
                    chat_template=self._template,
                    tokenize=False,
                    add_generation_prompt=is_prompt,
                    **kwargs,
                )
            )
        except Exception:  # a template is a program of others: whatever it raises, it does not write this
            return None

    def _message(self, role: str) -> dict[str, Any]:
        names = {"s": "system", "u": "user", "U": "user", "a": "assistant", "c": "assistant", "t": "tool"}
        words = {"s": _SYSTEM, "u": _USER, "U": _USER_2, "a": _ANSWER, "c": "", "t": _RESULT}[role]
        message: dict[str, Any] = {"role": names[role], "content": words}
        if self._in_parts and role != "c":
            message["content"] = [{"type": "text", "text": words}]
        if role == "c":
            call = {"name": "look", "arguments": {"x": "y"}}
            message["tool_calls"] = [{"type": "function", "id": "a1b2c3d4e", "function": call}]
        if role == "t":
            message |= {"name": "look", "tool_call_id": "a1b2c3d4e"}
        return message

    def between(self, roles: str, left: str, right: str, is_prompt: bool = False, **kwargs: Any) -> str | None:
        """Return what stands between two words of a conversation; "" is its start or end. None: they are not there."""
        text = self.render(roles, is_prompt, **kwargs)
        if text is None or left not in text or right not in text:
            return None
        start = text.index(left) + len(left) if left else 0
        end = text.find(right, start) if right else len(text)
        return None if end < 0 else text[start:end]

    def each(self, *pairs: tuple[str, str, str]) -> list[str]:
        """Return what stands between words, as `between`, for those conversations that the template writes."""
        found = (self.between(*pair) for pair in pairs)
        return [mark for mark in found if mark and mark.strip()]


def _derive(renderer: _Renderer, bos: str, eos: str, specials: set[str]) -> _Marks | None:
    """Return the marks of a template; None where it has none around the user's words."""
    first, last = renderer.between("u", "", _USER), renderer.between("u", _USER, "")
    if first is None or last is None:
        return None
    later = renderer.between("uaU", _ANSWER, _USER_2)
    answer_end = renderer.between("ua", _ANSWER, "") or ""
    closers = _closers(renderer, last)
    # What may stand before a user's turn without being of it; some texts begin with what turns begin with.
    ends = {eos, last, answer_end, answer_end.strip()} | ({bos} if bos not in "".join(closers) else set())
    header = _header(first if later is None else later, ends)
    if not header.strip():
        return None
    if not any(mark.strip() for mark in closers):  # nothing but the next user turn ends this one
        closers = {later or header: True}
    system = _system_place(renderer, header)
    # What has the user's header and is not of the user: results of tools, system prompts.
    others = [rest for rest in (_tool_begin(renderer, header), system.begin) if rest.strip()]
    openers = {later or header: True} | {(later or header) + rest: False for rest in others}
    openers |= {mark: True for mark, opens in closers.items() if opens}
    openers |= dict.fromkeys(renderer.each(("uctU", _RESULT, _USER_2)), True)
    loose_openers = {header: True} | {header + rest: False for rest in others}
    if system.begin.strip():  # behind what ends such a system prompt the user's words begin
        loose_openers[system.end] = True
        if system.turn == "last":
            openers[system.end] = True
    own = "".join((header, *closers))
    barriers = {token for token in specials if token not in own} | {answer_end.strip(), last.strip()}
    barriers -= {"", *(closer.strip() for closer in closers)}
    strict = _Reader(
        first=_Alternatives({first: True} | {first + rest: False for rest in others}, re.escape),
        before=_Alternatives(openers | dict.fromkeys(renderer.each(("su", _SYSTEM, _USER)), True), re.escape),
        openers=_Alternatives(openers, re.escape),
        closers=_Alternatives(closers, re.escape, ends=[last]),
        barriers=tuple(barriers),
    )
    loosely = _Alternatives(loose_openers, _loosely, re.IGNORECASE)
    loose = _Reader(
        first=loosely,
        before=loosely,
        openers=loosely,
        closers=_Alternatives(closers, _loosely, re.IGNORECASE, ends=[last]),
        barriers=(*barriers, header.strip()),
    )
    return _Marks(
        strict=strict,
        loose=loose,
        header=_Alternatives({header: True}, _loosely, re.IGNORECASE),
        system_end=system.end if system.is_inside and not system.begin.strip() else None,
        system_turn=system.turn,
        own=own,
        is_special=any(token in header for token in specials),
    )


def _closers(renderer: _Renderer, last: str) -> dict[str, bool]:
    """Return what may follow a user's words, and whether another user turn begins behind it."""
    prompts = [renderer.between("u", _USER, "", True), renderer.between("u", _USER, "", True, enable_thinking=False)]
    # Where no answer is prepared, what ends the prompt may end less than a turn.
    after = [mark for mark in prompts if mark is not None and mark.rstrip() != last.rstrip()]
    after += renderer.each(
        ("ua", _USER, _ANSWER), ("uaU", _USER, _ANSWER), ("us", _USER, _SYSTEM), ("usU", _USER, _SYSTEM)
    )
    closers = {mark.rstrip(): False for mark in after}
    # Two user turns one after the other are told apart only where an end stands between them.
    again = renderer.each(("uU", _USER, _USER_2))
    return closers | {mark: True for mark in again if last.strip() and mark.startswith(last.rstrip())}


def _header(mark: str, ends: Iterable[str]) -> str:
    """Return a mark before a user's words without what ends the turn before."""
    while True:
        shorter = mark.lstrip()
        for end in ends:
            if end.strip() and shorter.startswith(end):
                shorter = shorter.removeprefix(end)
                break
        if shorter == mark:
            return mark
        mark = shorter


def _loosely(mark: str) -> str:
    """Return a regular expression of a mark in which blanks may be anywhere."""
    return r"\s*".join(re.escape(letter) for letter in mark if not letter.isspace())


@dataclass(frozen=True)
class _SystemPlace:
    """Where a system prompt stands: inside a user turn or not, in which, and between what."""

    is_inside: bool
    begin: str = ""
    end: str = ""
    turn: str = "first"


def _system_place(renderer: _Renderer, header: str) -> _SystemPlace:
    """Return where the template puts a system prompt."""
    text = renderer.render("suaU", True)
    turn = "first"
    if text is None or _SYSTEM not in text:
        text = renderer.render("su", True)
    elif text.index(_SYSTEM) > text.find(_ANSWER):
        turn = "last"
    if text is None or _SYSTEM not in text:
        return _SystemPlace(False)
    place = text.index(_SYSTEM)
    opened = text.rfind(header.rstrip(), 0, place)
    words = text.find(_USER if turn == "first" else _USER_2, place)
    if opened < 0 or words < 0 or header.strip() in text[place:words]:
        return _SystemPlace(False)
    begin, end = text[opened + len(header.rstrip()) : place], text[place + len(_SYSTEM) : words]
    return _SystemPlace(True, begin.strip() and begin.removeprefix(header[len(header.rstrip()) :]), end, turn)


def _tool_begin(renderer: _Renderer, header: str) -> str:
    """Return what stands between a user's header and the result of a tool, where results are in such turns."""
    for text in renderer.each(("uct", _USER, _RESULT), ("uat", _ANSWER, _RESULT)):
        _, found, rest = text.rpartition(header)
        if found and rest.strip():
            return rest
    return ""


def _without(text: str, tokens: Iterable[str]) -> str:
    for token in tokens:
        text = text.replace(token, " ")
    return text
