"""What a model's text says: which option it chose, whether it is the right answer, what a judge decided.

Nothing is ever guessed.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Sequence

# What may stand before the letter.
_LEAD = re.compile(
    r"^\s*(?:the |my )?(?:best |correct |right |final )?(?:answer|option|choice)(?: (?:is|would be))?\s*:?\s*"
    r"(?:option\s+)?",
    re.IGNORECASE,
)


def chosen_option(text: str, options: Sequence[str]) -> int | None:
    """Return which option an answer chooses, or None where it does not say, or says two.

    In this order, each only where the former found nothing:

    1. a letter that begins the answer, after a lead such as "The best answer is": `B`, `(B)`, `B.`, `B: ...`;
    2. the letter after "answer is", "answer:" or "option" anywhere, or in brackets, where all of these agree;
    3. an option's text as the whole answer, or the only one whose text is in it.

    A letter beyond the options is none.

    Args:
        text: what the model wrote.
        options: texts of the options, without letters.
    """
    letters = "".join(chr(ord("A") + index) for index in range(len(options)))
    both = f"{letters}{letters.lower()}"
    rest = _LEAD.sub("", text.strip(), count=1).strip()
    # A capital alone, or any letter marked as one: "A man runs" begins with an article.
    begins = re.match(rf"(?:\(\s*([{both}])\s*\)|([{both}])\s*[).:,]|([{both}])\s*$)", rest)
    if begins:
        found = next(group for group in begins.groups() if group)
        another = rf"\s*[,;/&]?\s*(?:and\s+|or\s+)?\(?[{letters}](?:\s*[).:,]|\s*$)"
        if not re.match(another, rest[begins.end() :]):
            return letters.index(found.upper())
        return None
    marked = re.findall(rf"(?:answer is|answer:|option|choice)\s*:?\s*\(?([{letters}])(?![\w'])", text)
    marked += re.findall(rf"\(([{letters}])\)", text)
    if marked:
        return letters.index(marked[0]) if len(set(marked)) == 1 else None
    plain = [_plain(option) for option in options]
    whole = _plain(rest)
    if plain.count(whole) == 1:
        return plain.index(whole)
    inside = [index for index, option in enumerate(plain) if option and re.search(rf"\b{re.escape(option)}\b", whole)]
    # An option that is a part of another one that is there too was not chosen: "red" in "dark red".
    longest = [i for i in inside if not any(i != k and plain[i] in plain[k] for k in inside)]
    return longest[0] if len(longest) == 1 else None


def _plain(text: str) -> str:
    return re.sub(r"[^\w]+", " ", text.casefold()).strip()


def exact_match(text: str, answer: str) -> bool:
    """Return whether two answers are the same but for case, punctuation, articles and blanks, as SQuAD compares them.

    Rajpurkar et al., "SQuAD", EMNLP 2016, section 6.1.
    """
    return _words(text) == _words(answer)


def token_f1(text: str, answer: str) -> float:
    """Return the harmonic mean, 0 to 1, of the shares of words that two answers have in common, as SQuAD counts them.

    Where an answer has no word but articles, it is 1 for the same answer and 0 for any other, as in SQuAD 2.0.
    """
    said, right = _words(text), _words(answer)
    if not said or not right:
        return float(said == right)
    common = (Counter(said) & Counter(right)).total()
    return 2 * common / (len(said) + len(right))


def _words(text: str) -> list[str]:
    """Return the words of an answer in lower case, without punctuation and articles."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(?:a|an|the)\b", " ", plain).split()


def judged_verdict(text: str) -> tuple[bool, int] | None:
    """Return what a judge of ActivityNet-QA decided: whether the answer is right and a score 0 to 5; None: unclear."""
    found = _fields(text)
    verdict = str(found.get("pred", "")).strip().lower()
    score = _score(found.get("score"))
    return None if verdict not in ("yes", "no") or score is None else (verdict == "yes", score)


def judged_score(text: str) -> int | None:
    """Return the score 0 to 5 that a judge of the Video-ChatGPT benchmark gave; None: unclear."""
    return _score(_fields(text).get("score"))


def _fields(text: str) -> dict[str, object]:
    """Return the entries of the only dictionary in a reply, in Python's or JSON's notation."""
    found = re.findall(r"\{[^{}]*\}", text)
    if len(found) != 1:
        return {}
    entries = re.findall(r"['\"](\w+)['\"]\s*:\s*('[^']*'|\"[^\"]*\"|-?[\d.]+)", found[0])
    return {name: value.strip("'\"") for name, value in entries}


def _score(value: object) -> int | None:
    """Return a score of 0 to 5, of which judges give halves now and then; those are cut, as in the benchmark's code."""
    try:
        score = float(str(value))
    except ValueError:
        return None
    return int(score) if 0 <= score <= 5 else None


def read_json_line(line: str) -> dict[str, object] | None:
    """Return the object of a line; None where the line is cut off or is none."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
