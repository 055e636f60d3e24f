"""The instruction and the options of a turn in the plain form: whole patterns, which take quadratic time.

`tests/model/test_instruction.py` compares `hicom.model.instruction` with it.
"""

import re

PLACEHOLDERS = ("<video>", "<image>", "<|video_pad|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>")

# What stands between a question and its options, alone in its sentence.
_HEADER = r"(?:(?:possible |answer )?(?:options?|choices?|candidates|answers)|answers from (?:the )?following)\s*:"
# The first two options (all that follows belongs to them): on lines of their own, or in the line of the question after
# its end. Numbers may also be parts of a question, so they need a header.
_OPTIONS = tuple(
    re.compile(pattern, re.IGNORECASE | re.DOTALL)
    for pattern in (
        r"\n\s*(?P<first>\(?A\s*[).:])\s*\S.*?\n\s*(?P<second>\(?B\s*[).:])\s*\S",
        r"(?:(?<=\?)|(?<=\.)|(?<=:))\s+(?P<first>\(A\))\s*\S.*?\s(?P<second>\(B\))\s*\S",
        r"(?:(?<=\?)|(?<=:))\s+(?P<first>A[.)])\s+\S.*?\s(?P<second>B[.)])\s+\S",
        _HEADER + r"\s*(?P<first>\(?1\s*[).:])\s*\S.*?\s(?P<second>\(?2\s*[).:])\s*\S",
    )
)
# Options without letters: all that stands behind their header, unless it asks something.
_LIST = re.compile(
    rf"(?:^|\n|(?<=[.?!])\s)[ \t]*{_HEADER}\s*(?!\(?1\s*[).:])(?=\S)(?!.*\?\s*(?:\n|\Z)).*", re.IGNORECASE | re.DOTALL
)
_OPTION_LINE = re.compile(r"\s*\(?(?:[A-Z]|\d{1,2})\s*[).:]\s*\S.*", re.IGNORECASE)

_ASK = (
    r"(?:based on [^.?]*?,\s*|and |then )?(?:please |just |simply |directly |only )*"
    r"(?:answer|respond|response|reply|provide|give|choose|select|pick|identify|determine|output|return|state|write)\b"
)
_REMARKS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        _HEADER,
        # "Answer with the option's letter from the given choices directly"
        _ASK + r"[^?]*\b(?:option'?s?|choice|single|given|corresponding|capital) letters?\b[^?]*",
        # "Please respond with only the letter of the correct answer"
        _ASK + r"[^?]*\bletters?\b[^?]*\b(?:option|choice|answer)s?\b[^?]*",
        # "Only give the best option"
        _ASK + r"[^?]*\b(?:best|correct|right) (?:option|choice|answer)\b[^?]*",
        # "Pick the relevant category from the list of options"
        _ASK + r"[^?]*\b(?:from|of|among) (?:\w+ ){0,2}"
        r"(?:options|choices|candidates|categories|answers|selection|following)\b[^?]*",
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
# A remark only where it follows options: elsewhere a letter may be a thing in the video.
_ASKED_LETTER = re.compile(_ASK + r"[^?]*\bletters?\b[^?]*", re.IGNORECASE)
# The time instruction of LLaVA-Video, which may run on into the next sentence without a blank.
_TIMES = re.compile(
    r"the video lasts for [\d.]+ seconds, and \d+ frames are uniformly sampled from it\.\s*"
    r"these frames are located at [\d.,s\s]+",
    re.IGNORECASE,
)
# Subtitles as Video-MME hands them over, up to its prompt.
_SUBTITLES = re.compile(
    r"this video's subtitles are listed below:.*?(?=\bselect the best answer\b)", re.IGNORECASE | re.DOTALL
)
# What follows "Best option:" in prompts that open a bracket for the answer.
_OPEN_BRACKET = re.compile(r"(?<=:)\s*\(\s*$")
_QUESTION = re.compile(r"(?:^|\n)\s*question\s*:\s*", re.IGNORECASE)


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
    before, after = (text[: found.start()], text[found.start() :]) if found else (text, "")
    listed = _LIST.search(before)
    if listed and re.search(r"\w", before[: listed.start()]):
        before = before[: listed.start()]
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
    places = [found.span("first"), found.span("second")]
    label = found["second"]
    on_lines = text[: places[1][0]].rstrip(" \t").endswith("\n")
    for name in map(str, range(3, 27)) if "2" in label else _letters_after(label.strip("( ).:\n\t")):
        # In the middle of a line only what is marked exactly as the option before it is the next one.
        marked = re.escape(label).replace(re.escape(label.strip("( ).:\n\t")), name)
        pattern = rf"\n\s*(\(?{name}\s*[).:])\s*(?=\S)" if on_lines else rf"\s({marked})\s*(?=\S)"
        following = re.compile(pattern).search(text, places[-1][1])
        if following is None:
            break
        places.append(following.span(1))
    ends = [*(start for start, _ in places[1:]), len(text)]
    options = [text[start:end].strip() for (_, start), end in zip(places, ends, strict=True)]
    last = re.split(r"(?<=[.?!:])\s+", options[-1].partition("\n")[0].strip())
    while len(last) > 1 and (_is_remark(last[-1].rstrip(".!").strip()) or _ASKED_LETTER.fullmatch(last[-1])):
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
    return _TIMES.sub(" ", _SUBTITLES.sub(" ", "\n" + text))


def _find_options(text: str) -> re.Match[str] | None:
    """Return where the first two options stand, or None."""
    found = [match for match in (pattern.search(text) for pattern in _OPTIONS) if match]
    return min(found, key=lambda match: match.start(), default=None)


def _without_remarks(text: str) -> str:
    """Return the sentences of `text` that ask something, with single blanks between words."""
    text = _OPEN_BRACKET.sub("", _QUESTION.sub("\n", text))
    sentences = re.split(r"\n|(?<=[.?!:])\s+", text)
    kept = (each for each in map(str.strip, sentences) if not _is_remark(each.rstrip(".!").strip()))
    return re.sub(r"\s+", " ", " ".join(kept)).strip()


def _is_remark(sentence: str) -> bool:
    return any(pattern.fullmatch(sentence) for pattern in _REMARKS)
