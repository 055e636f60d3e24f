"""What a model's text says: which option it chose, whether it is the right answer, what a judge decided.

Nothing is ever guessed.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

from ..files import parse_json

# What may stand before the letter, or before the option's text.
_LEAD = re.compile(
    r"^\s*(?:(?:so|thus|hence|therefore|based on [^.:,]*),?\s+)?(?:(?:i (?:think|believe|would say)(?: that)?)\s+)?"
    r"(?:(?:the |my )?(?:best |correct |right |final |most likely )*(?:answer|ans|option|choice)"
    r"(?: (?:is|would be|should be|must be))?\s*:?\s*(?:option\s+)?)?",
    re.IGNORECASE,
)
# Words that say which letter it is, right before it.
_STATES = (
    r"(?:(?:\bans\b\.?|answer|option|choice)(?: (?:is|was|would be|should be|must be))?\s*:?(?: option)?|"
    r"\bit(?: is|'s| must be| should be| would be)(?: option)?|"
    r"\b(?:choose|chose|pick|select|go with|going with)(?: option)?)"
)
_NEGATION = re.compile(r"\b(?:not|never|neither|nor|cannot|no)\b|n't\b", re.IGNORECASE)
_CLAUSE = re.compile(r"[.;:,!?\n]|\b(?:but|so|therefore|instead|rather)\b", re.IGNORECASE)
# "A man" and "I think" begin with a word; before these words a letter is a letter.
_AFTER_LETTER = (
    r"(?=\s*(?:$|[).:,;!?\n\]]|[-\u2013\u2014]\s|(?:because|since|as|due|and|or)\b|[/&]|"
    r"(?:is|seems|would be)(?: the)?(?: most)? (?:correct|right|best|likely)\b))"
)


def chosen_option(text: str, options: Sequence[str]) -> int | None:
    r"""Return which option an answer chooses, or None where it does not say, or says two.

    Markup around it (`**B**`, `[B]`, `<B>`, quotes) and reasoning in `<think>` do not count. In this order, each only
    where the former found nothing:

    1. a letter in `\boxed{}` or `<answer>`;
    2. a letter that begins the answer, after a lead such as "The best answer is": `B`, `(B)`, `B.`, `B: ...`, `B` with
       anything on the next line;
    3. the letter after "answer is", "it is", "option", "I choose" and the like, or before "is correct";
    4. a letter in brackets;
    5. an option's text as the whole answer, or the only one whose text is in it.

    Where several letters are found at one step the answer is None; so it is for letters that are denied ("not B"), an
    answer that only lists the options, and a letter beyond them.

    Args:
        text: what the model wrote.
        options: texts of the options, without letters.
    """
    letters = "".join(chr(ord("A") + index) for index in range(len(options)))
    text = _without_markup(text)
    for find in (_declared, _beginning, _stated, _bracketed):
        found = find(text, letters)
        if found:
            return letters.index(found.pop()) if len(found) == 1 else None
    return _named(_LEAD.sub("", text, count=1), options)


def _without_markup(text: str) -> str:
    """Return a text without reasoning and typography: a letter in brackets of any kind is in round ones."""
    text = unicodedata.normalize("NFKC", text)
    # What was thought is not said; without its end, all that follows was.
    text = re.sub(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|$)", " ", text, flags=re.DOTALL)
    text = text.rpartition("</think>")[2]
    text = re.sub(r"[*`$]|\b_+|_+\b|^\s*#+\s*", "", text, flags=re.MULTILINE)
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"[\[<{\"\u201c\u2018']\s*([A-Za-z])\s*[.)]?\s*[\]>}\"\u201d\u2019']", r"(\1)", text)
    return text.strip()


def _declared(text: str, letters: str) -> set[str]:
    """Return the letters that the answer was asked to be wrapped in."""
    marked = re.findall(r"\\boxed\s*(?:\{([^{}]*)\}|\((\w)\))|<answer>(.*?)(?:</answer>|$)", text, re.DOTALL)
    found = (re.match(rf"\W*(?:option )?([{letters}])(?![\w'])", "".join(groups).strip()) for groups in marked)
    return {match.group(1) for match in found if match}


def _beginning(text: str, letters: str) -> set[str]:
    """Return the letter that begins the answer, and a second one where another follows at once."""
    if len(letters) > 1 and all(re.search(rf"(?<![\w'])\(?{letter}\s*[).:]", text) for letter in letters):
        return set()  # a list of the options
    rest = _LEAD.sub("", text, count=1).strip()
    both = f"{letters}{letters.lower()}"
    # A capital alone, or any letter marked as one: "A man runs" begins with an article.
    begins = re.match(rf"\(\s*([{both}])\s*\)|([{both}])\s*[).:,;]|([{both}])\s*$|([{letters}]){_AFTER_LETTER}", rest)
    if begins is None:
        return set()
    return {next(group for group in begins.groups() if group).upper()} | _next_letter(rest[begins.end() :], letters)


def _next_letter(rest: str, letters: str) -> set[str]:
    """Return the letter that continues an enumeration, as in "A and B"."""
    another = re.match(rf"\s*[,;/&]?\s*(?:and\s+|or\s+)?(?:option\s+)?\(?([{letters}])(?:\s*[).:,]|\s*$)", rest)
    return {another.group(1)} if another else set()


def _stated(text: str, letters: str) -> set[str]:
    """Return the letters that words say to be the answer, where nothing in their clause denies it."""
    found = set()
    before = rf"(?i:{_STATES})\s*(?:\(([{letters}])\)|([{letters}])(?![\w']){_AFTER_LETTER})"
    after = rf"(?<![\w'])(?:\(([{letters}])\)|([{letters}])) (?i:is|would be)(?i: the)?(?i: (?:correct|right|best))"
    for match in (*re.finditer(before, text), *re.finditer(after, text)):
        clause = _CLAUSE.split(text[: match.start()])[-1]
        if not _NEGATION.search(clause):
            found |= {next(group for group in match.groups() if group)} | _next_letter(text[match.end() :], letters)
    return found


def _bracketed(text: str, letters: str) -> set[str]:
    """Return the letters in brackets, where nothing in their clause denies them."""
    marks = re.finditer(rf"\(([{letters}])\)", text)
    return {mark.group(1) for mark in marks if not _NEGATION.search(_CLAUSE.split(text[: mark.start()])[-1])}


def _named(text: str, options: Sequence[str]) -> int | None:
    """Return the option whose text an answer is, or the only one whose text is in it."""
    plain = [_plain(option) for option in options]
    whole = _plain(text)
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
        found = parse_json(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
