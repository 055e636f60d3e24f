"""The instruction: what of a user's turn steers the compressor.

As in training it is the last user turn without media placeholders, answer options and remarks on the answer's format:
these say nothing about where to look. Datasets and benchmarks write them in few ways, of which `tests/model/
test_instruction.py` has one real phrasing each. Remarks are dropped as whole sentences only, so a question that
contains the same words ("What is the best option for her?") stays as it is.
"""

import re
import string
from collections.abc import Sequence
from typing import NamedTuple

PLACEHOLDERS = ("<video>", "<image>", "<|video_pad|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>")

MAX_INSTRUCTION = 10_000
"""Characters of an instruction that is stated. Instruction encoders read 64 tokens or so; the rest is cut."""

# What stands between a question and its options, alone in its sentence.
_HEADER = r"(?:(?:possible |answer )?(?:options?|choices?|candidates|answers)|answers from (?:the )?following)\s*:"
# A line break and what blanks stand around it, looked for where they begin, so that no run of them is read twice.
_NEW_LINE = r"(?<!\s)[^\S\n]*(?P<begin>\n)\s*"
# The first two options (all that follows belongs to them), each pair as it is written: on lines of their own, or in the
# line of the question after its end. Numbers may also be parts of a question, so they need a header.
_OPTIONS = tuple(
    (re.compile(rf"{first}\s*\S", re.IGNORECASE), re.compile(rf"{second}\s*\S", re.IGNORECASE))
    for first, second in (
        (_NEW_LINE + r"(?P<first>\(?A\s*[).:])", _NEW_LINE + r"(?P<second>\(?B\s*[).:])"),
        (r"(?P<begin>)(?<=[?.:])\s+(?P<first>\(A\))", r"\s(?P<second>\(B\))"),
        (r"(?P<begin>)(?<=[?:])\s+(?P<first>A[.)])\s", r"\s(?P<second>B[.)])\s"),
        (rf"(?P<begin>){_HEADER}\s*(?P<first>\(?1\s*[).:])", r"\s(?P<second>\(?2\s*[).:])"),
    )
)
# Options without letters: all that stands behind their header, unless it asks something.
_LIST = re.compile(
    rf"(?:^|\n|(?<=[.?!])\s)[ \t]*{_HEADER}(?=\s*(?!\(?1\s*[).:])\S)",
    re.IGNORECASE,
)
_ASKS = re.compile(r"\?[^\S\n]*(?:\n|\Z)")
_OPTION_LINE = re.compile(r"\s*\(?(?:[A-Z]|\d{1,2})\s*[).:]\s*\S.*", re.IGNORECASE)

# How a remark begins that asks for an answer of some kind; what makes it one of these stands anywhere behind.
_ASK = re.compile(
    r"(?:based on [^.?]*?,\s*|and |then )?(?:please |just |simply |directly |only )*"
    r"(?:answer|respond|response|reply|provide|give|choose|select|pick|identify|determine|output|return|state|write)\b",
    re.IGNORECASE,
)
_ASKED_LETTER = re.compile(r"\bletters?\b", re.IGNORECASE)
# One after the other, in this order.
_ASKED = tuple(
    tuple(re.compile(pattern, re.IGNORECASE) for pattern in patterns)
    for patterns in (
        # "Answer with the option's letter from the given choices directly"
        (r"\b(?:option'?s?|choice|single|given|corresponding|capital) letters?\b",),
        # "Please respond with only the letter of the correct answer"
        (_ASKED_LETTER.pattern, r"\b(?:option|choice|answer)s?\b"),
        # "Only give the best option"
        (r"\b(?:best|correct|right) (?:option|choice|answer)\b",),
        # "Pick the relevant category from the list of options"
        (
            r"\b(?:from|of|among) (?:\w+ ){0,2}"
            r"(?:options|choices|candidates|categories|answers|selection|following)\b",
        ),
    )
)
_REMARKS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        _HEADER,
        r"you (?:can|should|must|may) only (?:answer|respond|response|reply) with\b[^?]*",
        # "Answer the question using a single word or phrase"
        r"(?:please )?(?:answer|respond|reply)(?: to)?(?: (?:the|this)(?: following)? questions?)?"
        r" (?:only |just )?(?:shortly|briefly|concisely|directly|['\"]?yes['\"]?(?: or |/)['\"]?no['\"]?"
        r"|(?:in|with|using) (?:only |just |at most |no more than )?"
        r"(?:an? |one |two |a few |few |\d+ )?(?:single |short |brief |complete )?"
        r"(?:words?|phrases?|sentences?|answers?|['\"]?yes['\"]?(?: or |/)['\"]?no['\"]?)\b[^?]*)",
        # "Offer a very short reply"
        r"(?:please )?(?:offer|give|provide|keep) (?:me )?(?:an? |your )?(?:very )?(?:short |brief |concise )?"
        r"(?:answer|reply|response)s?(?: (?:very )?(?:short|brief|concise))?",
        # What the prompts of benchmarks and of LLaVA-Video say about the video before the question.
        r"carefully watch (?:this|the) video and pay attention to [^?]*",
        r"these are the frames of a video",
        r"please answer the following questions? (?:related to|about|based on) (?:this|the) video",
        # "The best answer is:", what the answer is to follow
        r"(?:the )?(?:best |correct |final )?(?:answer|option)(?: is)?\s*:",
        r"(?:the )?(?:best|correct|final) (?:answer|option) is",
    )
)
# The time instruction of LLaVA-Video, which may run on into the next sentence without a blank.
_TIMES = re.compile(
    r"the video lasts for [\d.]+ seconds, and \d+ frames are uniformly sampled from it\.\s*"
    r"these frames are located at [\d.,s\s]+",
    re.IGNORECASE,
)
# Subtitles as Video-MME hands them over, up to its prompt.
_SUBTITLES = re.compile(r"this video's subtitles are listed below:", re.IGNORECASE)
_PROMPT = re.compile(r"\bselect the best answer\b", re.IGNORECASE)
# What follows "Best option:" in prompts that open a bracket for the answer.
_OPEN_BRACKET = re.compile(r"(?<=:)\s*\(\s*$")
_QUESTION = re.compile(r"(?<!\s)(?:\A|[^\S\n]*\n)\s*question\s*:\s*", re.IGNORECASE)


def join_parts(parts: Sequence[str]) -> str:
    """Return the text of a message whose content is given in parts; each stands on lines of its own.

    Args:
        parts: texts, and placeholders where media stand, in order. This is also how vLLM writes them.
    """
    return "\n".join(parts)


def check_instruction(text: str) -> str:
    """Return an instruction that a caller states, checked before any work is put into it.

    Raises:
        ValueError: it is empty, or longer than `MAX_INSTRUCTION`.
    """
    if not text.strip():
        raise ValueError("the instruction is empty; give text, or leave it out to use the question")
    if len(text) > MAX_INSTRUCTION:
        raise ValueError(
            f"the instruction has {len(text):,} characters; at most {MAX_INSTRUCTION:,} are taken, of which the "
            "instruction encoder reads the beginning: shorten it, or leave it out to use the question"
        )
    return text


def extract_instruction(text: str) -> str:
    """Return what of a user's turn steers the compressor.

    Args:
        text: the turn as the user, a dataset or a benchmark wrote it.

    Returns:
        The bare question; the text without placeholders where nothing else would remain.
    """
    plain = _without_media(text)
    text = _own_words(plain)
    found = _find_options(text)
    before, after = (text[: found.start], text[found.start :]) if found else (text, "")
    before = before[: _start_of_list(before)]
    instruction = _without_remarks(before)
    if not re.search(r"\w", instruction):  # options may also precede their question
        instruction = _without_remarks("\n".join(line for line in after.split("\n") if not _OPTION_LINE.match(line)))
    return instruction if re.search(r"\w", instruction) else plain


def answer_options(text: str) -> tuple[str, ...]:
    """Return the options that a user's turn offers, in order.

    They stand on lines of their own or one after the other, each behind its letter or number; the last one ends with
    its line. Remarks on the answer's format that follow it there are left out.

    Args:
        text: the turn as the user, a dataset or a benchmark wrote it.

    Returns:
        Texts without letters or numbers, at most 26; none where the turn offers no options.
    """
    text = _own_words(_without_media(text))
    found = _find_options(text)
    if found is None:
        return ()
    places = [found.first, found.second]
    label = text[slice(*found.second)]
    letter = label.strip("(). :" + string.whitespace)
    on_lines = text[: places[1][0]].rstrip(" \t").endswith("\n")
    for name in map(str, range(3, 27)) if letter == "2" else _letters_after(letter):
        # In the middle of a line only what is marked exactly as the option before it is the next one.
        marked = re.escape(label).replace(re.escape(letter), name)
        pattern = rf"{_NEW_LINE}(?P<mark>\(?{name}\s*[).:])\s*(?=\S)" if on_lines else rf"\s(?P<mark>{marked})\s*(?=\S)"
        following = re.compile(pattern).search(text, places[-1][1])
        if following is None:
            break
        places.append(following.span("mark"))
    ends = [*(start for start, _ in places[1:]), len(text)]
    options = [text[start:end].strip() for (_, start), end in zip(places, ends, strict=True)]
    last = re.split(r"(?<=[.?!:])\s+", options[-1].partition("\n")[0].strip())
    while len(last) > 1 and (_is_remark(last[-1].rstrip(".!").strip()) or _asks(last[-1], [_ASKED_LETTER])):
        last.pop()
    return tuple(" ".join(option.split()) for option in (*options[:-1], " ".join(last)))


def _letters_after(letter: str) -> list[str]:
    """Return the letters that follow one, in its case."""
    return [chr(code) for code in range(ord(letter) + 1, ord("Z" if letter.isupper() else "z") + 1)]


def _without_media(text: str) -> str:
    for placeholder in PLACEHOLDERS:
        text = text.replace(placeholder, " ")
    return text.strip()


def _own_words(text: str) -> str:
    """Return a turn without subtitles and times of frames; it begins with a line break, as options may."""
    text, parts, place = "\n" + text, [], 0
    while (head := _SUBTITLES.search(text, place)) and (end := _PROMPT.search(text, head.end())):
        parts += [text[place : head.start()], " "]
        place = end.start()
    return _TIMES.sub(" ", "".join(parts) + text[place:])


class _Options(NamedTuple):
    """Where the first two options stand: where they begin, with what stands before, and the marks of both."""

    start: int
    first: tuple[int, int]
    second: tuple[int, int]


def _find_options(text: str) -> _Options | None:
    """Return where the first two options stand, or None."""
    found = [each for pair in _OPTIONS if (each := _first_two(text, *pair))]
    return min(found, key=lambda each: each.start, default=None)


def _first_two(text: str, first: re.Pattern[str], second: re.Pattern[str]) -> _Options | None:
    """Return the first two options of one kind; where none follows the first mark, none follows a later one."""
    begin = first.search(text)
    end = begin and second.search(text, begin.end())
    if not (begin and end):
        return None
    return _Options(begin.start("begin"), begin.span("first"), end.span("second"))


def _start_of_list(text: str) -> int:
    """Return where options without letters begin, behind some words; else the length of the text."""
    asked = max((each.start() for each in _ASKS.finditer(text)), default=-1)
    listed = next((each for each in _LIST.finditer(text) if each.end() > asked), None)
    return listed.start() if listed and re.search(r"\w", text[: listed.start()]) else len(text)


def _without_remarks(text: str) -> str:
    """Return the sentences of `text` that ask something, with single blanks between words."""
    text = _OPEN_BRACKET.sub("", _QUESTION.sub("\n", text))
    sentences = re.split(r"\n|(?<=[.?!:])\s+", text)
    kept = (each for each in map(str.strip, sentences) if each and not _is_remark(each.rstrip(".!").strip()))
    return re.sub(r"\s+", " ", " ".join(kept)).strip()


def _is_remark(sentence: str) -> bool:
    return any(pattern.fullmatch(sentence) for pattern in _REMARKS) or any(_asks(sentence, each) for each in _ASKED)


def _asks(sentence: str, patterns: Sequence[re.Pattern[str]]) -> bool:
    """Return whether a sentence asks for an answer, with all these patterns one after the other behind that."""
    begin = _ASK.match(sentence)
    if begin is None or "?" in sentence[begin.end() :]:
        return False
    place = begin.end()
    for pattern in patterns:
        found = pattern.search(sentence, place)
        if found is None:
            return False
        place = found.end()
    return True
